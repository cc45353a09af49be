"""lm-eval's task objects for a suite, and the check that its roles share no item."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from remelt.errors import EvaluationError
from remelt_evals.eval_report import ROLES, Role
from remelt_evals.suite import Suite

FEWSHOT_SEED = 1234


class TaskBuilder:
    """Builds lm-eval tasks, anew for each evaluation: a task object keeps its requests and its few-shot generator."""

    def __init__(self, cache_dir: str) -> None:
        self._cache_dir = cache_dir
        self._manager: Any = None

    def build(self, suite: Suite, role: Role) -> dict[str, Any]:
        """The tasks of a role by name, with the suite's number of shots, not yet run.

        Raises:
            EvaluationError: a name is unknown to lm-eval or is a group, or its items cannot be loaded.
        """
        names = suite.present_names(role)
        specs = [self._local_spec(suite, name) if suite.task_files else name for name in names]
        tasks: dict[str, Any] = {}
        for name, spec in zip(names, specs, strict=True):
            tasks[name] = self._load(suite, name, spec)
        for entry in suite.tasks:
            served = entry.task_name(role)
            if served is None:
                continue
            task = tasks[served]
            if entry.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=entry.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return tasks

    def _local_spec(self, suite: Suite, name: str) -> dict[str, Any]:
        """A task YAML as lm-eval reads it, its data files absolute and its Arrow cache ours."""
        from lm_eval.tasks._yaml_loader import load_yaml

        file = suite.task_files[name]
        config: dict[str, Any] = load_yaml(file.yaml_path)
        if file.data_files is not None:
            kwargs = dict(config["dataset_kwargs"])
            config["dataset_kwargs"] = kwargs | {"data_files": file.data_files, "cache_dir": self._cache_dir}
        return config

    def _load(self, suite: Suite, name: str, spec: str | dict[str, Any]) -> Any:
        if self._manager is None:
            from lm_eval.tasks import TaskManager

            # lm-eval's own tree takes seconds to index; a suite with its own tasks does without.
            self._manager = TaskManager(include_defaults=not suite.task_files)
        try:
            loaded = self._manager.load([spec])
        except (KeyError, ValueError, TypeError, OSError, ImportError) as error:
            raise EvaluationError(
                f"suite {suite.name}: lm-eval cannot load eval task {name}: {' '.join(str(error).split())[:500]}"
            ) from error
        if list(loaded["tasks"]) != [name]:
            raise EvaluationError(
                f"suite {suite.name}: {name} is a group or tag of {len(loaded['tasks'])} lm-eval tasks: "
                "list the tasks themselves, one line each"
            )
        task = loaded["tasks"][name]
        if getattr(task, "UNSAFE_CODE", False) and name not in suite.execute_code:
            raise EvaluationError(
                f"suite {suite.name}: eval task {name} runs code that the model writes, on this machine and with your "
                f"rights. Where that is safe (a container without network, say), allow it by name in {suite.path}: "
                f"execute_code: [{name}]"
            )
        return task


def item_hashes(task: Any) -> list[str]:
    """lm-eval's `doc_hash` of every item of a task."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return [
        hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))
        for doc in task.eval_docs
    ]


def check_disjoint(suite: Suite, hashes: Mapping[Role, Mapping[str, Sequence[str]]]) -> tuple[str, ...]:
    """What is to be said of items that two roles share; empty where they share none.

    Args:
        hashes: for each role, the item hashes of each of its eval tasks.

    Raises:
        EvaluationError: they share items and the suite does not say `allow_overlap: true`.
    """
    notes = []
    for first, second in combinations((role for role in ROLES if role in hashes), 2):
        for name, items in hashes[first].items():
            for other, other_items in hashes[second].items():
                shared = set(items) & set(other_items)
                if shared:
                    notes.append(
                        f"{first} and {second} share {len(shared)} items "
                        f"({len(set(items))} in {name}, {len(set(other_items))} in {other})"
                    )
    if notes and not suite.allow_overlap:
        raise EvaluationError(
            f"suite {suite.name}: {'; '.join(notes)}. A number reported on items that were optimised says nothing: "
            "take other items, or say 'allow_overlap: true', which every report will then repeat"
        )
    return tuple(notes)


def allow_code(suite: Suite) -> None:
    """Let the metrics that run code do so, or not; they ask on their own, beside lm-eval, each time.

    Which eval tasks may is checked as they are built.
    """
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if suite.execute_code else "0"


def prepare_environment(cache_dir: str, *, offline: bool) -> None:
    """Set what lm-eval and its libraries read from the environment; call it before they are imported.

    No network for local suites; no process pool for standard errors (lm-eval forks one for each CPU); its request
    cache, which is never used, away from its default place inside the installed package.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"
    os.environ["LM_HARNESS_CACHE_PATH"] = str(Path(cache_dir) / "requests")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.environ["HF_DATASETS_CACHE"] = cache_dir
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
