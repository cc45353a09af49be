"""Peak memory of `remelt merge --memory 1GB` above an idle `import torch`, for every operator.

    python benchmarks/memory.py

The checkpoints have the 424M-parameter Llama shape of `vs_mergekit.py`. To reach: at most 1.1 GB for every operator,
and the same with 12 checkpoints as with 4.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_checkpoints import LlamaShape, write_llama
from measure import (
    REPORTS_DIR,
    idle_torch_bytes,
    markdown_table,
    megabytes,
    remelt_command,
    run_measured,
    scratch_folder,
    versions,
    write_report,
)

OPTIONS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "slerp": {},
    "nuslerp": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.01},
    "model_stock": {},
    "assembly_of_experts": {},
}
PAIR_OPERATORS = ("slerp", "nuslerp")
BASELESS_OPERATORS = ("linear", "assembly_of_experts")
NUM_CHECKPOINTS = (4, 12)
ALLOWED_BYTES = 1.1e9


def write_recipe(path: Path, method: str, folders: Sequence[Path]) -> Path:
    """Write a recipe over the fine-tunes; the first folder is the base."""
    base, *tunes = folders
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method not in BASELESS_OPERATORS:
        lines.append(f"base_model: {base}")
    if method == "slerp":
        # Its base is one of the two.
        lines += ["parameters: {t: 0.4}", "models:", f"  - model: {base}", f"  - model: {tunes[0]}"]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path
    if method in PAIR_OPERATORS:
        tunes = tunes[:2]
    lines.append("models:")
    for tune in tunes:
        parameters = {} if method == "model_stock" else {"weight": 1 / len(tunes), **OPTIONS[method]}
        lines.append(f"  - model: {tune}")
        if parameters:
            lines.append(f"    parameters: {json.dumps(parameters)}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def projected_bytes(recipe: Path, memory: str) -> int | None:
    """What the plan says that the merge will hold; None where its output is not the JSON alone."""
    run = run_measured([remelt_command(), "plan", recipe, "--memory", memory, "--json"], poll_tree=False)
    try:
        return int(json.loads(run.output)["memory"]["projected_bytes"])
    except (ValueError, KeyError, TypeError):
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, merge, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--methods", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--checkpoints", nargs="+", type=int, default=list(NUM_CHECKPOINTS))
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: a temporary one)")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    parser.add_argument("--small", action="store_true", help="a 2-layer shape: a test of this script, not a benchmark")
    options = parser.parse_args(arguments)
    shape = LlamaShape(num_layers=2, hidden=256, intermediate=704, vocab=2048) if options.small else LlamaShape()
    idle_bytes = idle_torch_bytes()
    records: list[dict[str, Any]] = []
    with scratch_folder(options.scratch) as scratch:
        folders = write_llama(
            scratch / ("llama-tiny" if options.small else "llama"), shape, num_fine_tunes=max(options.checkpoints)
        )
        output = scratch / "out-memory"
        for method in options.methods:
            for num in [2] if method in PAIR_OPERATORS else options.checkpoints:
                recipe = write_recipe(scratch / f"{method}-{num}.yaml", method, folders[: num + 1])
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                command = [remelt_command(), "merge", recipe, "--output", output, "--memory", options.memory]
                run = run_measured(command).check()
                shutil.rmtree(output, ignore_errors=True)
                above = run.peak_bytes - idle_bytes
                record = {
                    "method": method,
                    "checkpoints": num,
                    "seconds": run.seconds,
                    "peak_bytes": run.peak_bytes,
                    "above_idle_bytes": above,
                    "projected_bytes": projected_bytes(recipe, options.memory),
                }
                records.append(record)
                print(f"{method:20} {num:3} {megabytes(above):>6} MB above idle {run.seconds:7.1f} s", flush=True)
    rows = [
        (
            record["method"],
            record["checkpoints"],
            megabytes(record["peak_bytes"]),
            megabytes(record["above_idle_bytes"]),
            "" if record["projected_bytes"] is None else megabytes(record["projected_bytes"]),
            "yes" if record["above_idle_bytes"] <= ALLOWED_BYTES else "**no**",
        )
        for record in records
    ]
    head = ("method", "checkpoints", "peak, MB", "above idle, MB", "projected, MB", "at most 1.1 GB")
    intro = (
        f"`remelt merge --memory {options.memory}` on {shape.num_layers}-layer Llama checkpoints in bfloat16."
        f" An idle process that has imported torch peaks at {megabytes(idle_bytes)} MB here. slerp and nuslerp take two"
        " checkpoints."
    )
    numbers = versions(sys.executable, ("remelt", "torch", "numpy", "numba"))
    version_line = ", ".join(f"{name} {number}" for name, number in numbers.items()) + "."
    data = {"versions": numbers, "idle_bytes": idle_bytes, "memory": options.memory, "runs": records}
    sections = [intro, version_line, markdown_table(head, rows)]
    write_report("memory", "Peak memory of a merge", sections, data, folder=options.reports)
    print(sections[-1])


if __name__ == "__main__":
    main()
