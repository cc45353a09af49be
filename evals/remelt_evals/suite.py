"""A suite: which lm-eval tasks measure which abilities, and on which items a search may look.

    name: zoo
    tasks_dir: tasks                  # folder of lm-eval task YAMLs beside this file; without it, lm-eval's own tasks
    batch_size: 16
    num_fewshot: 0
    tasks:
      - {ability: arithmetic, metric: acc, search: sums_search, selection: sums_selection, report: sums_report}
      - {ability: prose, metric: bits_per_byte, weight: 0.5, search: prose_search, report: prose_report, limit: 200}

Task folders are code (templates, `!function` tags): use only those that you trust. Paths of data files in a task's
`dataset_kwargs` are relative to the YAML file that says them. Reading a suite imports neither lm-eval nor torch.
"""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remelt.errors import EvaluationError
from remelt_evals.eval_report import ROLES, Role, canonical_json

_SUITE_KEYS = ("name", "tasks_dir", "tasks", "batch_size", "num_fewshot", "allow_overlap")
_TASK_KEYS = ("ability", "metric", "weight", *ROLES, "num_fewshot", "limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteTask:
    """One line of a suite: an ability, how it is measured, and the lm-eval task for each role."""

    ability: str
    metric: str
    """lm-eval's metric, or `metric,filter` where the eval task has several filters."""
    weight: float
    search: str | None
    selection: str | None
    report: str | None
    num_fewshot: int | None
    """None leaves it to the eval task's YAML."""
    limit: int | None
    """At most this many items, the first ones."""

    def task_name(self, role: Role) -> str | None:
        """The lm-eval task that serves `role`."""
        return {"search": self.search, "selection": self.selection, "report": self.report}[role]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """Where a local lm-eval task is defined, and the files that decide its items."""

    yaml_path: str
    data_files: Any
    """`data_files` of its `dataset_kwargs` with absolute paths: a string, or lists and mappings of them; or None."""
    file_digests: tuple[tuple[str, str], ...]
    """(path relative to the suite's file, sha256) of YAML files, their includes, Python files and data files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite as read from its file, every local file hashed."""

    name: str
    path: str
    tasks: tuple[SuiteTask, ...]
    batch_size: int
    allow_overlap: bool
    task_files: Mapping[str, TaskFile]
    """By lm-eval task name; empty where the suite uses lm-eval's own tasks."""
    digest: str
    """sha256 of the canonical content and the hashes of task YAMLs and data files; no path outside the suite's folder."""

    @property
    def is_local(self) -> bool:
        """Whether its tasks lie beside it, so that nothing is fetched."""
        return bool(self.task_files)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that every one of its tasks can serve."""
        return tuple(role for role in ROLES if all(task.task_name(role) for task in self.tasks))

    def task_names(self, role: Role) -> tuple[str, ...]:
        """The lm-eval tasks of a role, each once, in the suite's order.

        Raises:
            EvaluationError: a task of the suite names none for this role.
        """
        lacking = [task.ability for task in self.tasks if not task.task_name(role)]
        if lacking:
            raise EvaluationError(
                f"suite {self.name} has no {role} items for {', '.join(lacking)}: "
                f"add '{role}: <lm-eval task>' to them in {self.path}, or ask for one of: {', '.join(self.roles)}"
            )
        return tuple(dict.fromkeys(name for task in self.tasks if (name := task.task_name(role))))
