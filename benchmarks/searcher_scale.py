"""What an ask costs after 100, 1,000 and 5,000 trials, for each searcher; and how fast a journal of 5,000 is resumed.

    python benchmarks/searcher_scale.py

Trials are uniform draws on a simplex of 4 and of 16 coefficients, scored by noisy quadratics of three abilities, after
the uniform merge and the single parents. *First* is the first ask of a new process after its imports, as on a resume;
*next* is the ask after one more trial has finished, the least of three at most. Seconds are CPU time, which for asks,
that work on one core, is what they take on an idle machine; other processes on this one change it less than wall time.
To reach: a journal of 5,000 trials resumed in under 5 s, the next ask of CMA-ES and random search in under 1 s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt.errors import RecipeError
from remelt.recipe import Variable
from remelt.searchers import SEARCHERS, SearchSpace, Trial, TrialState, build_searcher, needs_objectives

PACKAGES = ("numpy", "scipy", "torch", "optuna", "cmaes")
COUNTS = (100, 1_000, 5_000)
DIMENSIONS = (4, 16)
RESUME_COUNT = 5_000
ALLOWED_RESUME_SECONDS = 5.0
ALLOWED_ASK_SECONDS = 1.0
HELD_TO_IT = ("cmaes", "random")
TIMEOUT_SECONDS = 600.0
ENOUGH_SECONDS = 5.0
"""Of asks measured one after the other; slow searchers are asked fewer times."""
NUM_RUNNING = 3
"""Trials that run while the searcher is asked."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one searcher's asks."""

    searcher: str
    variables: int
    trials: int
    first_seconds: float | None
    """None where it took longer than the time-out, or the searcher refuses the space."""
    next_seconds: float | None
    import_seconds: float = 0.0
    """Of the first ask of all, after few trials: what the libraries cost."""
    note: str = ""


def simplex(num_variables: int) -> SearchSpace:
    names = tuple(f"w{k}" for k in range(num_variables))
    return SearchSpace(tuple(Variable(name, 0.0, 1.0, 1 / num_variables) for name in names), (names,))


def trials_of(space: SearchSpace, num_trials: int, name: str) -> list[Trial]:
    """The starts, then trials as random search would have asked for them, one after the other."""
    num_variables = len(space.variables)
    draws = np.random.default_rng(0)
    targets = draws.dirichlet(np.ones(num_variables), 3)
    random_search = build_searcher("random", space, 0)
    singles = [np.eye(num_variables)[k] for k in range(num_variables)]
    starts = [np.full(num_variables, 1 / num_variables), *singles]
    trials: list[Trial] = []
    for number in range(num_trials + len(starts)):
        if number < len(starts):
            point = {}
            values = {v.name: float(x) for v, x in zip(space.variables, starts[number], strict=True)}
        else:
            point = dict(random_search.ask(number, []))
            values = space.values(point)
        losses = ((np.array(list(values.values())) - targets) ** 2).sum(axis=1) + 0.01 * draws.normal(size=3)
        several = tuple((-losses).tolist())
        trials.append(
            Trial(
                number=number,
                state=TrialState.COMPLETE,
                point=point,
                asked_after=number,
                score=float(-losses.mean()),
                objectives=several if needs_objectives(name) else (),
                values=values,
            )
        )
    return trials


def measure_ask(name: str, num_variables: int, num_trials: int) -> dict[str, float | str]:
    """Time the first ask of a new searcher, and the three after it; in this process."""
    space = simplex(num_variables)
    trials = trials_of(space, num_trials + 8 + NUM_RUNNING, name)
    few = trials[: num_variables + 1 + 12]
    begun = time.process_time()
    build_searcher(name, space, 0).ask(len(few), few)
    import_seconds = time.process_time() - begun
    searcher = build_searcher(name, space, 0)
    seconds = []
    for end in range(num_trials, num_trials + 4):
        running = [
            Trial(trial.number, TrialState.RUNNING, trial.point, end, values=trial.values)
            for trial in trials[end : end + NUM_RUNNING]
        ]
        begun = time.process_time()
        searcher.ask(end + NUM_RUNNING, [*trials[:end], *running])
        seconds.append(time.process_time() - begun)
        if len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS:
            break
    return {"first": seconds[0], "next": min(seconds[1:]), "imports": import_seconds}


def measure(name: str, num_variables: int, num_trials: int) -> Cost:
    """Time one searcher in a process of its own."""
    try:
        build_searcher(name, simplex(num_variables), 0)
    except RecipeError as error:
        return Cost(name, num_variables, num_trials, None, None, note=f"refused: {error}")
    command = [sys.executable, __file__, "--probe", name, str(num_variables), str(num_trials)]
    try:
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Cost(name, num_variables, num_trials, None, None, note=f"more than {TIMEOUT_SECONDS:.0f} s")
    found = json.loads(run.stdout)
    return Cost(name, num_variables, num_trials, found["first"], found["next"], found["imports"])


