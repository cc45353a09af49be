"""The `remelt` command in the process of the tests, with a count of its reads of tensor data."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import pytest

from remelt_jobs import cli


class Run(NamedTuple):
    """What a command gave."""

    status: int
    out: str
    err: str
    num_reads: int = 0
    """Reads of tensor data."""


class Command:
    """Calls the entry point of the console script; nothing is patched but the count around `os.preadv`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> Run:
        """Run `remelt ARGUMENTS`."""
        reads: list[int] = []
        preadv = os.preadv

        def counted(descriptor: int, buffers: Any, offset: int) -> int:
            reads.append(offset)
            return preadv(descriptor, buffers, offset)

        with self._monkeypatch.context() as patch:
            patch.setattr(os, "preadv", counted)
            patch.setattr(sys, "argv", ["remelt", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
        out, err = self._capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Run(stop.value.code, out, err, len(reads))


def the_line(run: Run, *, was_begun: bool = False) -> str:
    """The one line of a refusal, without its beginning; notes may stand before it where the merge had begun."""
    assert run.status == 2, run
    assert run.out == ""
    lines = [line for line in run.err.splitlines() if not (was_begun and line.startswith("note: "))]
    assert len(lines) == 1, run.err
    assert lines[0].startswith("remelt: ")
    return lines[0].removeprefix("remelt: ")
