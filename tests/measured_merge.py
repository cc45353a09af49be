"""Merges in a process of their own, each with what it held at its peak beyond the idle process: one line of JSON each.

python tests/measured_merge.py THREADS WARM_RECIPE FOLDER MEMORY RECIPE [MEMORY RECIPE ...]
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
from pathlib import Path


def status_bytes(field: str) -> int:
    """A size in /proc/self/status, such as VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def settle() -> int:
    """Give free memory back to the system and forget the peak; returns what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def main() -> None:
    """Merge a small recipe first, so that imports and compiled kernels count as idle; then measure each other one."""
    from remelt.executor import LocalExecutor
    from remelt.merge import merge_recipe, open_checkpoints
    from remelt.planner import build_plan
    from remelt.recipe_yaml import load_recipe

    threads, warm, folder, *rest = sys.argv[1:]
    output = Path(folder) / "out"
    merge_recipe(load_recipe(Path(warm)), Path(folder) / "warm", threads=int(threads), memory_bytes=100_000_000)
    for memory, path in zip(rest[::2], rest[1::2], strict=True):
        recipe = load_recipe(Path(path))
        executor = LocalExecutor(threads=int(threads), memory_bytes=int(memory))
        idle = settle()
        merged = merge_recipe(recipe, output, executor=executor)
        measured = status_bytes("VmHWM") - idle
        # Planned again only now: what a plan takes is part of what is measured.
        projection = build_plan(recipe, open_checkpoints(recipe), executor.budget()).projection
        row = {"measured": measured, "projected": projection.total_bytes, "allowed": projection.allowed_bytes}
        print(json.dumps({**row, "digest": merged.digest, "terms": dict(projection.terms)}), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
