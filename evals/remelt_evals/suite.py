"""A suite: which lm-eval tasks measure which abilities, and on which items a search may look.

    name: zoo
    tasks_dir: tasks                  # folder of lm-eval task YAMLs beside this file; without it, lm-eval's own tasks
    batch_size: 16
    num_fewshot: 0
    tasks:
      - {ability: arithmetic, metric: acc, search: sums_search, selection: sums_selection, report: sums_report}
      - {ability: prose, metric: bits_per_byte, weight: 0.5, search: prose_search, report: prose_report, limit: 200}

    execute_code: [python_search]     # eval tasks that may run code which the model writes; none without this

Task folders are code (templates, `!function` tags): use only those that you trust. Paths of data files in a task's
`dataset_kwargs` are relative to the YAML file that says them. Reading a suite imports neither lm-eval nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from remelt.errors import EvaluationError
from remelt.strict_config import Section, load_yaml, suggestion
from remelt_evals.eval_report import ROLES, Role, canonical_json
from remelt_evals.task_files import TaskFile, find_task_files

_SUITE_KEYS = ("name", "tasks_dir", "tasks", "batch_size", "num_fewshot", "allow_overlap", "execute_code")
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
class Suite:
    """A suite as read from its file, every local file hashed."""

    name: str
    path: str
    tasks: tuple[SuiteTask, ...]
    batch_size: int
    allow_overlap: bool
    execute_code: tuple[str, ...]
    """lm-eval tasks that may run code which the model writes."""
    task_files: Mapping[str, TaskFile]
    """By lm-eval task name; empty where the suite uses lm-eval's own tasks (no `tasks_dir`)."""
    digest: str
    """sha256 of the canonical content and of the hashes of task YAMLs and data files; holds no absolute path."""

    def part(self, entries: Sequence[int]) -> Suite:
        """The suite with some of its tasks only; identity and files are those of the whole.

        Raises:
            EvaluationError: it has no such entry.
        """
        if not entries or not all(0 <= place < len(self.tasks) for place in entries):
            raise EvaluationError(f"suite {self.name} has {len(self.tasks)} entries, {list(entries)} were asked for")
        return replace(self, tasks=tuple(self.tasks[place] for place in entries))

    @property
    def is_local(self) -> bool:
        """Whether its tasks and their items lie on disk, so that nothing is fetched."""
        return bool(self.task_files) and all(file.data_files is not None for file in self.task_files.values())

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
        return self.present_names(role)

    def present_names(self, role: Role) -> tuple[str, ...]:
        """The lm-eval tasks that serve a role, whether or not every line of the suite has one."""
        return tuple(dict.fromkeys(name for task in self.tasks if (name := task.task_name(role))))


def load_suite(path: str | Path) -> Suite:
    """Read a suite, find its local tasks, and hash every file that decides its items.

    Raises:
        EvaluationError: a key, value or file is not as it must be; the message names the file, the place in it and,
            for an unknown key, the nearest valid one.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"there is no suite at {path}: give the path of its YAML file")
    section = Section(load_yaml(path, error=EvaluationError), str(path), error=EvaluationError)
    section.allow(_SUITE_KEYS)
    if not section.items("tasks"):
        section.refuse("expected a list with at least one entry", "tasks")
    tasks = tuple(
        _read_task(entry, _optional_integer(section, "num_fewshot", 0)) for entry in section.sections("tasks")
    )
    name = section.text("name")
    batch_size = section.integer("batch_size", 1, low=1)
    allow_overlap = section.flag("allow_overlap", False)
    _check_consistent(path, tasks, allow_overlap)
    execute_code = _read_execute_code(section, tasks)
    task_files: Mapping[str, TaskFile] = {}
    if section.has("tasks_dir"):
        served = sorted({each for task in tasks for role in ROLES if (each := task.task_name(role))})
        task_files = find_task_files(path.parent / section.text("tasks_dir"), served, root=path.parent)
    content = {
        "name": name,
        "tasks": [asdict(task) for task in tasks],
        "batch_size": batch_size,
        "allow_overlap": allow_overlap,
        "files": sorted({pair for file in task_files.values() for pair in file.file_digests}),
    }
    if execute_code:
        content["execute_code"] = execute_code
    return Suite(
        name=name,
        path=str(path.resolve()),
        tasks=tasks,
        batch_size=batch_size,
        allow_overlap=allow_overlap,
        execute_code=execute_code,
        task_files=task_files,
        digest=hashlib.sha256(canonical_json(content).encode()).hexdigest(),
    )


def _read_task(section: Section, num_fewshot: int | None) -> SuiteTask:
    section.allow(_TASK_KEYS)
    names = {role: section.text(role) if section.has(role) else None for role in ROLES}
    if not any(names.values()):
        section.refuse(f"names no lm-eval task: give it at least one of {', '.join(ROLES)}")
    weight = section.number("weight", 1.0, low=0.0)
    if weight == 0:
        section.refuse("0 leaves the task out of the objective: remove its line, or give a number above 0", "weight")
    fewshot = _optional_integer(section, "num_fewshot", 0)
    return SuiteTask(
        ability=section.text("ability"),
        metric=section.text("metric"),
        weight=weight,
        search=names["search"],
        selection=names["selection"],
        report=names["report"],
        num_fewshot=num_fewshot if fewshot is None else fewshot,
        limit=_optional_integer(section, "limit", 1),
    )


def _read_execute_code(section: Section, tasks: tuple[SuiteTask, ...]) -> tuple[str, ...]:
    known = {name for task in tasks for role in ROLES if (name := task.task_name(role))}
    names = section.items("execute_code") if section.has("execute_code") else ()
    for name in names:
        if not isinstance(name, str) or name not in known:
            section.refuse(f"the suite runs no lm-eval task {name!r}; {suggestion(str(name), known)}", "execute_code")
    return tuple(sorted(names))


def _optional_integer(section: Section, key: str, low: int) -> int | None:
    return section.integer(key, low=low) if section.has(key) else None


def _check_consistent(path: Path, tasks: tuple[SuiteTask, ...], allow_overlap: bool) -> None:
    """One lm-eval task runs once in a role, with one number of shots and one limit, and serves one role."""
    roles: dict[str, Role] = {}
    for role in ROLES:
        settings: dict[str, SuiteTask] = {}
        for task in tasks:
            served = task.task_name(role)
            if served is None:
                continue
            first = settings.setdefault(served, task)
            if (first.num_fewshot, first.limit) != (task.num_fewshot, task.limit):
                raise EvaluationError(
                    f"{path}: lm-eval task {served} is listed for {first.ability} and {task.ability} with different "
                    "num_fewshot or limit: give both the same"
                )
            other = roles.setdefault(served, role)
            if other != role and not allow_overlap:
                raise EvaluationError(
                    f"{path}: lm-eval task {served} serves {other} and {role}, so a number would be reported on items "
                    "that were optimised: name different tasks, or say 'allow_overlap: true'"
                )
