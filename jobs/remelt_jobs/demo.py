"""The whole loop on the checkpoints that come with remelt: four specialists in, one merge better than each out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from remelt.strict_config import dump_yaml
from remelt_evals import zoo
from remelt_jobs.progress import human_seconds
from remelt_jobs.study import run_study
from remelt_jobs.study_config import ZOO, load_study
from remelt_jobs.study_progress import OnProgress
from remelt_jobs.study_report import TerminalStudyProgress, print_result, study_files
from remelt_jobs.study_result import StudyResult

NUM_TRIALS = 48
"""The uniform merge, four parents, and five generations of CMA-ES."""

MAX_EVALUATORS = 4


def demo_study(seed: int = 0, num_trials: int = NUM_TRIALS, num_evaluators: int | None = None) -> dict[str, Any]:
    """The demo's study file: how much of each specialist's task vector goes on the base.

    Args:
        seed: Of the searcher.
        num_evaluators: By default one for each core that this process may use, four at most.
    """
    parents = zoo.parents()
    # The search starts at the uniform merge, as the recycling paper's does.
    weight = {"search": [0.0, 1.0], "init": 1 / len(parents)}
    models = [
        {"model": str(path), "name": name, "parameters": {"weight": {**weight, "as": f"w_{name}"}}}
        for name, path in parents.items()
    ]
    count = num_evaluators or min(MAX_EVALUATORS, len(os.sched_getaffinity(0)))
    return {
        "recipe": {"merge_method": "task_arithmetic", "base_model": str(zoo.base()), "models": models},
        "suite": ZOO,
        "searcher": "cmaes",
        "objective": "macro mean",
        "budget": {"trials": num_trials},
        "evaluators": {"count": count, "cpus": 1, "memory": "1GB"},
        "seed": seed,
    }


def run_demo(output: Path = Path("remelt-demo"), *, progress: OnProgress | None = None) -> StudyResult:
    """Search a merge of the zoo's specialists in `output`, print the table, and name the files.

    Run it again to see the result again; a demo that was stopped goes on.

    Raises:
        StudyError: `output` holds something else.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    study_path = output / "study.yaml"
    if not study_path.exists():
        study_path.write_text(dump_yaml(demo_study()))
    config = load_study(study_path)
    print(
        f"Merging {', '.join(zoo.ABILITIES)}: four fine-tunes of one small Llama, {config.budget.trials} trials on "
        f"{config.evaluators.count} evaluators",
        flush=True,
    )
    with TerminalStudyProgress() as shown:
        result = run_study(config, output, progress=progress or shown)
    print_result(result)
    took = "finished before" if result.is_reused else f"in {human_seconds(time.monotonic() - started)}"
    print(f"{took}; files:")
    for path, what in [(str(study_path), "the study; edit its budget and run the demo again"), *study_files(result)]:
        print(f"  {path}  {what}")
    return result
