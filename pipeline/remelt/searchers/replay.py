"""State that is folded over finished trials, one after the other, and kept between asks.

Keeping it changes no ask: it holds for exactly the trials that it was folded over, which are compared one by one. Where
`seen` begins with other trials, or an objective that compares trials gave one of them a new score, it is folded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from remelt.searchers.spec import Trial, TrialState

State = TypeVar("State")


class Replay(Generic[State]):
    """A fold over finished trials that goes on where the last one ended.

    Args:
        begin: Makes the state before any trial.
        tell: Takes one finished trial into the state. What else is done with a state must not change later tells.
    """

    def __init__(self, begin: Callable[[], State], tell: Callable[[State, Trial], None]) -> None:
        self._begin = begin
        self._tell = tell
        self._told: list[Trial] = []
        self._state: State | None = None

    def after(self, seen: Sequence[Trial]) -> State:
        """The state after the finished trials of `seen`, in their order."""
        finished = [trial for trial in seen if trial.state is not TrialState.RUNNING]
        num_told = len(self._told)
        if self._state is None or self._told != finished[:num_told]:
            self._state, self._told, num_told = self._begin(), [], 0
        for trial in finished[num_told:]:
            self._tell(self._state, trial)
        self._told = finished
        return self._state


class Generations:
    """Which trials make up a generation, for algorithms that learn from one generation at a time.

    A trial belongs to the generation that was open when it was asked for. A generation closes with its first
    `population` complete trials; until then every ask is one more draw of it, so a free evaluator never waits. Failed
    and stopped trials are replaced by such draws, and trials that finish after their generation closed count nowhere.
    """

    def __init__(self, population: int) -> None:
        self.population = population
        self.number = 0
        """Of the open generation."""
        self._members: list[Trial] = []
        self._open_after = [0]

    def tell(self, trial: Trial) -> list[Trial]:
        """Take a finished trial; returns the members of the generation that it closes, else nothing."""
        closed: list[Trial] = []
        if trial.point and trial.score is not None and self._open_after[trial.asked_after] == self.number:
            self._members.append(trial)
        if len(self._members) == self.population:
            closed, self._members = self._members, []
            self.number += 1
        self._open_after.append(self.number)
        return closed


def num_starts(seen: Sequence[Trial]) -> int:
    """Trials that no searcher asked for. They come first, so trial `number` is the searcher's `number - num_starts`."""
    return sum(not trial.point for trial in seen)
