"""The child's side of an evaluator process: answers the driver's requests over two pipes, until the driver is gone.

A message is eight bytes of length and then JSON, in both directions.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.errors import RemeltError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import canonical_json, report_to_json, request_from_json

if TYPE_CHECKING:
    from remelt_evals.evaluator import Evaluator

_LENGTH = struct.Struct(">Q")
LIVENESS_SECONDS = 1.0


def write_message(descriptor: int, content: Mapping[str, Any]) -> None:
    """Send one message whole."""
    data = canonical_json(content).encode()
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_message(
    descriptor: int, deadline: float | None = None, is_alive: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Wait for the next message.

    Args:
        descriptor: The pipe's end.
        deadline: On the monotonic clock; None waits for ever.
        is_alive: Whether the other side is there. The pipe alone cannot tell: what the other side forked holds it open.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: the deadline has passed.
    """
    length = _LENGTH.unpack(_read_exactly(descriptor, _LENGTH.size, deadline, is_alive))[0]
    message: dict[str, Any] = json.loads(_read_exactly(descriptor, length, deadline, is_alive))
    return message


def _read_exactly(descriptor: int, num_bytes: int, deadline: float | None, is_alive: Callable[[], bool]) -> bytes:
    parts, missing = [], num_bytes
    while missing:
        # Asked before the look at the pipe: what a side wrote before its end is still read.
        was_alive = is_alive()
        patience = LIVENESS_SECONDS if deadline is None else min(LIVENESS_SECONDS, deadline - time.monotonic())
        ready, _, _ = select.select([descriptor], [], [], max(0.0, patience))
        if not ready:
            if not was_alive:
                raise EOFError
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            continue
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def resident_bytes() -> int:
    """Resident memory of this process's own now, without mapped files; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = (int(word) for word in Path("/proc/self/statm").read_text().split())
    except OSError:
        return 0
    # Parents that are mapped from the page cache are the system's to drop, and no sign of growth.
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _watch_parent(parent: int, folder: str) -> None:
    """End this process when its driver is gone, even in the middle of an evaluation, and remove its `folder`."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _serve(requests: int, responses: int, options: BackendOptions) -> None:
    """Answer requests until the driver closes its end; an error of ours is answered, any other ends the process."""
    from remelt_evals.evaluator import Evaluator

    try:
        evaluator = Evaluator(options)
        write_message(responses, {"kind": "ready"})
        while True:
            try:
                message = read_message(requests)
            except EOFError:
                return
            if message["kind"] == "hold":
                write_message(responses, _hold(evaluator, message))
                continue
            request = request_from_json(json.dumps(message["request"]))
            if message["kind"] == "evaluation_id":
                write_message(responses, {"kind": "evaluation_id", "evaluation_id": evaluator.evaluation_id(request)})
            else:
                report = json.loads(report_to_json(evaluator.evaluate(request)))
                write_message(responses, {"kind": "report", "report": report, "memory_bytes": resident_bytes()})
    except RemeltError as error:
        write_message(responses, {"kind": "error", "message": str(error)})


def _hold(evaluator: Evaluator, message: Mapping[str, Any]) -> dict[str, Any]:
    from remelt.recipe_yaml import parse_recipe

    recipes = [parse_recipe(recipe) for recipe in message["recipes"]]
    held = evaluator.hold(recipes, message["suite"], memory_bytes=message["memory_bytes"], threads=message["threads"])
    if isinstance(held, str):
        return {"kind": "not held", "reason": held}
    return {"kind": "held", "held": [one._asdict() for one in held]}


def _main(arguments: list[str]) -> None:
    requests, responses = int(arguments[0]), int(arguments[1])
    for descriptor in (requests, responses):
        os.set_inheritable(descriptor, False)
    threading.Thread(target=_watch_parent, args=(os.getppid(), arguments[3]), daemon=True).start()
    try:
        _serve(requests, responses, BackendOptions(**json.loads(arguments[2])))
    finally:
        shutil.rmtree(arguments[3], ignore_errors=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
