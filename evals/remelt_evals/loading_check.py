"""Does transformers load a checkpoint with every tensor in its place?

Loads onto the meta device: names and shapes are matched, no weight is read into memory. transformers 5 converts some
layouts while it loads (the experts of a mixture become one fused tensor), so its own report is asked, not the names on
disk: a missing expert shows up there as a missing fused tensor, or as a failed conversion.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remelt.errors import CheckpointError

# How many names a sentence lists before it only counts.
_LISTED = 5


@dataclass(frozen=True, slots=True)
class LoadingResult:
    """What loading a checkpoint said."""

    architecture: str
    """The class that transformers chose; empty where it chose none."""
    problems: tuple[str, ...]
    """One sentence each; empty means that every key of the model was filled and every key of the files was used."""

    @property
    def is_ok(self) -> bool:
        return not self.problems


def loading_problems(info: Mapping[str, Any]) -> tuple[str, ...]:
    """transformers' loading info (`output_loading_info=True`) as sentences.

    Keys that the model class declares as ignorable (`_keys_to_ignore_on_load_missing` and `_unexpected`) and the
    tied head are already left out of it by transformers.
    """
    problems = []
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        problems.append(f"{_count(missing)} missing and would be left at random: {_listed(missing)}")
    unexpected = sorted(info.get("unexpected_keys", ()))
    if unexpected:
        problems.append(f"{_count(unexpected)} not expected by the model: {_listed(unexpected)}")
    mismatched = sorted(tuple(entry) for entry in info.get("mismatched_keys", ()))
    if mismatched:
        shown = [f"{name} is {_shape(found)}, the model has {_shape(wanted)}" for name, found, wanted in mismatched]
        problems.append(f"{_count(mismatched)} of another shape than the model's: {_listed(shown)}")
    problems.extend(str(message) for message in info.get("error_msgs", ()))
    return tuple(problems)


def check_loading(path: str | Path) -> LoadingResult:
    """Load a checkpoint's names and shapes into the model that its config names, on the meta device.

    Never runs code from the checkpoint's folder. A checkpoint that transformers cannot load is a result with one
    problem, not an error.

    Raises:
        CheckpointError: there is no config.json at `path`.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json, so there is no model to load it into")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with _captured_log() as log:
        try:
            # Mismatches come back as a list, with both shapes, only where they are not to be raised.
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            return LoadingResult("", (_failure(error, log),))
    return LoadingResult(type(model).__name__, loading_problems(info))


def _failure(error: Exception, log: list[str]) -> str:
    """Why loading raised. A failed conversion is explained only in the log, by the tensor that could not be made."""
    failed = sorted(set(re.findall(r"on tensors destined for (\S+?)\.? Ckpt contains", "\n".join(log))))
    if failed:
        return (
            "tensors of the model that cannot be put together, since some of their parts are missing or of another "
            f"shape than their fellows: {_listed(failed)}"
        )
    return f"transformers cannot load it: {' '.join(str(error).split())[:500]}"


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collects transformers' warnings instead of printing them and its progress bars."""
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("transformers")
    before = (logger.handlers[:], logger.level, logger.propagate, transformers_logging.is_progress_bar_enabled())
    logger.handlers, logger.propagate = [Collector()], False
    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield messages
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        if before[3]:
            transformers_logging.enable_progress_bar()


def _count(names: Sequence[object]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
