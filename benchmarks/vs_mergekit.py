"""Merge the same recipes with mergekit and with remelt, in turn, and compare time, memory and what came out.

    python benchmarks/vs_mergekit.py --setup mergekit-env                  # make mergekit's own environment, once
    python benchmarks/vs_mergekit.py --mergekit-python mergekit-env/bin/python
    python benchmarks/vs_mergekit.py --mergekit-python ... --tune          # which of mergekit's flags are fastest here

A base and four fine-tunes of a 24-layer, 424M-parameter Llama shape in bfloat16. Before each run the inputs are read
(warm page cache) and the disk is synced; outputs are removed outside the timing. A time is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from make_checkpoints import LlamaShape, write_llama
from measure import (
    REPORTS_DIR,
    Measured,
    markdown_table,
    megabytes,
    remelt_command,
    run_measured,
    scratch_folder,
    versions,
    warm_page_cache,
    write_report,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference_operators as reference

TOOLS = ("mergekit", "remelt")
WEIGHTS = (0.5, 0.4, 0.3, 0.25)
OPTIONS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "model_stock": {},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "della": {"density": 0.5, "epsilon": 0.1},
}
RANDOM_METHODS = ("dare_ties", "della")
TARGETS = {
    "linear": 3,
    "task_arithmetic": 3,
    "model_stock": 4,
    "dare_ties": 8,
    "ties": 10,
    "breadcrumbs": 10,
    "della": 8,
}

# Not a matter of taste: found by --tune. Small shards let its writer thread overlap with the merge; its default is one
# 5B-parameter shard, written at the end.
FASTEST_FLAGS = ("--async-write", "--out-shard-size", "100M", "--lazy-unpickle")
QUIET_FLAGS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", "0")
TUNED_FLAGS: tuple[tuple[str, ...], ...] = (
    (),
    ("--lazy-unpickle",),
    ("--async-write",),
    ("--async-write", "--write-threads", "2"),
    ("--out-shard-size", "100M"),
    FASTEST_FLAGS,
    (*FASTEST_FLAGS, "--num-threads", "1"),
    (*FASTEST_FLAGS, "--num-threads", "2"),
    (*FASTEST_FLAGS, "--write-threads", "2"),
)


def write_recipe(path: Path, method: str, folders: Sequence[Path]) -> Path:
    """Write a recipe that both tools read; the first folder is the base."""
    base, *tunes = folders
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method != "linear":
        lines.append(f"base_model: {base}")
    lines.append("models:")
    for tune, weight in zip(tunes, WEIGHTS, strict=True):
        lines.append(f"  - model: {tune}")
        parameters = {} if method == "model_stock" else {"weight": weight, **OPTIONS[method]}
        if parameters:
            lines.append(f"    parameters: {json.dumps(parameters)}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def make_mergekit_environment(folder: Path, version: str) -> Path:
    """Make an environment with mergekit in it and nothing of ours; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # torch first and pinned, as ours, so that both tools compute with the same kernels.
    torch_version = torch.__version__.partition("+")[0]
    for requirement in (f"torch=={torch_version}", f"mergekit=={version}"):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def command_of(tool: str, recipe: Path, output: Path, mergekit_python: Path, flags: Sequence[str]) -> list[str | Path]:
    """The command line of one merge."""
    if tool == "mergekit":
        return [mergekit_python.parent / "mergekit-yaml", recipe, output, *QUIET_FLAGS, *flags]
    return [remelt_command(), "merge", recipe, "--output", output]


def timed_merge(command: Sequence[str | Path], output: Path, inputs: Sequence[Path]) -> Measured:
    """Run one merge into an empty place, from inputs that are in the page cache and a disk that is idle."""
    shutil.rmtree(output, ignore_errors=True)
    warm_page_cache(inputs)
    os.sync()
    return run_measured(command, environment={"HF_HUB_OFFLINE": "1"}).check()


# ---------------------------------------------------------------------------------------------------------------------
# Do the outputs agree?
# ---------------------------------------------------------------------------------------------------------------------


def open_checkpoint(folder: Path) -> dict[str, Any]:
    """Tensor name -> open safetensors file that has it."""
    files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.offset_keys()}


