"""An evaluator in a child process: lm-eval never runs in a driver.

Driver and child speak over two pipes of their own, each message eight bytes of length and then JSON; the child's
standard output and error, on which lm-eval and its libraries write, go to a file, whose end explains a crash. The child
serves one request at a time and stays warm. It is replaced after an error, a time-out, a number of evaluations, or when
its memory has grown; and it ends when its driver does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import (
    EvalReport,
    EvalRequest,
    HeldCandidate,
    canonical_json,
    report_from_json,
    request_to_json,
)
from remelt_evals.evaluator_child import read_message, write_message

if TYPE_CHECKING:
    from remelt.recipe import Recipe

START_TIMEOUT_SECONDS = 120.0


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: int
    """File descriptor that the driver writes."""
    responses: int
    """File descriptor that the driver reads."""
    log: BinaryIO
    folder: tempfile.TemporaryDirectory[str]
    """Where the child and its libraries put temporary files; removed with it, however it ended."""


class EvaluatorProcess:
    """An `Evaluator` in a child process of its own interpreter; a context manager.

    Use from one thread at a time is enforced by waiting. `evaluate` raises what `Evaluator.evaluate` would, and also
    where the child dies or takes too long; the next call then starts a fresh child.
    """

    def __init__(
        self,
        options: BackendOptions | None = None,
        *,
        interpreter: str | None = None,
        timeout_seconds: float | None = None,
        memory_limit_bytes: int | None = None,
        growth_limit_bytes: int | None = None,
        max_evaluations: int | None = None,
    ) -> None:
        """
        Args:
            options: backend and how it runs.
            interpreter: Python of the environment that evaluates, with remelt installed; this one's by default.
            timeout_seconds: for one evaluation, from request to report; None waits for ever. The first one of a child
                also imports lm-eval and torch, some 7 s.
            memory_limit_bytes: resident memory above which the child is replaced after its report.
            growth_limit_bytes: growth of its resident memory since its first report, above which it is replaced.
            max_evaluations: reports after which it is replaced; 1 gives every checkpoint a fresh process.
        """
        self.options = options or BackendOptions()
        self.interpreter = interpreter or sys.executable
        self.timeout_seconds = timeout_seconds
        self.memory_limit_bytes = memory_limit_bytes
        self.growth_limit_bytes = growth_limit_bytes
        self.max_evaluations = max_evaluations
        self.num_started = 0
        """Children started so far."""
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._num_evaluations = 0
        self._first_memory_bytes: int | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None where none runs."""
        return self._child.process.pid if self._child else None

    def start(self) -> None:
        """Start the child where none runs; `evaluate` does so by itself.

        Raises:
            EvaluationError: the interpreter cannot be started or lacks remelt.
        """
        with self._lock:
            self._start()

    def evaluation_id(self, request: EvalRequest) -> str:
        """The id that `evaluate` will put on its report; asks the child, whose versions count."""
        answer = self._ask("evaluation_id", request, START_TIMEOUT_SECONDS)
        return str(answer["evaluation_id"])

    def evaluate(self, request: EvalRequest) -> EvalReport:
        """Score a checkpoint in the child.

        Raises:
            EvaluationError: as `Evaluator.evaluate`; also where the child died or exceeded `timeout_seconds`.
        """
        answer = self._ask("evaluate", request, self.timeout_seconds)
        return report_from_json(json.dumps(answer["report"]))

    def hold(
        self, recipes: Sequence[Recipe], suite: str, *, memory_bytes: int | None = None, threads: int = 1
    ) -> list[HeldCandidate] | str:
        """Merge candidates into the child's memory, as `Evaluator.hold`; they are gone with the child.

        Raises:
            EvaluationError: one cannot be merged or does not load; also where the child died or exceeded
                `timeout_seconds`.
        """
        message = {
            "kind": "hold",
            "recipes": [recipe.canonical() for recipe in recipes],
            "suite": suite,
            "memory_bytes": memory_bytes,
            "threads": threads,
        }
        what = f"merging {len(recipes)} candidates of {recipes[0].merge_method}"
        answer = self._send(message, what, self.timeout_seconds)
        if answer["kind"] == "not held":
            return str(answer["reason"])
        return [HeldCandidate(**held) for held in answer["held"]]

    def close(self) -> None:
        """End the child at once, whatever it is doing."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._child = None

    def __enter__(self) -> EvaluatorProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, kind: str, request: EvalRequest, timeout_seconds: float | None) -> dict[str, Any]:
        what = f"evaluating {request.checkpoint} on {request.role} items of {request.suite}"
        return self._send({"kind": kind, "request": json.loads(request_to_json(request))}, what, timeout_seconds)

    def _send(self, message: Mapping[str, Any], what: str, timeout_seconds: float | None) -> dict[str, Any]:
        with self._lock:
            child = self._start()
            try:
                write_message(child.requests, message)
                answer = self._receive(child, timeout_seconds)
            except TimeoutError:
                self.close()
                raise EvaluationError(
                    f"{what} took longer than {timeout_seconds:g} s; its process was ended and a fresh one will serve "
                    "the next request. Raise the time-out, or lower the suite's limits"
                ) from None
            except (EOFError, OSError):
                self._report_death(child, what)
            except BaseException:
                # An interrupt in mid-answer leaves the pipe out of step.
                self.close()
                raise
            if answer["kind"] == "error":
                self.close()
                raise EvaluationError(str(answer["message"]))
            if message["kind"] == "evaluate":
                self._num_evaluations += 1
                self._retire_if_grown(int(answer["memory_bytes"]))
            return answer

    def _receive(self, child: _Child, timeout_seconds: float | None) -> dict[str, Any]:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return read_message(child.responses, deadline, is_alive=lambda: child.process.poll() is None)

    def _start(self) -> _Child:
        if self._child is not None and self._child.process.poll() is None:
            return self._child
        self.close()
        child = _spawn(self.interpreter, self.options)
        self._child, self._finalizer = child, weakref.finalize(self, _end, child)
        self.num_started += 1
        self._num_evaluations, self._first_memory_bytes = 0, None
        try:
            answer = self._receive(child, START_TIMEOUT_SECONDS)
        except EOFError:
            self._report_death(child, f"starting an evaluator with {self.interpreter}")
        except TimeoutError:
            self.close()
            raise EvaluationError(f"{self.interpreter} started no evaluator in {START_TIMEOUT_SECONDS:g} s") from None
        except BaseException:
            # Its greeting would be taken for the answer to the next request.
            self.close()
            raise
        if answer["kind"] == "error":
            self.close()
            raise EvaluationError(str(answer["message"]))
        return child

    def _report_death(self, child: _Child, what: str) -> NoReturn:
        if self._child is not child:
            raise EvaluationError(f"the evaluator was closed while {what}")
        try:
            code: int | None = child.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        tail = _log_tail(child.log)
        self.close()
        how = f"ended with status {code}"
        if code is not None and code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-code).name}{hint}"
        words = f"; its last words: {tail}" if tail else ""
        raise EvaluationError(f"the evaluator process {how} while {what}{words}")

    def _retire_if_grown(self, memory_bytes: int) -> None:
        if self._first_memory_bytes is None:
            self._first_memory_bytes = memory_bytes
        growth = memory_bytes - self._first_memory_bytes
        if (
            (self.max_evaluations is not None and self._num_evaluations >= self.max_evaluations)
            or (self.memory_limit_bytes is not None and memory_bytes > self.memory_limit_bytes)
            or (self.growth_limit_bytes is not None and growth > self.growth_limit_bytes)
        ):
            self.close()


def _spawn(interpreter: str, options: BackendOptions) -> _Child:
    request_read, request_write = os.pipe()
    response_read, response_write = os.pipe()
    folder = tempfile.TemporaryDirectory(prefix="remelt-", ignore_cleanup_errors=True)
    log = tempfile.TemporaryFile(dir=folder.name)  # noqa: SIM115 (lives as long as the child)
    arguments = [str(request_read), str(response_write), canonical_json(asdict(options)), folder.name]
    try:
        process = subprocess.Popen(
            [interpreter, "-m", "remelt_evals.evaluator_child", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(request_read, response_write),
            env={**_environment(interpreter), "TMPDIR": folder.name},
            start_new_session=True,
        )
    except OSError as error:
        os.close(request_write)
        os.close(response_read)
        log.close()
        folder.cleanup()
        raise EvaluationError(f"cannot start an evaluator with {interpreter}: {error.strerror}") from error
    finally:
        # The child's ends must be open in the child alone, or its death would not end the stream.
        os.close(request_read)
        os.close(response_write)
    return _Child(process, request_write, response_read, log, folder)


def _environment(interpreter: str) -> Mapping[str, str]:
    """The driver's, with remelt's source folders where it runs from a checkout and the interpreter is the same."""
    import remelt

    roots = [str(Path(str(file)).parents[1]) for file in (remelt.__file__, __file__)]
    if interpreter != sys.executable or any("site-packages" in root for root in roots):
        return os.environ
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*dict.fromkeys(roots), *known])}


def _end(child: _Child) -> None:
    """Kill the child with all that it started, and let go of the pipes."""
    # Its group may outlive it: the workers of a server, say, when the child itself was killed for want of memory.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    for descriptor in (child.requests, child.responses):
        os.close(descriptor)
    child.log.close()
    child.folder.cleanup()


def _log_tail(log: BinaryIO, num_lines: int = 3) -> str:
    """The last lines that the child wrote, as one."""
    size = os.fstat(log.fileno()).st_size
    start = max(0, size - 8192)
    text = os.pread(log.fileno(), size - start, start).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-num_lines:])[-600:]
