"""Scores the zoo's checkpoints with lm-eval alone: `python -m benchmarks.zoo.score [--role report] [CHECKPOINT ...]`.

Prints the table of the zoo's README. It reads the item files, never the corpus or a seed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ZOO_DIR = Path(__file__).resolve().parents[2] / "evals" / "remelt_evals" / "zoo"
ABILITIES = ("prose", "python", "arithmetic", "strings")


def load_tasks(suite_name: str, role: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return {lm-eval task: (metric, its configuration with absolute data files)} of a suite file."""
    suite = yaml.safe_load((ZOO_DIR / suite_name).read_text())
    tasks = {}
    for line in suite["tasks"]:
        path = ZOO_DIR / suite["tasks_dir"] / f"{line[role]}.yaml"
        config = yaml.safe_load(path.read_text())
        data_files = config["dataset_kwargs"]["data_files"]
        data_files["test"] = str((path.parent / data_files["test"]).resolve())
        tasks[line[role]] = (line["metric"], config)
    return tasks


def score_checkpoint(folder: Path, role: str) -> tuple[list[float], float]:
    """Return accuracies, their mean and bits per byte of one checkpoint, and the seconds that it took."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    model = HFLM(pretrained=str(folder), dtype="auto", device="cpu", batch_size=64)
    manager = TaskManager(include_defaults=False)
    started = time.monotonic()
    scores: list[float] = []
    for suite_name in ("suite.yaml", "bits.yaml"):
        tasks = load_tasks(suite_name, role)
        configs = [config for _, config in tasks.values()]
        found = simple_evaluate(model, tasks=configs, task_manager=manager, bootstrap_iters=0)["results"]
        scores += [found[name][f"{metric},none"] for name, (metric, _) in tasks.items()]
        if suite_name == "suite.yaml":
            scores.append(sum(scores) / len(scores))
    return scores, time.monotonic() - started


def main() -> None:
    """Print a Markdown table of every checkpoint, or of those named."""
    parser = argparse.ArgumentParser(description="Score checkpoints of the zoo.")
    parser.add_argument("checkpoints", nargs="*", help="folders inside the zoo; all by default")
    parser.add_argument("--role", choices=("search", "selection", "report"), default="report")
    arguments = parser.parse_args()
    everything = sorted(path.parent.relative_to(ZOO_DIR).as_posix() for path in ZOO_DIR.rglob("model.safetensors"))
    print(
        "| checkpoint | prose | python | arithmetic | strings | mean | prose bits/byte | python bits/byte | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.checkpoints or everything:
        scores, seconds = score_checkpoint(ZOO_DIR / name, arguments.role)
        print(f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + f" | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    # Everything is on disk, and neither the caller's caches nor the network should be touched.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=tempfile.mkdtemp(), DISABLE_MULTIPROC="1")
    main()