def compare_outputs(base: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """How far two merged checkpoints lie apart, in units of what merging did.

    `mean_diff` and `max_diff` are |ours - theirs| over the rms of theirs - base, the mean over all elements and the
    largest of any; `changed_*` is the fraction of elements that differ from the base; `mean_*` and `rms_*` are of the
    merged delta; `cosine` is between the two deltas. All in float64 sums over the whole checkpoint.
    """
    base_files, our_files, their_files = (open_checkpoint(folder) for folder in (base, ours, theirs))
    if set(our_files) != set(their_files):
        raise RuntimeError(f"the outputs differ in tensors: {sorted(set(our_files) ^ set(their_files))[:5]}")
    count = 0
    sums = dict.fromkeys(
        ("diff", "ours", "theirs", "ours2", "theirs2", "cross", "changed_o", "changed_t", "equal"), 0.0
    )
    largest = 0.0
    for name in their_files:
        base_N = base_files[name].get_tensor(name).float()
        ours_N, theirs_N = (files[name].get_tensor(name).float() - base_N for files in (our_files, their_files))
        diff_N = (ours_N - theirs_N).abs()
        rms = theirs_N.double().square().mean().sqrt().item()
        largest = max(largest, diff_N.max().item() / rms if rms else 0.0)
        count += diff_N.numel()
        sums["diff"] += diff_N.double().sum().item() / rms if rms else 0.0
        sums["equal"] += (diff_N == 0).sum().item()
        sums["cross"] += (ours_N.double() * theirs_N).sum().item()
        for key, delta_N in (("ours", ours_N), ("theirs", theirs_N)):
            sums[key] += delta_N.double().sum().item()
            sums[f"{key}2"] += delta_N.double().square().sum().item()
            sums[f"changed_{key[0]}"] += (delta_N != 0).sum().item()
    return {
        "mean_diff": sums["diff"] / count,
        "max_diff": largest,
        "equal": sums["equal"] / count,
        "changed_ours": sums["changed_o"] / count,
        "changed_theirs": sums["changed_t"] / count,
        "mean_ours": sums["ours"] / count,
        "mean_theirs": sums["theirs"] / count,
        "rms_ours": float(np.sqrt(sums["ours2"] / count)),
        "rms_theirs": float(np.sqrt(sums["theirs2"] / count)),
        "cosine": sums["cross"] / float(np.sqrt(sums["ours2"] * sums["theirs2"])) if sums["cross"] else 0.0,
    }


def distances_to_reference(method: str, folders: Sequence[Path], outputs: Mapping[str, Path]) -> dict[str, float]:
    """Mean distance of each tool's output from a float64 reference, in units of the rms of the merged delta.

    Over a few tensors of the first layer; a half step of bfloat16 is what no output can avoid, and is given as
    `rounding`: the distance of the reference itself, once rounded to bfloat16.
    """
    base, *tunes = (open_checkpoint(folder) for folder in folders)
    merged = {tool: open_checkpoint(output) for tool, output in outputs.items()}
    sums = dict.fromkeys([*outputs, "rounding"], 0.0)
    names = [name for name in base if ".layers.0." in name]
    options = {key: value for key, value in OPTIONS[method].items() if key != "epsilon"}
    for name in names:
        base_N, *tensors_KN = (files[name].get_tensor(name).double().numpy() for files in (base, *tunes))
        expected = reference.OPERATORS[method](base_N, tensors_KN, WEIGHTS, **options)
        rms = float(np.sqrt(np.mean((expected - base_N) ** 2))) or 1.0
        rounded = torch.from_numpy(expected).bfloat16().double().numpy()
        sums["rounding"] += float(np.abs(rounded - expected).mean()) / rms
        for tool, files in merged.items():
            found = files[name].get_tensor(name).double().numpy()
            sums[tool] += float(np.abs(found - expected).mean()) / rms
    return {f"from_reference_{key}": total / len(names) for key, total in sums.items()}


def agreement_section(agreements: Mapping[str, Mapping[str, float]]) -> str:
    """The tables that say whether both tools computed the same thing."""
    exact = [
        (
            method,
            f"{100 * found['equal']:.1f} %",
            f"{found['mean_diff']:.4f}",
            f"{found['max_diff']:.2f}",
            f"{found['cosine']:.5f}",
            f"{found['rms_ours'] / found['rms_theirs']:.4f}",
            f"{found['from_reference_remelt']:.4f}",
            f"{found['from_reference_mergekit']:.4f}",
            f"{found['from_reference_rounding']:.4f}",
        )
        for method, found in agreements.items()
        if method not in RANDOM_METHODS
    ]
    drawn = [
        (
            method,
            f"{found['changed_ours']:.4f}",
            f"{found['changed_theirs']:.4f}",
            f"{found['mean_ours']:.2e}",
            f"{found['mean_theirs']:.2e}",
            f"{found['rms_ours']:.4e}",
            f"{found['rms_theirs']:.4e}",
        )
        for method, found in agreements.items()
        if method in RANDOM_METHODS
    ]
    parts = ["## Do the outputs agree?"]
    if exact:
        parts += [
            "Difference of the two outputs in units of the rms of the merged delta of each tensor. mergekit computes in"
            " bfloat16 (here a delta is often one or two bfloat16 steps, so one rounding is a large part of it) and"
            " breaks ties of magnitude arbitrarily; remelt computes in float32 and keeps the lowest index. The last"
            " three columns are the mean distance from a float64 reference, in the same units, over the first layer: of"
            " each tool, and of the reference itself once rounded to bfloat16.",
            markdown_table(
                (
                    "method",
                    "equal elements",
                    "mean difference",
                    "largest",
                    "cosine",
                    "rms ratio",
                    "remelt",
                    "mergekit",
                    "rounding alone",
                ),
                exact,
            ),
        ]
    if drawn:
        parts += [
            "Random methods draw other masks, so only statistics of the merged delta can agree. mergekit rescales by an"
            " L1 norm match, remelt by 1 / keep probability; for DELLA these differ a little in rms by design.",
            markdown_table(
                ("method", "changed, remelt", "mergekit", "mean, remelt", "mergekit", "rms, remelt", "mergekit"), drawn
            ),
        ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and the largest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def results_section(results: Mapping[str, Mapping[str, Sequence[Measured]]], tools: Sequence[str]) -> str:
    """The table of times and memory."""
    rows = []
    for method, runs in results.items():
        row = [method, *(spread([run.seconds for run in runs[tool]]) for tool in tools)]
        if len(tools) == 2:
            medians = [statistics.median(run.seconds for run in runs[tool]) for tool in TOOLS]
            row += [f"**{medians[0] / medians[1]:.1f}x**", f"{TARGETS[method]}x"]
        row += [megabytes(statistics.median(run.peak_bytes for run in runs[tool])) for tool in tools]
        rows.append(row)
    head = ["method", *(f"{tool}, s" for tool in tools)]
    head += ["ratio", "to reach"] if len(tools) == 2 else []
    head += [f"{tool}, MB" for tool in tools]
    return markdown_table(head, rows)


def tune(
    methods: Sequence[str], recipes: Mapping[str, Path], folders: Sequence[Path], python: Path, scratch: Path
) -> None:
    """Time mergekit with every set of flags once and print the times."""
    for method in methods:
        for flags in TUNED_FLAGS:
            output = scratch / "out-tune"
            run = timed_merge(command_of("mergekit", recipes[method], output, python, flags), output, folders)
            print(f"{method:16} {run.seconds:7.1f} s {megabytes(run.peak_bytes):>6} MB  {' '.join(flags)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run both tools, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mergekit-python", type=Path, help="interpreter of the environment that has mergekit")
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make that environment here, then use it")
    parser.add_argument("--mergekit-version", default="0.1.5")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--only", choices=TOOLS, help="run one tool only; the outputs are then not compared")
    parser.add_argument("--tune", action="store_true", help="time mergekit's flags and stop")
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: a temporary one)")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR, help="folder for the table and the JSON")
    parser.add_argument("--keep", action="store_true", help="keep the table's other methods, and replace those run now")
    parser.add_argument("--small", action="store_true", help="a 2-layer shape: a test of this script, not a benchmark")
    options = parser.parse_args(arguments)
    tools = (options.only,) if options.only else TOOLS
    if options.setup:
        options.mergekit_python = make_mergekit_environment(options.setup, options.mergekit_version)
    if "mergekit" in tools and not options.mergekit_python:
        parser.error("--mergekit-python or --setup is needed")
    shape = LlamaShape(num_layers=2, hidden=256, intermediate=704, vocab=2048) if options.small else LlamaShape()

    with scratch_folder(options.scratch) as scratch:
        folders = write_llama(
            scratch / ("llama-tiny" if options.small else "llama"), shape, num_fine_tunes=len(WEIGHTS)
        )
        input_bytes = warm_page_cache(folders)
        recipes = {method: write_recipe(scratch / f"{method}.yaml", method, folders) for method in options.methods}
        if options.tune:
            tune(options.methods, recipes, folders, options.mergekit_python, scratch)
            return
        report = Report(options, shape, tools, folders, input_bytes)
        outputs = {tool: scratch / f"out-{tool}" for tool in tools}
        for method in options.methods:
            runs: dict[str, list[Measured]] = {tool: [] for tool in tools}
            for run_number in range(options.runs):
                # A/B, then B/A: neither tool always runs after the other.
                for tool in tools if run_number % 2 == 0 else reversed(tools):
                    command = command_of(tool, recipes[method], outputs[tool], options.mergekit_python, FASTEST_FLAGS)
                    inputs = folders[1:] if method == "linear" else folders
                    run = timed_merge(command, outputs[tool], inputs)
                    runs[tool].append(run)
                    print(f"{method:16} {tool:9} {run.seconds:7.1f} s {megabytes(run.peak_bytes):>6} MB", flush=True)
            agreement: dict[str, float] = {}
            if len(tools) == 2:
                agreement = compare_outputs(folders[0], outputs["remelt"], outputs["mergekit"])
                if method not in RANDOM_METHODS:
                    agreement |= distances_to_reference(method, folders, outputs)
            for output in outputs.values():
                shutil.rmtree(output, ignore_errors=True)
            report.add(method, runs, agreement)
    print(report.text())


class Report:
    """The table and the JSON, written anew after each method."""

    def __init__(
        self,
        options: argparse.Namespace,
        shape: LlamaShape,
        tools: Sequence[str],
        folders: Sequence[Path],
        input_bytes: int,
    ) -> None:
        self.options, self.shape, self.tools = options, shape, tools
        self.checkpoint_bytes = input_bytes / len(folders)
        self.results: dict[str, dict[str, list[Measured]]] = {}
        self.agreements: dict[str, dict[str, float]] = {}
        self.versions = {}
        if "mergekit" in tools:
            packages = ("mergekit", "torch", "safetensors", "transformers", "numpy")
            self.versions["mergekit"] = versions(options.mergekit_python, packages)
        if "remelt" in tools:
            self.versions["remelt"] = versions(sys.executable, ("remelt", "torch", "numpy", "numba"))
        kept = options.reports / "vs_mergekit.json"
        if options.keep and kept.exists():
            self._keep(json.loads(kept.read_text()))

    def _keep(self, data: Mapping[str, Any]) -> None:
        if data["versions"] != self.versions or data["flags"] != list(FASTEST_FLAGS):
            raise SystemExit("--keep: the table there was made with other versions or flags")
        self.agreements = {method: dict(found) for method, found in data["agreement"].items()}
        self.results = {
            method: {
                tool: [Measured(run["seconds"], run["peak_bytes"], run["cpu_seconds"], 0, "") for run in made]
                for tool, made in by_tool.items()
            }
            for method, by_tool in data["runs"].items()
        }

    def add(self, method: str, runs: dict[str, list[Measured]], agreement: dict[str, float]) -> None:
        """Take a method's runs, and write everything."""
        self.results[method], self.agreements[method] = runs, agreement
        self.results = {name: self.results[name] for name in OPTIONS if name in self.results}
        self.agreements = {name: self.agreements[name] for name in OPTIONS if self.agreements.get(name)}
        data = {
            "versions": self.versions,
            "flags": list(FASTEST_FLAGS),
            "runs": {
                name: {
                    tool: [
                        {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_bytes": run.peak_bytes}
                        for run in made
                    ]
                    for tool, made in by_tool.items()
                }
                for name, by_tool in self.results.items()
            },
            "agreement": self.agreements,
        }
        sections = [self._intro(), self._versions(), self.text()]
        write_report("vs_mergekit", "remelt against mergekit", sections, data, folder=self.options.reports)

    def text(self) -> str:
        """Times, memory, and how far the outputs agree."""
        parts = [results_section(self.results, self.tools)]
        if self.agreements:
            parts.append(agreement_section(self.agreements))
        return "\n\n".join(parts)

    def _intro(self) -> str:
        return (
            f"Base and {len(WEIGHTS)} fine-tunes of a {self.shape.num_layers}-layer Llama shape in bfloat16,"
            f" {megabytes(self.checkpoint_bytes)} MB each, warm page cache, {self.options.runs} runs of each tool in"
            " turn. Seconds are of the whole process: median (smallest to largest). Memory is the peak resident memory"
            " of the process tree, mapped input files counted. remelt's time includes syncing its output to disk;"
            " mergekit leaves that to the kernel. mergekit's flags, the fastest found:"
            f" `{' '.join(FASTEST_FLAGS)}`."
        )

    def _versions(self) -> str:
        return "\n".join(
            f"- {tool}: " + ", ".join(f"{name} {number}" for name, number in found.items())
            for tool, found in self.versions.items()
        )


if __name__ == "__main__":
    main()
