"""The study file: which recipe is searched, by what, on which suite, with how many trials and evaluators.

    recipe: merge.yaml            # or a recipe written here; its ranges are what is searched
    suite: zoo                    # or the path of a suite's YAML
    searcher: cmaes               # or {name: cmaes, sigma: 0.2, population: 8}
    objective: macro mean
    budget: {trials: 60}          # every trial counts, the uniform merge and the single parents included
    evaluators: {count: 2, cpus: 1, gpus: 0, memory: 4GB, timeout_seconds: 1800}
    backend: {name: hf, device: cpu, dtype: auto}
    finalists: 4                  # scored again on selection items, beside the best parent and the uniform merge
    seed: 0
    reports: reports              # Parquet tables; by default in the study's output

Paths are relative to the study file. Budget, evaluators and reports are no part of what a study is: they may change
between one run of it and the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from remelt.errors import RecipeError, StudyError
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe
from remelt.searchers import SearchSpace, build_searcher, searcher_options
from remelt.strict_config import Section, load_yaml
from remelt_evals.backends import BACKENDS, BackendOptions
from remelt_evals.eval_report import ROLES
from remelt_evals.suite import Suite, load_suite
from remelt_jobs.candidates import starting_candidates

OBJECTIVES = ("macro mean",)
ZOO = "zoo"
"""The suite that comes with remelt."""

_KEYS = [
    "recipe",
    "suite",
    "searcher",
    "objective",
    "budget",
    "evaluators",
    "backend",
    "finalists",
    "seed",
    "reports",
    "allow_public_benchmarks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluators:
    """How many evaluators, and what each of them asks of the cluster."""

    count: int = 1
    cpus: float = 1
    gpus: float = 0
    memory_bytes: int | None = None
    """For Ray's scheduler, and the bound on what a merge in the evaluator may hold."""
    timeout_seconds: float = 3600.0
    """For one trial, its merge included."""
    start_timeout_seconds: float = 900.0
    """Until the first evaluator is up; a cluster that scales may take minutes."""
    scratch: str | None = None
    """Folder on a local disk for candidates; by default the evaluator's temporary folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """A study, read and checked."""

    recipe: Recipe
    suite: Suite
    searcher: str
    searcher_options: Mapping[str, float] = field(default_factory=dict)
    objective: Literal["macro mean"] = "macro mean"
    num_trials: int
    evaluators: Evaluators = field(default_factory=Evaluators)
    backend: BackendOptions = field(default_factory=BackendOptions)
    finalists: int = 4
    seed: int = 0
    reports: Path | None = None
    """None is `reports` in the output."""
    allow_public_benchmarks: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def space(self) -> SearchSpace:
        """What the searcher searches: the recipe's variables and simplex groups."""
        return SearchSpace(self.recipe.variables, self.recipe.constraints.simplex)

    def canonical(self) -> dict[str, Any]:
        """What the study is, as JSON values: everything that can change a trial, and nothing that cannot."""
        return {
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
    budget = top.section("budget")
    budget.allow(("trials",))
    return StudyConfig(
        recipe=_read_recipe(top, where, folder),
        suite=load_suite(suite_path(top.text("suite"), folder)),
        searcher=searcher.text("name") if searcher else top.text("searcher", "cmaes"),
        searcher_options={key: value for key, value in searcher.values.items() if key != "name"} if searcher else {},
        objective=cast(Literal["macro mean"], top.choice("objective", OBJECTIVES, OBJECTIVES[0])),
        num_trials=budget.integer("trials", low=1),
        evaluators=_read_evaluators(top.section("evaluators")),
        backend=_read_backend(top.section("backend")),
        finalists=top.integer("finalists", 4, low=1),
        seed=top.integer("seed", 0, low=0, high=2**63 - 1),
        reports=folder / top.text("reports") if top.has("reports") else None,
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


def _read_evaluators(section: Section) -> Evaluators:
    section.allow(("count", "cpus", "gpus", "memory", "timeout_seconds", "start_timeout_seconds", "scratch"))
    default = Evaluators()
    return Evaluators(
        count=section.integer("count", default.count, low=1),
        cpus=section.number("cpus", default.cpus, low=0),
        gpus=section.number("gpus", default.gpus, low=0),
        memory_bytes=section.size_bytes("memory") if section.has("memory") else None,
        timeout_seconds=section.number("timeout_seconds", default.timeout_seconds, low=1),
        start_timeout_seconds=section.number("start_timeout_seconds", default.start_timeout_seconds, low=1),
        scratch=section.text("scratch") if section.has("scratch") else None,
    )


def _read_backend(section: Section) -> BackendOptions:
    section.allow(("name", "device", "dtype", "trust_remote_code"))
    default = BackendOptions()
    return BackendOptions(
        name=section.choice("name", BACKENDS.keys(), default.name),
        device=section.text("device", default.device),
        dtype=section.text("dtype", default.dtype),
        trust_remote_code=section.flag("trust_remote_code", False),
    )


def _check(config: StudyConfig) -> None:
    """What no key alone can show: something to search, items for every role, trials enough for the starts."""
    build_searcher(config.searcher, config.space, config.seed, config.searcher_options)
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
    num_starts = len(starting_candidates(config.recipe, config.space))
    if config.num_trials <= num_starts:
        raise RecipeError(
            f"budget: {config.num_trials} trials, but {num_starts} of them are the uniform merge, the single parents "
            f"and the recipe's own start; give at least {num_starts + 1}"
        )