def measure_resume(folder: Path) -> dict[str, float]:
    """Read a journal of 5,000 trials, fold it, and ask for the next: what `remelt search` does on a resume."""
    from remelt_jobs.journal import read_journal
    from remelt_jobs.study_state import StudyState

    space = simplex(16)
    trials = trials_of(space, RESUME_COUNT, "cmaes")
    path = folder / "journal" / "1.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [{"type": "opened", "fence": 1, "read": {}}]
    for trial in trials:
        at = "2026-01-01T00:00:00+00:00"
        candidate = {
            "number": trial.number,
            "origin": "searcher" if trial.point else "parent",
            "label": f"trial {trial.number}",
            "point": dict(trial.point),
            "values": dict(trial.values),
            "model": None,
        }
        records.append({"type": "asked", "candidate": candidate, "asked_after": trial.asked_after, "at": at})
        abilities = {f"ability {k}": 0.5 for k in range(4)}
        finished = {"state": "COMPLETE", "score": trial.score, "abilities": abilities, "failure": None}
        identities = {"digest": "0" * 64, "candidate_id": "0" * 64, "evaluation_id": f"{trial.number:064x}"}
        times = {"merge_seconds": 1.0, "seconds": 2.0}
        records.append({"type": "finished", "trial": trial.number, "at": at, **finished, **identities, **times})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    begun = time.process_time()
    state = StudyState.of(read_journal(folder))
    seen = state.seen
    read_seconds = time.process_time() - begun
    seconds = {"journal": read_seconds}
    for name in HELD_TO_IT:
        begun = time.process_time()
        build_searcher(name, space, 0).ask(len(seen), seen)
        seconds[name] = time.process_time() - begun
    return seconds


def sections(costs: Sequence[Cost], resume: dict[str, float]) -> list[str]:
    """The report."""
    rows = []
    for name in dict.fromkeys(cost.searcher for cost in costs):
        for num_variables in dict.fromkeys(cost.variables for cost in costs):
            mine = [cost for cost in costs if (cost.searcher, cost.variables) == (name, num_variables)]
            cells = [cell for cost in mine for cell in (_seconds(cost.first_seconds), _seconds(cost.next_seconds))]
            rows.append([f"{name}, {num_variables}", *cells, f"{max(cost.import_seconds for cost in mine):.1f}"])
    counts = dict.fromkeys(cost.trials for cost in costs)
    head = ["searcher, variables", *(f"{kind} ask at {count:,}" for count in counts for kind in ("first", "next"))]
    notes = [f"* {cost.searcher}, {cost.variables} variables: {cost.note}" for cost in costs if cost.note]
    journal = resume["journal"]
    return [
        "Seconds of CPU time, default options, three trials running. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions(sys.executable, PACKAGES).items())
        + ".",
        markdown_table([*head, "imports and a small ask"], rows),
        *(["\n".join(dict.fromkeys(notes))] if notes else []),
        f"A journal of {RESUME_COUNT:,} trials of 16 variables: read and folded in {journal:.2f} s; then the first "
        "ask, imports included, "
        + ", ".join(f"{resume[name]:.2f} s for {name}" for name in HELD_TO_IT)
        + f" (to reach: {ALLOWED_RESUME_SECONDS:.0f} s together, {ALLOWED_ASK_SECONDS:.0f} s for the next ask).",
    ]


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3f}" if seconds < 1 else f"{seconds:.1f}"


def main() -> int:
    """Measure, write the report; the exit status says whether the figures were reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=list(SEARCHERS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--scratch", type=Path, help="folder for the journal, kept (default: a temporary one)")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR, help="where searcher_scale.md and .json go")
    parser.add_argument("--probe", nargs=3, metavar=("SEARCHER", "VARIABLES", "TRIALS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        name, num_variables, num_trials = options.probe
        print(json.dumps(measure_ask(name, int(num_variables), int(num_trials))))
        return 0
    costs = []
    for name in options.searchers:
        for num_variables in DIMENSIONS:
            for count in options.counts:
                costs.append(measure(name, num_variables, count))
                print(costs[-1], flush=True)
    with scratch_folder(options.scratch) as folder:
        resume = measure_resume(folder)
    data = {"asks": [asdict(cost) for cost in costs], "resume": resume}
    title = "What a searcher's ask costs"
    write_report("searcher_scale", title, sections(costs, resume), data, folder=options.reports)
    is_reached = all(
        resume["journal"] + resume[name] < ALLOWED_RESUME_SECONDS
        and all((cost.next_seconds or 0) < ALLOWED_ASK_SECONDS for cost in costs if cost.searcher == name)
        for name in HELD_TO_IT
    )
    return int(not is_reached)


if __name__ == "__main__":
    sys.exit(main())
