"""The study file: which recipe is searched, by what, on which suite, with how many trials and evaluators.

    recipe: merge.yaml            # or a recipe written here; its ranges are what is searched
    suite: zoo                    # or the path of a suite's YAML
    searcher: cmaes               # or {name: cmaes, sigma: 0.2, population: 8}
    simplex: scaled               # or softmax: shares that sum to 1 are searched by logarithms, near the start
    objective: macro mean         # or standardised mean, mean rank, worst task, several
    budget: {trials: 60}          # the first to be spent of trials, gpu_hours and wall_hours ends the search
    fidelity: [50, 200]           # score so many items of each eval task first; what is clearly worse stops there
    evaluators: {count: 2, nodes: 1, cpus: 1, gpus: 0, memory: 4GB, disk: 40GB, timeout_seconds: 1800}
    backend: {name: hf, device: cpu, dtype: auto}    # or {name: lm_eval, model: vllm, interpreter: P}
    cache: evaluations            # folder of evaluations by id, for all studies that name it
    finalists: 4                  # scored again on selection items, beside the best parent and the uniform merge
    seed: 0
    reports: reports              # Parquet tables; by default in the study's output

Paths are relative to the study file. Every trial counts, the uniform merge and the single parents included; those are
always scored. Budget, evaluators, cache and reports are no part of what a study is: they may change between one run of
it and the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remelt.errors import RecipeError, StudyError
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe
from remelt.searchers import SearchSpace, build_searcher, needs_objectives, searcher_options
from remelt.strict_config import Section, load_yaml
from remelt_evals.backends import BACKENDS, BackendOptions
from remelt_evals.eval_report import ROLES
from remelt_evals.ladder import rungs_of
from remelt_evals.lm_eval_backend import names_one_model
from remelt_evals.objectives import OBJECTIVES, Objective
from remelt_evals.suite import Suite, load_suite
from remelt_jobs.candidates import starting_candidates
from remelt_jobs.study_state import Spent

SCALED, SOFTMAX = "scaled", "softmax"

ZOO = "zoo"
"""The suite that comes with remelt."""

_KEYS = [
    "recipe",
    "suite",
    "searcher",
    "simplex",
    "objective",
    "budget",
    "fidelity",
    "evaluators",
    "backend",
    "cache",
    "finalists",
    "seed",
    "reports",
    "allow_public_benchmarks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When a search ends: with the first of these that is spent. At least one is given."""

    trials: int | None = None
    gpu_hours: float | None = None
    """Time of evaluators, merges included, times the GPUs of one."""
    wall_hours: float | None = None
    """While a driver is at work."""

    def is_spent(self, spent: Spent, gpus: float) -> bool:
        """Whether the search is over, given what it used and the GPUs of an evaluator."""
        return (
            (self.trials is not None and spent.trials >= self.trials)
            or (self.gpu_hours is not None and spent.evaluator_seconds * gpus >= self.gpu_hours * 3600)
            or (self.wall_hours is not None and spent.wall_seconds >= self.wall_hours * 3600)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluators:
    """How many evaluators, and what each of them asks of the cluster."""

    count: int = 1
    together: int = 1
    """Candidates that an evaluator takes at one time and merges in one read of the parents; each takes a model's
    memory, or a candidate's disk."""
    parts: int = 1
    """How many evaluators score one candidate at a time, each on other entries of the suite."""
    nodes: int = 1
    """Of one evaluator: CPUs, GPUs and memory are those of each of its nodes, had all at once or not at all."""
    cpus: float = 1
    gpus: float = 0
    disk_bytes: int | None = None
    """What all candidates on disk at one time may take; `together` for each evaluator."""
    memory_bytes: int | None = None
    """For Ray's scheduler, and the bound on what a merge in the evaluator may hold."""
    timeout_seconds: float = 3600.0
    """For one trial, its merge included; where several are merged together, for each."""
    start_timeout_seconds: float = 900.0
    """Until the first evaluator is up; a cluster that scales may take minutes."""
    scratch: str | None = None
    """Folder on a local disk for candidates; by default the evaluator's temporary folder."""
    resident: bool = True
    """Merge candidates into the loaded model, where backend and architecture allow it; the same bits as by disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """A study, read and checked."""

    recipe: Recipe
    suite: Suite
    searcher: str
    searcher_options: Mapping[str, float | str] = field(default_factory=dict)
    softmax: bool = False
    """Whether simplex groups are searched by logarithms; see `SearchSpace`."""
    objective: str = "macro mean"
    """A name in `remelt_evals.objectives.OBJECTIVES`."""
    budget: Budget
    fidelity: tuple[int, ...] = ()
    """Limits on the items of each eval task, before all of them."""
    evaluators: Evaluators = field(default_factory=Evaluators)
    backend: BackendOptions = field(default_factory=BackendOptions)
    finalists: int = 4
    seed: int = 0
    reports: Path | None = None
    """None is `reports` in the output."""
    cache: Path | None = None
    """Folder of evaluations by id; None scores everything anew."""
    allow_public_benchmarks: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def space(self) -> SearchSpace:
        """What the searcher searches: the recipe's variables and simplex groups."""
        return SearchSpace(self.recipe.variables, self.recipe.constraints.simplex, self.softmax)

    @property
    def scoring(self) -> tuple[Objective, tuple[float, ...]]:
        """The objective, and the weights of the suite's entries."""
        return OBJECTIVES[self.objective], tuple(task.weight for task in self.suite.tasks)

    @property
    def rungs(self) -> tuple[int | None, ...]:
        """The fidelities of a search trial, from few items to all."""
        return rungs_of(self.fidelity)

    def canonical(self) -> dict[str, Any]:
        """What the study is, as JSON values: everything that can change a trial, and nothing that cannot."""
        canonical: dict[str, Any] = {
            "recipe": self.recipe.canonical(),
            "suite": {"name": self.suite.name, "digest": self.suite.digest},
            "searcher": {"name": self.searcher, **searcher_options(self.searcher), **self.searcher_options},
            "objective": self.objective,
            "backend": {
                "name": self.backend.name,
                "device": self.backend.device,
                "dtype": self.backend.dtype,
                "trust_remote_code": self.backend.trust_remote_code,
            },
            "finalists": self.finalists,
            "seed": self.seed,
        }
        if self.softmax:
            canonical["simplex"] = SOFTMAX
        if self.fidelity:
            canonical["fidelity"] = list(self.fidelity)
        if self.backend.model is not None:
            canonical["backend"] |= {"model": self.backend.model, "model_args": dict(self.backend.model_args)}
        return canonical

    @property
    def study_id(self) -> str:
        """sha256 of the canonical form."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_study(path: Path) -> StudyConfig:
    """Read a study file.

    Raises:
        RecipeError, EvaluationError, StudyError: The study, its recipe or its suite cannot be read or done; the
            message names the file and the place in it.
    """
    return parse_study(load_yaml(path), where=str(path), folder=path.parent)


def parse_study(document: Mapping[str, Any], *, where: str = "study", folder: Path = Path()) -> StudyConfig:
    """Read a study from plain values; `folder` is what its paths are relative to."""
    top = Section(document, where)
    top.allow(_KEYS)
    searcher = top.section("searcher") if isinstance(top.values.get("searcher"), Mapping) else None
    return StudyConfig(
        recipe=_read_recipe(top, where, folder),
        suite=load_suite(suite_path(top.text("suite"), folder)),
        searcher=searcher.text("name") if searcher else top.text("searcher", "cmaes"),
        searcher_options={key: value for key, value in searcher.values.items() if key != "name"} if searcher else {},
        softmax=top.choice("simplex", (SCALED, SOFTMAX), SCALED) == SOFTMAX,
        objective=top.choice("objective", OBJECTIVES.keys(), "macro mean"),
        budget=_read_budget(top.section("budget")),
        fidelity=_read_fidelity(top),
        evaluators=_read_evaluators(top.section("evaluators")),
        backend=_read_backend(top.section("backend")),
        finalists=top.integer("finalists", 4, low=1),
        seed=top.integer("seed", 0, low=0, high=2**63 - 1),
        reports=folder / top.text("reports") if top.has("reports") else None,
        cache=folder / top.text("cache") if top.has("cache") else None,
        allow_public_benchmarks=top.flag("allow_public_benchmarks", False),
    )


def suite_path(name: str, folder: Path = Path()) -> Path:
    """Where a suite's YAML is: `zoo` for the one that comes with remelt, else a path relative to `folder`."""
    if name != ZOO:
        return folder / name
    from remelt_evals import zoo

    return zoo.suite_path()


def _read_recipe(top: Section, where: str, folder: Path) -> Recipe:
    if isinstance(top.values.get("recipe"), Mapping):
        return parse_recipe(top.section("recipe").values, where=f"{where}: recipe")
    path = folder / top.text("recipe")
    return parse_recipe(load_yaml(path), where=str(path))


def _read_budget(section: Section) -> Budget:
    section.allow(("trials", "gpu_hours", "wall_hours"))
    if not section.values:
        section.refuse("give trials, gpu_hours or wall_hours, or several of them")
    return Budget(
        trials=section.integer("trials", low=1) if section.has("trials") else None,
        gpu_hours=section.number("gpu_hours", low=0) if section.has("gpu_hours") else None,
        wall_hours=section.number("wall_hours", low=0) if section.has("wall_hours") else None,
    )


def _read_fidelity(top: Section) -> tuple[int, ...]:
    if not top.has("fidelity"):
        return ()
    limits = top.items("fidelity")
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            top.refuse(
                f"{limit!r} is no number of items; give a list such as [50, 200], all items come after", "fidelity"
            )
    return tuple(sorted({int(limit) for limit in limits}))


def _read_evaluators(section: Section) -> Evaluators:
    section.allow(
        (
            "count",
            "together",
            "parts",
            "nodes",
            "cpus",
            "gpus",
            "memory",
            "disk",
            "timeout_seconds",
            "start_timeout_seconds",
            "scratch",
            "resident",
        )
    )
    default = Evaluators()
    return Evaluators(
        count=section.integer("count", default.count, low=1),
        together=section.integer("together", default.together, low=1),
        parts=section.integer("parts", default.parts, low=1),
        nodes=section.integer("nodes", default.nodes, low=1),
        cpus=section.number("cpus", default.cpus, low=0),
        gpus=section.number("gpus", default.gpus, low=0),
        memory_bytes=section.size_bytes("memory") if section.has("memory") else None,
        disk_bytes=section.size_bytes("disk") if section.has("disk") else None,
        timeout_seconds=section.number("timeout_seconds", default.timeout_seconds, low=1),
        start_timeout_seconds=section.number("start_timeout_seconds", default.start_timeout_seconds, low=1),
        scratch=section.text("scratch") if section.has("scratch") else None,
        resident=section.flag("resident", default.resident),
    )


def _read_backend(section: Section) -> BackendOptions:
    section.allow(("name", "device", "dtype", "trust_remote_code", "model", "model_args", "interpreter"))
    default = BackendOptions()
    name = section.choice("name", BACKENDS.keys(), default.name)
    if (name == "lm_eval") != section.has("model"):
        section.refuse(
            "backend lm_eval runs lm-eval's own model types: give `name: lm_eval` and a `model`, such as vllm, together"
        )
    return BackendOptions(
        name=name,
        device=section.text("device", default.device),
        dtype=section.text("dtype", default.dtype),
        trust_remote_code=section.flag("trust_remote_code", False),
        model=section.text("model") if section.has("model") else None,
        model_args=section.section("model_args").values if section.has("model_args") else {},
        interpreter=section.text("interpreter") if section.has("interpreter") else None,
    )


def _check(config: StudyConfig) -> None:
    """What no key alone can show: something to search, items for every role, trials enough for the starts."""
    build_searcher(config.searcher, config.space, config.seed, config.searcher_options)
    if needs_objectives(config.searcher) and not OBJECTIVES[config.objective].is_several:
        raise StudyError(
            f"searcher {config.searcher} looks at every entry of the suite by itself: give `objective: several`, not "
            f"{config.objective}"
        )
    if config.softmax and not config.recipe.constraints.simplex:
        raise StudyError("simplex: softmax, but the recipe has no `constraints: {simplex: [...]}` to search by it")
    if config.evaluators.parts > 1 and (config.fidelity or config.evaluators.together > 1):
        raise StudyError(
            "evaluators: parts divides a candidate's entries among evaluators; leave out fidelity, which decides by "
            "all entries at once, and together"
        )
    missing = [role for role in ROLES if role not in config.suite.roles]
    if missing:
        raise StudyError(
            f"suite {config.suite.name} has no {' and no '.join(missing)} items for some of its abilities; a study "
            f"searches, selects and reports on items of their own: add them in {config.suite.path}"
        )
    if not config.suite.is_local and not config.allow_public_benchmarks:
        raise StudyError(
            f"suite {config.suite.name} searches on lm-eval's own tasks, whose items are public test sets; scores "
            "optimised on them say little. Give tasks of your own in its `tasks_dir`, or set "
            "`allow_public_benchmarks: true` in the study, and its report will say so"
        )
    if config.backend.model is not None and names_one_model(config.backend.model_args):
        raise StudyError(
            f"backend: model_args of {config.backend.model} name a model of their own, so that every candidate would "
            "get the scores of that one; put {checkpoint} where the candidate's folder is to go"
        )
    num_starts = len(starting_candidates(config.recipe, config.space))
    trials, gpu_hours = config.budget.trials, config.budget.gpu_hours
    if gpu_hours is not None and not config.evaluators.gpus:
        raise StudyError(
            "budget: gpu_hours, but evaluators ask for no GPU; give `evaluators: {gpus: 1}`, or a budget of trials or "
            "wall_hours"
        )
    if trials is not None and trials <= num_starts:
        raise RecipeError(
            f"budget: {trials} trials, but {num_starts} of them are the uniform merge, the single parents "
            f"and the recipe's own start; give at least {num_starts + 1}"
        )
