"""Local lm-eval tasks: find the YAML of each by name, make its data files absolute, hash all that decides its items.

Reads what lm-eval reads (`include`, `!function` as plain text) without importing it: a driver that only needs a suite's
digest does not pay for lm-eval.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remelt.errors import EvaluationError
from remelt.fingerprints import file_sha256
from remelt.strict_config import kind_of, suggestion


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """Where a local lm-eval task is defined, and the files that decide its items."""

    yaml_path: str
    data_files: Any
    """`data_files` of its `dataset_kwargs` with absolute paths: a string, or lists and mappings of them; or None."""
    file_digests: tuple[tuple[str, str], ...]
    """(path relative to the suite's folder, sha256) of the YAML, its includes, Python beside them, and data files."""


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a task YAML, read as lm-eval reads it, except that `!function` tags stay text."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe loading that does not import what `!function` names."""

    Loader.add_constructor("!function", lambda _, node: f"!function {node.value}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path}: expected a mapping of keys to values, found {kind_of(content)}")
    return content


def find_task_files(tasks_dir: Path, names: Sequence[str], *, root: Path) -> dict[str, TaskFile]:
    """The definition of each named task under `tasks_dir`.

    Args:
        tasks_dir: folder of lm-eval task YAMLs, searched with its subfolders.
        names: lm-eval task names.
        root: folder that the paths in the digests are relative to.

    Raises:
        EvaluationError: a task or one of its data files does not exist, or two YAMLs give one name.
    """
    if not tasks_dir.is_dir():
        raise EvaluationError(f"tasks_dir {tasks_dir} is no folder: it holds the suite's lm-eval task YAMLs")
    found: dict[str, Path] = {}
    for path in sorted(tasks_dir.rglob("*.yaml")):
        name = _read_yaml(path).get("task")
        if not isinstance(name, str):
            continue
        if name in found and name in names:
            raise EvaluationError(f"lm-eval task {name} is defined twice: {found[name]} and {path}")
        found[name] = path
    for name in names:
        if name not in found:
            raise EvaluationError(f"{tasks_dir} defines no lm-eval task {name!r}; {suggestion(name, found)}")
    return {name: _describe(found[name], root) for name in names}


def _describe(path: Path, root: Path) -> TaskFile:
    chain = list(_include_chain(path, ()))
    data_files: Any = None
    uses_python = False
    # lm-eval lets the including file win, key by key; the chain has it first.
    for source, content in reversed(chain):
        uses_python = uses_python or "!function" in source.read_text(encoding="utf-8")
        kwargs = content.get("dataset_kwargs")
        if isinstance(kwargs, dict):
            data_files = _absolute(kwargs.get("data_files"), source.parent)
    files = {source for source, _ in chain} | set(_existing(data_files, path))
    if uses_python:
        files |= {script for source, _ in chain for script in source.parent.glob("*.py")}
    digests = sorted((Path(os.path.relpath(file, root)).as_posix(), file_sha256(file)) for file in files)
    return TaskFile(yaml_path=str(path.resolve()), data_files=data_files, file_digests=tuple(digests))


def _include_chain(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, content) of a task YAML and of what it includes, the winner first."""
    path = path.resolve()
    if path in parents:
        raise EvaluationError(f"{path} includes itself")
    if not path.is_file():
        raise EvaluationError(f"{parents[-1]} includes {path}, which does not exist")
    content = _read_yaml(path)
    yield path, content
    includes = content.get("include", [])
    for include in reversed(includes if isinstance(includes, list) else [includes]):
        yield from _include_chain(path.parent / str(include), (*parents, path))


def _absolute(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, str):
        return data_files if "://" in data_files else os.path.normpath(folder.resolve() / data_files)
    if isinstance(data_files, list):
        return [_absolute(item, folder) for item in data_files]
    if isinstance(data_files, Mapping):
        return {str(key): _absolute(item, folder) for key, item in data_files.items()}
    return None


def _existing(data_files: Any, task: Path) -> Iterator[Path]:
    """Every local file that the patterns name."""
    if isinstance(data_files, Mapping):
        data_files = list(data_files.values())
    if isinstance(data_files, list):
        for item in data_files:
            yield from _existing(item, task)
    elif isinstance(data_files, str) and "://" not in data_files:
        pattern = Path(data_files)
        matches = [pattern] if pattern.is_file() else sorted(Path(pattern.anchor).glob(str(pattern)[1:]))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise EvaluationError(f"{task} names the data file {data_files}, which does not exist")
        yield from files
