"""Time and memory of planning a merge of 16 DeepSeek-V3-shaped checkpoints from headers alone, on one core.

    python benchmarks/plan_scale.py

61 layers and the multi-token prediction layer, 256 experts, 91,991 stored tensors with scales, 160 shards, 689 GB each:
true headers over sparse files. To reach: at most 15 s and 1.5 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_checkpoints import DeepSeekShape, write_sparse_deepseek
from measure import (
    REPORTS_DIR,
    Measured,
    markdown_table,
    megabytes,
    remelt_command,
    run_measured,
    scratch_folder,
    versions,
    write_report,
)

ALLOWED_SECONDS = 15
ALLOWED_BYTES = 1.5e9


def graft_recipe(folders: Sequence[Path]) -> str:
    """Routed experts from the second checkpoint, every other class spread over all of them, all copied bit for bit."""
    lines = ["merge_method: linear", "models:"]
    lines += [
        f"  - {{model: {folder}, name: m{place}, parameters: {{weight: 1}}}}" for place, folder in enumerate(folders)
    ]
    lines += ["rules:", "  - {match: {class: [routed_experts]}, copy: m1}"]
    lines += [f"  - {{match: {{layers: [{layer}, {layer}]}}, copy: m{layer % len(folders)}}}" for layer in range(61)]
    lines.append("  - {match: {name: '*'}, copy: m0}")
    return "\n".join(lines) + "\n"


def linear_recipe(folders: Sequence[Path]) -> str:
    """The mean of all checkpoints."""
    lines = ["merge_method: linear", "models:"]
    lines += [f"  - {{model: {folder}, parameters: {{weight: 1}}}}" for folder in folders]
    return "\n".join(lines) + "\n"


def ties_recipe(folders: Sequence[Path]) -> str:
    """TIES of all but the first, which is the base, with a gradient over layers and filters."""
    lines = ["merge_method: ties", f"base_model: {folders[0]}", "models:"]
    parameters = "{weight: [{filter: mlp, value: [0.2, 0.4]}, {value: 0.3}], density: [0.3, 0.7, 0.5]}"
    lines += [f"  - {{model: {folder}, parameters: {parameters}}}" for folder in folders[1:]]
    lines.append("dtype: bfloat16")
    return "\n".join(lines) + "\n"


RECIPES = {"graft of copies": graft_recipe, "linear": linear_recipe, "ties": ties_recipe}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the checkpoints, plan, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp8", "bf16"], nargs="+", default=["fp8", "bf16"])
    parser.add_argument(
        "--scratch", type=Path, help="folder for the sparse checkpoints, kept (default: a temporary one)"
    )
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args(arguments)
    core = min(os.sched_getaffinity(0))
    records: list[dict[str, Any]] = []
    rows = []
    with scratch_folder(options.scratch) as scratch:
        for dtype in options.dtype:
            shape = DeepSeekShape(dtype=dtype)
            folders = write_sparse_deepseek(scratch / f"deepseek-{dtype}", shape, count=options.count)
            for name, recipe_of in RECIPES.items():
                recipe = scratch / f"{recipe_of.__name__}-{dtype}.yaml"
                recipe.write_text(recipe_of(folders), "utf-8")
                command: list[str | Path] = [remelt_command(), "plan", recipe]
                runs: list[Measured] = []
                for _ in range(options.runs):
                    runs.append(run_measured(command, cores=[core], environment={"OMP_NUM_THREADS": "1"}).check())
                    print(
                        f"{dtype} {name:16} {runs[-1].seconds:6.1f} s {megabytes(runs[-1].peak_bytes)} MB", flush=True
                    )
                seconds = [run.seconds for run in runs]
                peak_bytes = max(run.peak_bytes for run in runs)
                reached = statistics.median(seconds) <= ALLOWED_SECONDS and peak_bytes <= ALLOWED_BYTES
                rows.append(
                    (
                        f"{name}, {dtype}",
                        f"{len(list(shape.entries())):,}",
                        f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                        f"{statistics.median(run.cpu_seconds for run in runs):.1f}",
                        megabytes(peak_bytes),
                        "yes" if reached else "**no**",
                    )
                )
                records.append(
                    {
                        "recipe": name,
                        "dtype": dtype,
                        "seconds": seconds,
                        "peak_bytes": peak_bytes,
                        "cpu": [run.cpu_seconds for run in runs],
                    }
                )
                print(runs[-1].output)
    intro = (
        f"`remelt plan RECIPE` on one core (by affinity), {options.count} DeepSeek-V3-shaped checkpoints in 160 shards,"
        f" whole process, median of {options.runs} runs (smallest to largest); the first run of each set of checkpoints"
        " comes right after they were written, so headers are in the page cache. fp8 checkpoints hold a scale for every"
        " weight and are 689 GB each; bf16 ones are 1,369 GB."
    )
    numbers = versions(sys.executable, ("remelt", "torch", "numpy"))
    version_line = ", ".join(f"{name} {number}" for name, number in numbers.items()) + "."
    head = ("recipe, dtype", "stored tensors in each", "seconds", "of them CPU", "peak, MB", "at most 15 s and 1.5 GB")
    sections = [intro, version_line, markdown_table(head, rows)]
    data = {"versions": numbers, "count": options.count, "runs": records}
    write_report("plan_scale", "Planning at scale", sections, data, folder=options.reports)
    print(sections[-1])


if __name__ == "__main__":
    main()
