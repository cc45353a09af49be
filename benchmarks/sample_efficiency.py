"""What a search finds for its cost, on the zoo, over search seeds: CMA-ES, GP, the ladder, random, and Frank-Wolfe.

    python benchmarks/sample_efficiency.py [--seeds 5] [--budget 24] [--processes 2]

Every method looks for coefficients that sum to 1 over the base and its four specialists. Searchers score candidates on
the zoo's search items, one at a time, the uniform merge and the single checkpoints first; Frank-Wolfe follows the loss
on the same items, answered. Cost is counted in tokens that pass the model forward, in units of one evaluation on all
search items; a gradient counts as three passes. At each cost the best candidate so far, by what the method itself can
see, is scored on report items. Nothing here was tuned to the outcome.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from frank_wolfe import source_of
from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt.recipe import Recipe
from remelt.recipe_yaml import load_recipe, parse_recipe
from remelt.searchers import Searcher, SearchSpace, Trial, TrialState, build_searcher
from remelt_evals import zoo
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest, Role, objective
from remelt_evals.evaluator import Evaluator
from remelt_evals.ladder import rungs_of, stop_early, without_texts
from remelt_jobs.candidates import bound_recipe, starting_candidates
from remelt_jobs.selection import run_selection
from remelt_jobs.selection_config import parse_selection

PACKAGES = ("torch", "transformers", "lm-eval", "cmaes", "optuna")
MEMORY_BYTES = 500_000_000
RUNGS = (30, 90)
"""Of 180 items of each eval task."""
SEARCHERS = ("random", "cmaes", "gp")
METHODS = ("random", "cmaes", "gp", "cmaes on the ladder", "Frank-Wolfe")
BLOCKS, BLOCK_TOKENS, ITERATIONS = 14, 96, 12
"""Blocks of each ability."""
Z = 1.96


class Found(NamedTuple):
    """The best candidate that a method knew of, from some cost on."""

    cost: float
    """In evaluations on all search items."""
    digest: str
    seen: float
    """What the method ranked it by: the score on search items, or minus the loss."""
    report: float
    """On report items."""


@dataclass(frozen=True, slots=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    found: tuple[Found, ...]
    cost: float
    num_trials: int

    def at(self, cost: float) -> float:
        """The report score of what was known at a cost."""
        return [each.report for each in self.found if each.cost <= cost + 1e-9][-1]


def recipe() -> Recipe:
    """Coefficients that sum to 1 over the base and the specialists."""
    sources = {"base": zoo.base(), **zoo.parents()}
    models = [
        {"model": str(path), "name": name, "parameters": {"weight": {"search": [0.0, 1.0], "as": f"w_{name}"}}}
        for name, path in sources.items()
    ]
    names = [f"w_{name}" for name in sources]
    return parse_recipe({"merge_method": "linear", "models": models, "constraints": {"simplex": names}})


class Scorer:
    """Scores candidates in this process, and counts what it cost."""

    def __init__(self) -> None:
        self._evaluator = Evaluator(BackendOptions(threads=1))
        self._suite = str(zoo.suite_path())
        self._report_scores: dict[str, float] = {}
        self.tokens = item_tokens()
        self.full = sum(sum(each) for each in self.tokens.values())

    def hold(self, bound: Recipe) -> tuple[str, str]:
        """Merge a candidate into memory: the name and digest to score it by."""
        held = self._evaluator.hold([bound], self._suite, memory_bytes=MEMORY_BYTES)
        assert not isinstance(held, str), held
        return held[0].checkpoint, held[0].digest

    def evaluate(self, checkpoint: str, digest: str, role: Role, limit: int | None = None) -> EvalReport:
        request = EvalRequest(checkpoint=checkpoint, digest=digest, suite=self._suite, role=role, limit=limit)
        return without_texts(self._evaluator.evaluate(request))

    def on_report(self, checkpoint: str, digest: str) -> float:
        """The report score, taken once for each digest."""
        if digest not in self._report_scores:
            self._report_scores[digest] = objective(self.evaluate(checkpoint, digest, "report"))
        return self._report_scores[digest]

    def cost(self, limit: int | None) -> float:
        """Of scoring the first items of every eval task, in evaluations on all."""
        return sum(sum(each[:limit]) for each in self.tokens.values()) / self.full

    def close(self) -> None:
        self._evaluator.close()


def item_tokens() -> dict[str, list[int]]:
    """Tokens that each search item sends through the model: context and choice, for every choice."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(zoo.base())
    counts = {}
    for ability in zoo.ABILITIES:
        items = map(json.loads, (zoo.zoo_dir() / "items" / f"{ability}_search.jsonl").read_text().splitlines())
        counts[ability] = [
            sum(len(tokenizer(item["context"] + choice).input_ids) for choice in item["choices"]) for item in items
        ]
    return counts


