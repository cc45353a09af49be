"""Eight candidates in one pass over the pool, against one: bytes read, time, and the same bytes as merged alone.

    python benchmarks/generation.py [--scratch DIR] [--rounds 3] [--candidates 8]

A base and four fine-tunes of the 424M-parameter Llama shape. One and all run in turn in one process, to files. The disk
is synced before each run, outputs are removed outside the timing. Inputs lie in the page cache, or, as with a pool that
the memory cannot hold, on the disk alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from make_checkpoints import write_llama
from measure import (
    REPORTS_DIR,
    Others,
    markdown_table,
    scratch_folder,
    versions,
    wait_for_quiet,
    warm_page_cache,
    write_report,
)
from remelt.commit import MANIFEST_FILE
from remelt.merge import merge_recipes
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe

TIME_TARGET, BYTES_TARGET = 3.0, 2.5
OPTIONS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pass."""

    candidates: int
    seconds: float
    cpu_seconds: float
    bytes_read: int
    bytes_written: int
    digests: tuple[str, ...]
    others: float
    """Cores that other processes kept busy meanwhile."""


def make_recipe(folders: Sequence[Path], method: str, weights: Sequence[float]) -> Recipe:
    base, *tunes = folders
    models = [
        {"model": str(path), "parameters": {"weight": weight, **OPTIONS[method]}}
        for path, weight in zip(tunes, weights, strict=True)
    ]
    document: dict[str, Any] = {"merge_method": method, "models": models}
    if method != "linear":
        document["base_model"] = str(base)
    return parse_recipe(document)


def drop_from_cache(folders: Sequence[Path]) -> None:
    """Have the system forget what it read of the inputs."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def merge(recipes: Sequence[Recipe], folder: Path, inputs: Sequence[Path], *, is_cold: bool) -> Run:
    outputs = [folder / f"candidate-{number}" for number in range(len(recipes))]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    if is_cold:
        drop_from_cache(inputs)
    cpu, begun = cpu_seconds(), time.perf_counter()
    with Others() as others:
        merged = merge_recipes(recipes, outputs)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    execution = [json.loads((output / MANIFEST_FILE).read_text())["execution"] for output in outputs]
    for output in outputs:
        shutil.rmtree(output)
    return Run(
        candidates=len(recipes),
        seconds=seconds,
        cpu_seconds=cpu,
        bytes_read=execution[0]["bytes_read"],
        bytes_written=sum(one["bytes_written"] for one in execution),
        digests=tuple(one.digest for one in merged),
        others=others.cores,
    )


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_method(
    method: str, folders: Sequence[Path], count: int, rounds: int, scratch: Path, patience: float, *, is_cold: bool
) -> list[tuple[Run, Run]]:
    """Pairs of one candidate and all, after one small pass that compiles."""
    rng = random.Random(0)
    pairs = []
    for number in range(rounds + 1):
        recipes = [make_recipe(folders, method, [rng.uniform(0.1, 0.5) for _ in folders[1:]]) for _ in range(count)]
        chosen = number % count
        wait_for_quiet(patience if number else 0)
        one = merge([recipes[chosen]], scratch, folders, is_cold=is_cold)
        if number == 0:
            continue
        together = merge(recipes, scratch, folders, is_cold=is_cold)
        if one.digests[0] != together.digests[chosen]:
            raise RuntimeError(f"{method}: candidate {chosen} has other bytes in company")
        pairs.append((one, together))
        print(
            f"{method}: one {one.seconds:.2f} s (CPU {one.cpu_seconds:.2f}), {count} {together.seconds:.2f} s (CPU "
            f"{together.cpu_seconds:.2f}), {together.seconds / one.seconds:.2f} times; others {one.others:.1f} and "
            f"{together.others:.1f} cores",
            flush=True,
        )
    return pairs


def write_rate(scratch: Path) -> float:
    """Bytes a second that this disk takes past the page cache, from one thread that does nothing else."""
    from remelt.shard_file import ShardFile

    total, block = 2_000_000_000, memoryview(bytes(1 << 22))
    os.sync()
    begun = time.perf_counter()
    file = ShardFile(scratch / "rate.bin", total)
    left = total
    while left:
        left -= len(part := block[: min(left, len(block))])
        file.append(part)
    file.finish()
    seconds = time.perf_counter() - begun
    (scratch / "rate.bin").unlink()
    return total / seconds


def row(method: str, pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    times = [together.seconds / one.seconds for one, together in pairs]
    one, together = pairs[0]
    return [
        method,
        f"{statistics.median(o.seconds for o, _ in pairs):.2f}",
        f"{statistics.median(t.seconds for _, t in pairs):.2f}",
        f"**{statistics.median(times):.2f}** ({min(times):.2f} to {max(times):.2f})",
        f"{statistics.median(t.cpu_seconds / o.cpu_seconds for o, t in pairs):.2f}",
        f"**{together.bytes_read / one.bytes_read:.2f}**",
        f"{one.bytes_read / 1e9:.2f}",
        f"{together.bytes_written / 1e9:.2f}",
        f"{statistics.median(run.others for pair in pairs for run in pair):.1f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: temporary ones)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--methods", nargs="*", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    arguments = parser.parse_args()
    found = {}
    with scratch_folder(arguments.scratch) as folder:
        folders = write_llama(folder / "llama")
        rate = write_rate(folder)
        for is_cold in (False, True):
            warm_page_cache(folders)
            for method in arguments.methods:
                name = f"{method}, from disk" if is_cold else method
                found[name] = run_method(
                    method, folders, arguments.candidates, arguments.rounds, folder, arguments.patience, is_cold=is_cold
                )
    count = arguments.candidates
    head = ["", "one, s", f"{count}, s", "times the time", "times the CPU", "times the bytes read"]
    head += ["GB read", f"GB written for {count}", "others"]
    table = markdown_table(head, [row(method, pairs) for method, pairs in found.items()])
    text = (
        f"Medians of {arguments.rounds} pairs; the figures to reach are {TIME_TARGET:g} times the time and "
        f"{BYTES_TARGET:g} times the bytes read. One thread writes and digests {rate / 1e9:.2f} GB/s on this disk. "
        "*Others* is how many cores other processes kept busy meanwhile. Every candidate that was also merged alone "
        "had the same bytes. Versions: "
        + ", ".join(f"{name} {v}" for name, v in versions(sys.executable, ("numba", "numpy")).items())
        + "."
    )
    data = {
        "write_bytes_per_second": rate,
        "pairs": [
            {"method": method, "one": asdict(one), "together": asdict(together)}
            for method, pairs in found.items()
            for one, together in pairs
        ],
    }
    title = f"{count} candidates in one pass over the pool"
    write_report("generation", title, [text, table], data, folder=arguments.reports)
    print(table)
    medians = [statistics.median(t.seconds / o.seconds for o, t in pairs) for pairs in found.values()]
    reads = [t.bytes_read / o.bytes_read for pairs in found.values() for o, t in pairs]
    return int(max(medians) > TIME_TARGET or max(reads) > BYTES_TARGET)


if __name__ == "__main__":
    sys.exit(main())
