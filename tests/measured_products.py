"""Inner products in a process of their own, each with what it held at its peak beyond the idle process, in JSON lines.

python tests/measured_products.py THREADS MEMORY GRADIENT BASE MEMBER NUM_VERTICES [NUM_VERTICES ...]
"""

from __future__ import annotations

import json
import sys

from measured_merge import settle, status_bytes


def main() -> None:
    """A pass over the base alone first, so that compiled kernels count as idle; then one for each size of the pool."""
    from remelt.executor import LocalExecutor
    from remelt.formats import open_checkpoint
    from remelt.inner_products import measure_products, plan_products

    threads, memory, gradient, base, member, *sizes = sys.argv[1:]
    executor = LocalExecutor(threads=int(threads), memory_bytes=int(memory))
    for number, size in enumerate([1, *map(int, sizes)]):
        idle = settle()
        plan = plan_products(
            open_checkpoint(gradient),
            [open_checkpoint(member) for _ in range(size)],
            base=open_checkpoint(base),
            with_squares=True,
            budget=executor.budget(),
        )
        for _ in executor.gather(measure_products, plan.settings, plan.units, plan.projection.total_bytes):
            pass
        measured = status_bytes("VmHWM") - idle
        if number:
            projected = plan.projection.total_bytes
            print(json.dumps({"vertices": size, "measured": measured, "projected": projected}), flush=True)


if __name__ == "__main__":
    main()