def search(scorer: Scorer, name: str, seed: int, budget: float, rungs: Sequence[int | None]) -> Run:
    """A study's loop without a cluster: one candidate after another, until the budget is spent."""
    plain = recipe()
    space = SearchSpace(plain.variables, plain.constraints.simplex)
    starts = starting_candidates(plain, space)
    searcher: Searcher = build_searcher(name, space, seed)
    trials: list[Trial] = []
    found: list[Found] = []
    best: EvalReport | None = None
    cost = 0.0
    while cost < budget:
        number = len(trials)
        start = starts[number] if number < len(starts) else None
        point = {} if start is not None else dict(searcher.ask(number, trials))
        values = dict(start.values) if start is not None else space.values(point)
        bound = (
            plain.bind(values)
            if start is None or start.model is None
            else bound_recipe(plain, replace(start, model=None))
        )
        assert bound is not None
        checkpoint, digest = scorer.hold(bound)
        state, score, spent = TrialState.COMPLETE, 0.0, 0.0
        for limit in rungs if start is None else (None,):
            report = scorer.evaluate(checkpoint, digest, "search", limit)
            # Each rung runs its items anew, as the study does.
            spent += scorer.cost(limit)
            score = objective(report)
            estimate = stop_early(best, report) if limit is not None and best is not None else None
            if estimate is not None:
                state, score = TrialState.STOPPED, estimate.score
                break
        cost += spent
        trials.append(Trial(number, state, point, number, score, values=values))
        if state is TrialState.COMPLETE and (not found or score > found[-1].seen):
            best = report
            found.append(Found(cost, digest, score, scorer.on_report(checkpoint, digest)))
    label = name if len(rungs) == 1 else f"{name} on the ladder"
    return Run(label, seed, tuple(found), cost, len(trials))


def select(scorer: Scorer, seed: int, budget: float, folder: Path) -> Run:
    """Frank-Wolfe from the uniform merge, on blocks of the search items with their answers."""
    texts = folder / "texts"
    write_texts(texts)
    document = {
        "pool": [{"model": str(path), "name": name} for name, path in zoo.parents().items()],
        "base_model": str(zoo.base()),
        "base_in_hull": True,
        "calibration": {
            "sources": [source_of(texts, ability) for ability in zoo.ABILITIES],
            "blocks": BLOCKS,
            "held_out": 2,
            "block_tokens": BLOCK_TOKENS,
            "end_of_text": False,
        },
        "variant": "pairwise",
        "backend": {"batch_size": 16, "threads": 1},
        "executor": {"threads": 1, "memory": "500MB"},
        "steps": {"iterations": ITERATIONS, "patience": ITERATIONS},
        "seed": seed,
    }
    result = run_selection(parse_selection(document), folder / f"selection-{seed}")
    pass_cost = len(zoo.ABILITIES) * BLOCKS * BLOCK_TOKENS / scorer.full
    cost_each = (3 * result.num_gradients + result.num_losses) * pass_cost / max(1, len(result.rows))
    found: list[Found] = []
    for row in result.rows:
        if not found or -row.loss > found[-1].seen:
            path = result.output / "iterates" / f"{row.number:04}" / "recipe.yaml"
            checkpoint, digest = scorer.hold(load_recipe(path))
            found.append(Found((row.number + 1) * cost_each, digest, -row.loss, scorer.on_report(checkpoint, digest)))
    return Run("Frank-Wolfe", seed, tuple(found), len(result.rows) * cost_each, len(result.rows))


