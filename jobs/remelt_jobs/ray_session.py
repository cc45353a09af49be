"""A connection to Ray: the cluster at RAY_ADDRESS, else one started on the spot; gone again afterwards.

Ray is a guest: what was running before stays as it was, only what was begun here is ended here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from remelt.errors import ExecutionError

START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""For a cluster started on the spot: plans and receipts pass through it, never tensors."""


ANSWER_SECONDS = 10.0
"""For a cluster to take a connection."""


@contextmanager
def ray_session(*, num_cpus: int | None = None, resources: dict[str, float] | None = None) -> Iterator[str]:
    """Be connected to Ray within the block.

    A connection that this process has already is used and left alone. Otherwise the cluster at RAY_ADDRESS is joined,
    and left at the end. Without one, a cluster of this machine is started, and stopped at the end.

    Args:
        num_cpus: CPUs of a cluster started on the spot; by default the cores that this process may use.
        resources: Custom resources of such a cluster.

    Yields:
        `connected`, `joined` or `started`.

    Raises:
        ExecutionError: RAY_ADDRESS is set and no cluster can be joined there.
    """
    # Ray asks for this to be said before its import, or warns about accelerators once for each worker.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield "connected"
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "remelt"}
    address = os.environ.get("RAY_ADDRESS")
    is_main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM)
    if address:
        try:
            _check_answers(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExecutionError(
                f"RAY_ADDRESS is {address}, and no Ray cluster can be joined there ({reason}); start one, correct the "
                "address, or unset it to have a cluster started on this machine"
            ) from error
    else:
        _start(num_cpus or len(os.sched_getaffinity(0)), resources or {}, quiet)
    if is_main:
        # Ray puts a handler of its own in the place of the program's, which ends it with a crash report.
        signal.signal(signal.SIGTERM, on_term)
    try:
        yield "joined" if address else "started"
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise OSError where nothing listens at `host:port`, which Ray itself finds out after twenty minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


def _start(num_cpus: int, resources: dict[str, float], quiet: dict[str, Any]) -> None:
    """Start a cluster of this machine, without a dashboard and without a word to Ray's makers.

    Raises:
        ExecutionError: Ray does not come up, though tried again.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                resources=resources,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        except Exception as error:  # Ray has no class of its own for a node that did not come up in its 30 s
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                reason = " ".join(str(error).split())[:300]
                raise ExecutionError(
                    f"Ray could not be started on this machine, tried {START_ATTEMPTS} times ({reason}); where the "
                    "machine is very busy, wait and run the same command again, or set RAY_ADDRESS to a cluster"
                ) from error
        else:
            return
