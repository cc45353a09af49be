"""A driver of merges on a Ray cluster in a process of its own, which tests may kill; they connect to Ray at most once.

Reads one request a line from stdin, `{"recipe": PATH, "output": PATH, "workers": N, "memory": BYTES}`, and answers
each with a line: `{"digest": ...}`, or `{"error": CLASS, "message": ...}` for what remelt raises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def find_writers(output: Path) -> list[int]:
    """Ray workers that have a shard of an unfinished output open: they are at work on a unit of it now."""
    shards = str(output.absolute() / ".remelt" / "shards") + "/"
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cmdline").read_bytes().startswith(b"ray::"):
                files = [str(link.readlink()) for link in (process / "fd").iterdir()]
                if any(file.startswith(shards) for file in files):
                    found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile
    return found


class RayDriver:
    """The driver's process, seen from the tests."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, recipe: Path, output: Path, *, workers: int | None = None, memory: int = 200_000_000) -> None:
        """Ask for a merge; `answer` waits for it."""
        assert self.process.stdin is not None
        request = {"recipe": str(recipe), "output": str(output), "workers": workers, "memory": memory}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What came of the oldest merge that was not answered yet."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the driver ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the driver end by itself; not needed for one that was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def main() -> None:
    """Answer requests until stdin ends."""
    from remelt.errors import RemeltError
    from remelt.merge import merge_recipe
    from remelt.recipe_yaml import load_recipe
    from remelt_jobs.ray_executor import RayExecutor
    from remelt_jobs.ray_session import ray_session

    # Ray tells of lost workers and nodes on stdout; the answers keep a way of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with ray_session() as kind:
        assert kind == "joined"
        for line in sys.stdin:
            request = json.loads(line)
            executor = RayExecutor(num_workers=request["workers"], memory_bytes=request["memory"])
            try:
                merged = merge_recipe(load_recipe(Path(request["recipe"])), Path(request["output"]), executor=executor)
            except RemeltError as error:
                print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=answers)
            else:
                print(json.dumps({"digest": merged.digest}), file=answers)


if __name__ == "__main__":
    main()
