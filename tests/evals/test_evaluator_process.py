"""The evaluator process: warm, replaced after every kind of failure, and gone when its driver goes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalRequest
from remelt_evals.evaluator_child import read_message, write_message
from remelt_evals.evaluator_process import EvaluatorProcess

DUMMY = BackendOptions(name="dummy")


@pytest.fixture(scope="module")
def warm() -> Iterator[EvaluatorProcess]:
    with EvaluatorProcess(DUMMY) as process:
        yield process


def request(suite_path: Path, digest: str = "a") -> EvalRequest:
    return EvalRequest(checkpoint="nowhere", digest=digest, suite=str(suite_path), role="search")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_one_child_serves_many_requests_and_the_driver_keeps_its_generators(
    warm: EvaluatorProcess, suite_path: Path
) -> None:
    random.seed(5)
    np.random.seed(5)
    first = warm.evaluate(request(suite_path))
    pid = warm.pid
    second = warm.evaluate(request(suite_path))
    assert warm.pid == pid
    assert [task.value for task in first.tasks] == [task.value for task in second.tasks]
    drawn = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    assert drawn == (random.random(), np.random.rand())


def test_what_libraries_print_does_not_reach_the_protocol(
    warm: EvaluatorProcess, make_suite: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = make_suite()
    tasks = path.parent / "tasks"
    (tasks / "noise.py").write_text(
        "import os\n\ndef keep(docs):\n    print('noise' * 9999, flush=True)\n    os.write(2, b'noise')\n"
        "    return docs\n"
    )
    with (tasks / "words_search.yaml").open("a") as file:
        file.write("process_docs: !function noise.keep\n")
    assert warm.evaluate(request(path)).is_ok
    assert capfd.readouterr() == ("", "")


def test_the_child_and_the_evaluator_agree_on_the_evaluation_id(warm: EvaluatorProcess, suite_path: Path) -> None:
    asked = warm.evaluation_id(request(suite_path))
    assert asked == warm.evaluate(request(suite_path)).evaluation_id
    assert asked != warm.evaluation_id(request(suite_path, digest="b"))


def test_an_error_is_told_in_its_own_words_and_a_fresh_child_serves_on(
    warm: EvaluatorProcess, suite_path: Path
) -> None:
    warm.evaluate(request(suite_path))
    pid = warm.pid
    with pytest.raises(EvaluationError, match="there is no suite at"):
        warm.evaluate(request(suite_path.parent / "absent.yaml"))
    assert warm.evaluate(request(suite_path)).is_ok
    assert warm.pid != pid


def test_a_killed_child_is_named_and_replaced(warm: EvaluatorProcess, suite_path: Path) -> None:
    warm.start()
    pid = warm.pid
    assert pid is not None
    # Stopped first, so that the kill surely lands before an answer.
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(EvaluationError, match=r"killed by SIGKILL \(out of memory\?\) while evaluating nowhere"):
        warm.evaluate(request(suite_path))
    killer.join()
    assert warm.evaluate(request(suite_path)).is_ok
    assert warm.pid != pid


def test_a_time_out_ends_the_child(suite_path: Path) -> None:
    with EvaluatorProcess(DUMMY, timeout_seconds=0.3) as process:
        process.start()
        pid = process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EvaluationError, match=r"took longer than 0\.3 s"):
            process.evaluate(request(suite_path))
        assert not is_alive(pid)
        assert process.pid is None


@pytest.mark.parametrize("limit", ["max_evaluations", "memory_limit_bytes", "growth_limit_bytes"])
def test_a_child_over_a_limit_is_replaced_after_its_report(
    limit: str, warm: EvaluatorProcess, suite_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.evaluate(request(suite_path))
    pid = warm.pid
    monkeypatch.setattr(warm, limit, -1 << 40 if limit == "growth_limit_bytes" else 1)
    assert warm.evaluate(request(suite_path)).is_ok
    assert warm.pid is None
    warm.start()
    assert warm.pid != pid


def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot start an evaluator with .*No such file"):
        EvaluatorProcess(DUMMY, interpreter=str(tmp_path / "python")).start()
    with pytest.raises(EvaluationError, match="ended with status 1 while starting"):
        EvaluatorProcess(DUMMY, interpreter="/bin/false").start()
    with pytest.raises(EvaluationError, match="no eval backend is called 'vlm'"):
        EvaluatorProcess(BackendOptions(name="vlm")).start()


def test_what_a_child_puts_on_disk_goes_with_it(
    suite_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with EvaluatorProcess(DUMMY) as process:
        process.evaluate(request(suite_path))
        (folder,) = tmp_path.iterdir()
        assert any(folder.iterdir()), "libraries of the child put their files there"
    assert not list(tmp_path.iterdir())


def test_an_end_is_noticed_though_something_holds_the_pipe() -> None:
    reading, writing = os.pipe()
    try:
        write_message(writing, {"kind": "last words"})
        assert read_message(reading, is_alive=lambda: False) == {"kind": "last words"}
        with pytest.raises(EOFError):
            read_message(reading, is_alive=lambda: False)
    finally:
        os.close(reading)
        os.close(writing)


def test_no_child_outlives_its_driver(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from remelt_evals.evaluator_process import EvaluatorProcess\n"
        "from remelt_evals.backends import BackendOptions\n"
        "process = EvaluatorProcess(BackendOptions(name='dummy'))\n"
        "process.start()\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    driver = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        check=False,
        env={**driver_environment(), "TMPDIR": str(tmp_path)},
    )
    assert wait_until_dead(int(driver.stdout))
    assert not list(tmp_path.iterdir())


def test_a_driver_never_imports_lm_eval(suite_path: Path) -> None:
    script = (
        "import sys\n"
        "from remelt_evals.evaluator_process import EvaluatorProcess\n"
        "from remelt_evals.backends import BackendOptions\n"
        "from remelt_evals.eval_report import EvalRequest\n"
        "from remelt_evals.suite import load_suite\n"
        f"load_suite({str(suite_path)!r})\n"
        f"request = EvalRequest(checkpoint='x', digest='d', suite={str(suite_path)!r}, role='search')\n"
        "with EvaluatorProcess(BackendOptions(name='dummy')) as process:\n"
        "    process.evaluate(request)\n"
        "print(sorted({'lm_eval', 'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    driver = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, env=driver_environment()
    )
    assert driver.stdout.decode().strip() == "[]"


def driver_environment() -> dict[str, str]:
    import remelt
    import remelt_evals

    roots = [str(Path(str(module.__file__)).parents[1]) for module in (remelt, remelt_evals)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
