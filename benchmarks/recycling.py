"""Recycling checkpoints, in small: which of them get weight, and what the merge is worth.

    python benchmarks/recycling.py [--seeds 2]             # the studies, their tables and plots
    python benchmarks/recycling.py --write recycling       # only the study files, to run one by hand

Two shelves of the zoo: sixteen saved steps of one training run, and a base with four fine-tunes for one ability each
(the run is of a smaller shape, so that they cannot be one shelf). Following Khalifa et al. (arXiv 2412.04144), CMA-ES
looks for coefficients that sum to 1, for the macro average over the abilities; the baselines are every single
checkpoint, the uniform merge, and a greedy soup. Search, selection and report items share nothing. docs/tutorial.md
goes through it step by step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt.strict_config import dump_yaml
from remelt_evals import zoo
from remelt_jobs.ray_session import ray_session
from remelt_jobs.study import run_study
from remelt_jobs.study_config import load_study
from remelt_jobs.study_report import TerminalStudyProgress, print_result
from remelt_jobs.study_result import StudyResult, Versus

PACKAGES = ("torch", "transformers", "lm-eval", "ray", "cmaes")
NUM_TRIALS = {"run": 100, "fine-tunes": 60}
SEEN = 0.01
"""A coefficient from here on counts as weight."""


class Finished(NamedTuple):
    """One study."""

    shelf: str
    name: str
    result: StudyResult
    scores: list[tuple[int, float]]
    """(trial, score on search items), as they finished."""


def shelves() -> dict[str, dict[str, Path]]:
    """Sixteen steps of one run; the base and its four specialists."""
    return {"run": {path.name: path for path in zoo.run_steps()}, "fine-tunes": {"base": zoo.base(), **zoo.parents()}}


def study(
    pool: Mapping[str, Path], searcher: str | Mapping[str, Any], seed: int, num_trials: int, simplex: str = "scaled"
) -> dict[str, Any]:
    """A study file: coefficients of all checkpoints, which sum to 1."""
    models = [
        {"model": str(path), "name": name, "parameters": {"weight": {"search": [0.0, 1.0], "as": f"w_{name}"}}}
        for name, path in pool.items()
    ]
    return {
        "recipe": {
            "merge_method": "linear",
            "models": models,
            "constraints": {"simplex": [f"w_{name}" for name in pool]},
        },
        "suite": "zoo",
        "searcher": searcher,
        "simplex": simplex,
        "objective": "macro mean",
        "budget": {"trials": num_trials},
        "evaluators": {"count": 2, "cpus": 1, "memory": "1GB"},
        "cache": "evaluations",
        "seed": seed,
    }


def studies(num_seeds: int) -> dict[tuple[str, str], dict[str, Any]]:
    """What is compared, by shelf and name."""
    made = {}
    for shelf, pool in shelves().items():
        for seed in range(num_seeds):
            made[shelf, f"cmaes, seed {seed}"] = study(pool, "cmaes", seed, NUM_TRIALS[shelf])
        made[shelf, "cmaes by softmax, seed 0"] = study(pool, "cmaes", 0, NUM_TRIALS[shelf], "softmax")
        made[shelf, "greedy soup"] = study(pool, "greedy_soup", 0, 2 * len(pool) + 1)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--write", type=Path, help="write the study files into this folder and stop")
    parser.add_argument("--scratch", type=Path, help="keep the studies here, and go on with those that are there")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args()
    if options.write:
        write_studies(options.write, options.seeds)
        return
    finished = []
    with scratch_folder(options.scratch) as folder, ray_session(num_cpus=3):
        for (shelf, name), path in write_studies(folder, options.seeds).items():
            with TerminalStudyProgress() as progress:
                result = run_study(load_study(path), path.with_suffix(""), progress=progress)
            finished.append(Finished(shelf, name, result, search_scores(result)))
            print(f"{shelf}: {name}:")
            print_result(result)
    draw(finished, options.reports / "recycling.svg")
    data = {
        f"{one.shelf}: {one.name}": json.loads(one.result.to_json()) | {"search_scores": one.scores} for one in finished
    }
    text = [
        "Scores are macro averages of accuracy on report items, which nothing was searched or selected on, ± standard "
        "error; differences are paired, with 95 % intervals. Trials include the single checkpoints and the uniform "
        "merge. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions(sys.executable, PACKAGES).items())
        + ".",
        "![Best score on search items by trial, and coefficients](recycling.svg)",
    ]
    for shelf in shelves():
        text += sections(shelf, [one for one in finished if one.shelf == shelf])
    write_report("recycling", "Recycling the checkpoints of a run", text, data, folder=options.reports)


def write_studies(folder: Path, num_seeds: int) -> dict[tuple[str, str], Path]:
    """Write each study's file; its output will be the folder of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key, document in studies(num_seeds).items():
        paths[key] = folder / f"{'-'.join(key).replace(',', '').replace(' ', '-')}.yaml"
        paths[key].write_text(dump_yaml(document))
    return paths