def write_texts(folder: Path) -> None:
    """The search items of each ability, answered, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for ability in zoo.ABILITIES:
        items = map(json.loads, (zoo.zoo_dir() / "items" / f"{ability}_search.jsonl").read_text().splitlines())
        lines = [
            json.dumps({"context": item["context"], "answer": item["choices"][item["label"]].rstrip("\n") + "\n"})
            for item in items
        ]
        (folder / f"{ability}.jsonl").write_text("\n".join(lines) + "\n")


def run_seed(task: tuple[int, float, str]) -> tuple[list[Run], float]:
    """All methods with one seed, and the uniform merge's report score."""
    import torch

    torch.set_num_threads(1)
    seed, budget, folder = task
    scorer = Scorer()
    runs = [search(scorer, name, seed, budget, (None,)) for name in SEARCHERS]
    runs.append(search(scorer, "cmaes", seed, budget, rungs_of(RUNGS)))
    runs.append(select(scorer, seed, budget, Path(folder) / str(seed)))
    plain = recipe()
    uniform = plain.bind(dict.fromkeys((variable.name for variable in plain.variables), 1 / len(plain.variables)))
    reference = scorer.on_report(*scorer.hold(uniform))
    scorer.close()
    for run in runs:
        print(f"seed {seed}: {run.method}: {run.found[-1].report:.4f} after {run.cost:.1f}", flush=True)
    return runs, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=24.0, help="evaluations on all search items")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args()
    with scratch_folder(options.scratch) as folder:
        tasks = [(seed, options.budget, str(folder)) for seed in range(options.seeds)]
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            results = pool.map(run_seed, tasks, chunksize=1)
    runs = list(itertools.chain.from_iterable(each for each, _ in results))
    reference = results[0][1]
    draw(runs, reference, options.budget, options.reports / "sample_efficiency.svg")
    data = {"uniform": reference, "runs": [asdict(run) | {"found": [f._asdict() for f in run.found]} for run in runs]}
    write_report(
        "sample_efficiency",
        "What a search finds for its cost",
        sections(runs, reference, options.budget),
        data,
        folder=options.reports,
    )


def interval(values: Sequence[float]) -> str:
    """Mean over seeds with a 95 % interval by Student's t."""
    quantiles = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = quantiles.get(len(values), Z) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4f} ± {half:.4f}"


def sections(runs: Sequence[Run], reference: float, budget: float) -> list[str]:
    """Tables: report score by cost and method, then what each seed ended with."""
    by_method: Mapping[str, list[Run]] = {
        method: sorted((run for run in runs if run.method == method), key=lambda run: run.seed) for method in METHODS
    }
    costs = [budget / 4, budget / 2, budget]
    rows = []
    for method, own in by_method.items():
        cells = [interval([run.at(cost) for run in own]) for cost in costs]
        trials = f"{min(run.num_trials for run in own)} to {max(run.num_trials for run in own)}"
        rows.append([method, *cells, f"{statistics.mean(run.cost for run in own):.1f}", trials])
    random = [run.at(budget) for run in by_method["random"]]
    pairs = [
        [method, interval([run.at(budget) - other for run, other in zip(own, random, strict=True)])]
        for method, own in by_method.items()
        if method != "random"
    ]
    return [
        f"Macro average of accuracies on report items; {len(by_method['random'])} search seeds, mean and 95 % interval "
        f"over them (items are the same for all). The uniform merge of the base and its specialists has "
        f"{reference:.4f}; one such score has a standard error of about 0.01 over items. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions(sys.executable, PACKAGES).items())
        + ".",
        "![Report score by cost](sample_efficiency.svg)",
        markdown_table(["method", *(f"at {cost:g} evaluations" for cost in costs), "cost in all", "trials"], rows),
        f"The ladder scores the first {RUNGS[0]} and {RUNGS[1]} of 180 items of each eval task before all of them; its "
        "trials are those that its budget allowed. Frank-Wolfe stops when it has converged, at the cost shown.",
        "## Against random search, seed by seed, at the whole budget",
        markdown_table(["method", "difference"], pairs),
    ]


def draw(runs: Sequence[Run], reference: float, budget: float, path: Path) -> None:
    """Mean report score over seeds, by cost."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "remelt"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    steps = [1 + step / 4 for step in range(int(4 * (budget - 1)) + 1)]
    for method in METHODS:
        own = [run for run in runs if run.method == method]
        line = [statistics.mean(run.at(max(cost, run.found[0].cost)) for run in own) for cost in steps]
        axes.plot(steps, line, drawstyle="steps-post", label=method, linewidth=1.4)
    axes.axhline(reference, color="grey", linestyle=":", label="uniform merge")
    axes.set(xlabel="cost, in evaluations on all search items", ylabel="macro accuracy on report items")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
