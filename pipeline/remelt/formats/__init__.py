"""Checkpoint formats: one explicit table, and `open_checkpoint`, which turns a source into its byte table.

A format says from file names whether a folder is its own, and indexes it from metadata. Reading is the range reader's,
for all formats alike. Others add theirs under the entry point group `remelt.formats`, as a `CheckpointFormat`; the
table's own come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from remelt.checkpoint import CheckpointIndex
from remelt.errors import CheckpointError
from remelt.formats.pickled import recognise_unread
from remelt.formats.safetensors_index import index_safetensors, is_safetensors
from remelt.hub import resolve_source

ENTRY_POINTS = "remelt.formats"


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """One way of keeping a checkpoint on disk."""

    name: str
    matches: Callable[[frozenset[str]], bool]
    """Whether a folder with these names of files is of this format."""
    index: Callable[[str, Path], CheckpointIndex]
    """(source as written, folder) -> byte table, from metadata alone; raises CheckpointError."""


FORMATS: dict[str, CheckpointFormat] = {
    "safetensors": CheckpointFormat("safetensors", is_safetensors, index_safetensors),
}
"""In the order of choice, where a folder holds more than one."""


def open_checkpoint(source: str, *, cache_dir: str | None = None, local_files_only: bool = False) -> CheckpointIndex:
    """Index a checkpoint from its metadata: names, dtypes, shapes and where each byte lies.

    Args:
        source: a path if it exists or starts with ".", "/" or "~", else a Hub id `org/name[@revision]`.
        cache_dir: the Hub's cache, where not the default.
        local_files_only: do not ask the Hub for what the cache lacks.

    Raises:
        CheckpointError: it does not exist, is damaged or hostile, quantised in an unknown way, or of a format that is
            not read; the message says what to do.
    """
    root = resolve_source(source, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        names = frozenset(path.name for path in root.iterdir())
    except OSError as error:
        raise CheckpointError(f"checkpoint {source}: {root} cannot be listed: {error.strerror}") from error
    for checkpoint_format in _formats():
        if checkpoint_format.matches(names):
            return checkpoint_format.index(source, root)
    unread = recognise_unread(names)
    if unread:
        raise CheckpointError(f"checkpoint {source}: found {unread.kind}: {unread.advice}")
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    raise CheckpointError(
        f"checkpoint {source}: no model.safetensors and no model.safetensors.index.json in {root}; found {shown}; "
        "name the folder that holds the weights"
    )


def _formats() -> Iterator[CheckpointFormat]:
    yield from FORMATS.values()
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINTS):
        yield entry_point.load()