def search_scores(result: StudyResult) -> list[tuple[int, float]]:
    """Every trial's score on search items."""
    from remelt_evals.report_tables import read_table

    rows = read_table(result.reports, "trials").to_pylist()
    return [(row["trial_number"], row["score"]) for row in rows if row["score"] is not None]


def sections(shelf: str, finished: list[Finished]) -> list[str]:
    """The tables of one shelf."""
    first = finished[0].result
    baselines = {row.label: row for row in first.rows[:-1]}
    names = list(shelves()[shelf])
    single = max((baselines[name] for name in names), key=lambda row: row.objective)
    uniform = baselines["uniform"]
    rows = [
        ["best single checkpoint", single.label, f"{single.objective:.3f} ± {single.stderr or 0:.3f}", "", "", ""],
        [
            "uniform merge",
            "",
            f"{uniform.objective:.3f} ± {uniform.stderr or 0:.3f}",
            "",
            "",
            "",
        ],
    ]
    for one in finished:
        best = one.result.rows[-1]
        weights = list(one.result.values.values())
        versus: dict[str, Versus] = {each.against: each for each in one.result.versus}
        rows.append(
            [
                one.name,
                one.result.winner,
                f"{best.objective:.3f} ± {best.stderr or 0:.3f}",
                interval(versus["best parent"]),
                interval(versus["uniform"]),
                f"{sum(weight >= SEEN for weight in weights)} of {len(names)}" if weights else "1",
            ]
        )
    return [
        f"## {shelf.capitalize()}: {len(names)} checkpoints, {first.num_trials} trials for each CMA-ES study",
        markdown_table(
            [
                "study",
                "winner",
                "report items",
                "minus the best single",
                "minus uniform",
                f"checkpoints with {SEEN:g} or more",
            ],
            rows,
        ),
        "### Single checkpoints on report items",
        markdown_table(
            ["checkpoint", *(score.ability for score in first.rows[0].abilities), "macro average"],
            [
                [row.label, *(f"{score.value:.3f}" for score in row.abilities), f"{row.objective:.3f}"]
                for row in first.rows[:-1]
            ],
        ),
        "### Coefficients",
        markdown_table(
            ["checkpoint", *(one.name for one in finished)],
            [[name, *(f"{one.result.values.get(f'w_{name}', 0):.3f}" for one in finished)] for name in names],
        ),
    ]


def interval(versus: Versus) -> str:
    macro = versus.comparison.macro
    return f"{macro.difference:+.3f} [{macro.low:+.3f}, {macro.high:+.3f}]"


def draw(finished: list[Finished], path: Path) -> None:
    """Best score so far by trial on the left, coefficients of each winner on the right."""
    import itertools

    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "remelt"
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for (left, right), (shelf, pool) in zip(rows, shelves().items(), strict=True):
        own, names = [one for one in finished if one.shelf == shelf], list(pool)
        for one in own:
            numbers, scores = zip(*sorted(one.scores), strict=True)
            left.plot(numbers, list(itertools.accumulate(scores, max)), label=one.name, linewidth=1.3)
        left.axvline(len(names), color="grey", linestyle=":", linewidth=1)
        left.set(xlabel="trial (left of the line: uniform merge and single checkpoints)", ylabel="best search score")
        left.set_title(shelf)
        left.legend(fontsize=8)
        width = 0.8 / len(own)
        for number, one in enumerate(own):
            places = [place + (number - len(own) / 2 + 0.5) * width for place in range(len(names))]
            right.bar(places, [one.result.values.get(f"w_{name}", 0.0) for name in names], width, label=one.name)
        right.axhline(1 / len(names), color="grey", linestyle=":", linewidth=1)
        right.set_xticks(range(len(names)), names, rotation=70, fontsize=8)
        right.set(ylabel="coefficient (dotted: uniform)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
