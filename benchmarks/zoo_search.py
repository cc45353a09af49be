"""Repeat the demo's search over several search seeds, and say how often the winner beat the parents and uniform.

    python benchmarks/zoo_search.py --seeds 5

Every seed is a study of its own on the checkpoints that come with remelt: same parents, suite, budget and searcher.
What is counted: the paired 95 % interval on report items of the winner minus the best parent (best on these very
items), and minus the uniform merge, lies above zero. Report items are the same for all seeds, so the seeds say how
far the outcome depends on the searcher's draws, not how it would be on other items.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt_jobs.demo import NUM_TRIALS, demo_study
from remelt_jobs.ray_session import ray_session
from remelt_jobs.study import run_study
from remelt_jobs.study_config import parse_study
from remelt_jobs.study_report import TerminalStudyProgress, print_result
from remelt_jobs.study_result import StudyResult

PACKAGES = ("torch", "transformers", "lm-eval", "ray", "cmaes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="search seeds 0, 1, ...")
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, help="budget of each study")
    parser.add_argument("--scratch", type=Path, help="keep the studies here, and go on with those that are there")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR, help="where zoo.md and zoo.json go")
    options = parser.parse_args()
    results: list[tuple[StudyResult, float]] = []
    with scratch_folder(options.scratch) as folder:
        # One cluster for all of them, with a CPU for each evaluator and one for the winner's merge.
        count = parse_study(demo_study()).evaluators.count
        with ray_session(num_cpus=count + 1):
            for seed in range(options.seeds):
                started = time.monotonic()
                config = parse_study(demo_study(seed, options.trials))
                with TerminalStudyProgress() as progress:
                    result = run_study(config, folder / f"seed-{seed}", progress=progress)
                results.append((result, time.monotonic() - started))
                print(f"seed {seed}:")
                print_result(result)
    data = {"trials": options.trials, "seeds": [json.loads(result.to_json()) for result, _ in results]}
    write_report("zoo", "Search on the zoo, over search seeds", sections(results), data, folder=options.reports)


def sections(results: list[tuple[StudyResult, float]]) -> list[str]:
    """The report: how often each claim held, then seed by seed, then the parents."""
    first = results[0][0]
    counts = []
    for place, what in enumerate(("the best parent", "the uniform merge")):
        held = sum(result.versus[place].comparison.macro.is_better for result, _ in results)
        differences = [result.versus[place].comparison.macro.difference for result, _ in results]
        counts.append(
            f"* {what} beaten on the macro average with the paired 95 % interval above zero: "
            f"**{held} of {len(results)}** (difference {min(differences):+.3f} to {max(differences):+.3f})"
        )
    return [
        f"{first.num_trials} trials for each seed, parents and uniform merge included; scores are accuracies on report "
        f"items, which nothing was searched or selected on. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions(sys.executable, PACKAGES).items())
        + ".",
        "\n".join(counts),
        "## By search seed",
        markdown_table(
            ["seed", "best merge", "minus the best parent", "minus uniform", "winner", "coefficients", "seconds"],
            [_seed_row(seed, *result) for seed, result in enumerate(results)],
        ),
        "## Parents and uniform merge",
        markdown_table(
            ["checkpoint", *(score.ability for score in first.rows[0].abilities), "macro average"],
            [
                [
                    row.label,
                    *(f"{score.value:.3f} ± {score.stderr or 0:.3f}" for score in row.abilities),
                    f"{row.objective:.3f} ± {row.stderr or 0:.3f}",
                ]
                for row in first.rows[:-1]
            ],
        ),
    ]


def _seed_row(seed: int, result: StudyResult, seconds: float) -> list[str]:
    macros = [versus.comparison.macro for versus in result.versus]
    intervals = [f"{macro.difference:+.3f} [{macro.low:+.3f}, {macro.high:+.3f}]" for macro in macros]
    values = ", ".join(f"{name.removeprefix('w_')} {value:.2f}" for name, value in result.values.items())
    best = result.rows[-1]
    score = f"{best.objective:.3f} ± {best.stderr or 0:.3f}"
    return [str(seed), score, *intervals, result.winner, values, f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
