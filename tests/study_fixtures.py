"""A suite whose items a dummy can answer, and study files over small parents, for tests of the study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABILITIES = ("sums", "words")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_suite(folder: Path) -> Path:
    """Two abilities, each with twenty items of its own for every role; returns the suite's file."""
    (folder / "tasks").mkdir(parents=True)
    for ability in ABILITIES:
        for first, role in enumerate(("search", "selection", "report")):
            name = f"{ability}_{role}"
            items = [
                {"question": f"{ability} {first * 100 + k}:", "choices": ["a", "b"], "label": k % 2} for k in range(20)
            ]
            (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
            (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name))
    tasks = "".join(
        f"  - {{ability: {ability}, metric: acc, search: {ability}_search, selection: {ability}_selection, "
        f"report: {ability}_report}}\n"
        for ability in ABILITIES
    )
    path = folder / "suite.yaml"
    path.write_text(f"name: tiny\ntasks_dir: tasks\nbatch_size: 4\nnum_fewshot: 0\ntasks:\n{tasks}")
    return path


def make_document(parents: Mapping[str, Path], suite: Path, **changes: Any) -> dict[str, Any]:
    """A study over the weights of the parents on a simplex, answered by the dummy; `changes` replace its keys."""
    names = [name for name in parents if name != "base"]
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(parents[name]), "name": name, "parameters": {"weight": {"search": [0, 1], "as": f"w_{name}"}}}
            for name in names
        ],
        "constraints": {"simplex": [f"w_{name}" for name in names]},
    }
    return {
        "recipe": recipe,
        "suite": str(suite),
        "searcher": {"name": "cmaes", "population": 4},
        "budget": {"trials": 10},
        "evaluators": {"count": 2, "cpus": 1},
        "backend": {"name": "dummy"},
        "finalists": 2,
        **changes,
    }
