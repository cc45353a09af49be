"""Programs that are killed with SIGKILL at random moments of their work."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np


def kill_rounds(
    imports: str, work: str, arguments: Sequence[object], rounds: int, longest: float, rng: np.random.Generator
) -> int:
    """Run `work` in a process of its own and kill it within `longest` seconds, again and again.

    The clock starts when the `imports` are done. Returns how often it was still running.
    """
    script = f"import sys; {imports}; print('ready', flush=True); sys.stdin.readline(); {work}"
    killed = 0
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(float(rng.uniform(0, longest)))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return killed
