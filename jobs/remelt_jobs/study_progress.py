"""Where a study stands, for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["start", "search", "selection", "publication", "report"]


@dataclass(frozen=True, slots=True)
class StudyProgress:
    """One step of a study."""

    phase: Phase
    num_done: int
    """Pieces of work of this phase that are finished."""
    num_total: int
    best_label: str | None
    best_score: float | None
    """On search items."""
    eta_seconds: float | None
    """Until the end of the phase; None before its first piece of work has finished."""
    last: str
    """What just happened, in words; what begins, where the phase is `start`, which counts nothing."""


def starting(what: str) -> StudyProgress:
    """The step that says what is begun before the first piece of work can be."""
    return StudyProgress("start", 0, 0, None, None, None, what)


OnProgress = Callable[[StudyProgress], None]


class Watch:
    """Expects the pace so far to go on; what a driver before us did is not counted."""

    def __init__(self, num_before: int) -> None:
        self._num_before, self._started = num_before, time.monotonic()

    def eta_seconds(self, num_done: int, num_total: int) -> float | None:
        if num_done <= self._num_before:
            return None
        pace = (time.monotonic() - self._started) / (num_done - self._num_before)
        return pace * (num_total - num_done)
