"""From coefficients to a model that is ready to score: by disk and a load, and straight into a loaded model.

    python benchmarks/resident.py [--scratch DIR] [--rounds 5]

Both ways run in turn in one process, with other coefficients each time, on the zoo, on its mixture of experts, and on
the 424M-parameter Llama shape. *By disk* is a merge, and a load by transformers. What transformers loads is mapped and
comes from the disk when it is first looked at, so the first forward pass, minus a second one, counts as loading; the
same is added to the resident way. Logits of both are compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

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
from remelt.merge import merge_recipe
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe
from remelt_evals import zoo
from remelt_evals.backends import BackendOptions
from remelt_evals.hf_backend import load_model
from remelt_evals.resident import ResidentCandidates

TARGET = 10.0
PACKAGES = ("torch", "transformers", "numba", "safetensors")
NUM_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is merged."""

    name: str
    base: Path
    parents: tuple[Path, ...]
    vocab: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One set of coefficients, both ways; seconds."""

    merge: float
    load: float
    first_look: float
    """What the first forward pass took more than the second: weights that came from the disk only then."""
    resident: float
    resident_first_look: float
    is_equal: bool
    """Logits, bit for bit, and digests."""
    cpu_by_disk: float
    """CPU seconds of all threads, the forward passes left out."""
    cpu_in_memory: float
    others: float
    """Cores that other processes kept busy meanwhile."""

    @property
    def by_disk(self) -> float:
        return self.merge + self.load + self.first_look

    @property
    def in_memory(self) -> float:
        return self.resident + self.resident_first_look


def make_recipe(shape: Shape, method: str, weights: Sequence[float]) -> Recipe:
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(shape.parents, weights, strict=True)
    ]
    document: dict[str, Any] = {"merge_method": method, "models": models}
    if method == "ties":
        document["parameters"] = {"density": 0.5}
    if method != "linear":
        document["base_model"] = str(shape.base)
    return parse_recipe(document)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begun


def look_twice(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits, and what the first forward pass took more than the second."""

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(tokens).logits
        return logits

    logits, first = timed(forward)
    _, second = timed(forward)
    return logits, max(0.0, first - second)


def run_pair(residents: ResidentCandidates, shape: Shape, recipe: Recipe, output: Path) -> Pair:
    """Both ways for one recipe, the resident one first."""
    with Others() as others:
        pair = _run_pair(residents, shape, recipe, output)
    return replace(pair, others=others.cores)


def _run_pair(residents: ResidentCandidates, shape: Shape, recipe: Recipe, output: Path) -> Pair:
    tokens = torch.arange(NUM_TOKENS).remainder(shape.vocab)[None]
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    cpu = time.process_time()
    merged_in_memory, resident = timed(lambda: residents.merge([recipe]))
    if isinstance(merged_in_memory, str):
        raise RuntimeError(merged_in_memory)
    cpu_in_memory = time.process_time() - cpu
    (candidate,) = merged_in_memory
    logits, resident_first_look = look_twice(candidate.model, tokens)
    cpu = time.process_time()
    merged, merge = timed(lambda: merge_recipe(recipe, output))
    (model, _), load = timed(lambda: load_model(str(output), BackendOptions()))
    cpu_by_disk = time.process_time() - cpu
    expected, first_look = look_twice(model, tokens)
    is_equal = torch.equal(logits, expected) and candidate.digest == merged.digest
    del model
    shutil.rmtree(output)
    return Pair(
        merge=merge,
        load=load,
        first_look=first_look,
        resident=resident,
        resident_first_look=resident_first_look,
        is_equal=is_equal,
        cpu_by_disk=cpu_by_disk,
        cpu_in_memory=cpu_in_memory,
        others=0.0,
    )


def run_shape(shape: Shape, method: str, rounds: int, folder: Path, patience: float) -> list[Pair]:
    """Pairs on one shape, after one that is not counted: it compiles, and builds the resident model."""
    rng = random.Random(0)
    with ResidentCandidates(BackendOptions(), threads=len(os.sched_getaffinity(0)), scratch=folder) as residents:
        pairs = []
        for number in range(rounds + 1):
            wait_for_quiet(patience if number else 0)
            weights = [round(rng.uniform(0.1, 0.5), 3) for _ in shape.parents]
            pairs.append(run_pair(residents, shape, make_recipe(shape, method, weights), folder / f"out-{number}"))
            last = pairs[-1]
            print(
                f"{shape.name} {method} {number}: by disk {last.by_disk:.3f} s, resident {last.in_memory:.3f} s; CPU "
                f"{last.cpu_by_disk:.3f} and {last.cpu_in_memory:.3f} s; others {last.others:.1f} cores",
                flush=True,
            )
    return pairs[1:]


def with_tokenizer(checkpoint: Path, parent: Path) -> Path:
    """The same checkpoint, hard-linked, with a tokenizer beside it so that it loads whole: the zoo's will do."""
    folder = parent / checkpoint.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(zoo.base() / name, folder / name)
    return folder


def shapes(folder: Path) -> list[Shape]:
    base, *tunes = (with_tokenizer(path, folder / "llama-resident") for path in write_llama(folder / "llama"))
    warm_page_cache([base, *tunes])
    return [
        Shape(name="zoo", base=zoo.base(), parents=tuple(zoo.parents().values()), vocab=100),
        Shape(
            name="zoo, mixture of experts",
            base=zoo.experts_base(),
            parents=tuple(zoo.experts_parents().values()),
            vocab=100,
        ),
        Shape(name="424M Llama", base=base, parents=tuple(tunes), vocab=32_000),
    ]


def row(name: str, method: str, pairs: Sequence[Pair]) -> list[str]:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    ratios = [pair.by_disk / pair.in_memory for pair in pairs]
    return [
        f"{name}, {method}",
        f"{median([pair.merge for pair in pairs]):.3f}",
        f"{median([pair.load for pair in pairs]):.3f}",
        f"{median([pair.first_look for pair in pairs]):.3f}",
        f"{median([pair.resident for pair in pairs]):.3f}",
        f"{median([pair.resident_first_look for pair in pairs]):.3f}",
        f"**{median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})",
        f"{median([pair.cpu_by_disk for pair in pairs]):.3f}",
        f"{median([pair.cpu_in_memory for pair in pairs]):.3f}",
        "yes" if all(pair.is_equal for pair in pairs) else "NO",
        f"{median([pair.others for pair in pairs]):.1f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: temporary ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=["linear", "task_arithmetic", "ties"])
    parser.add_argument("--only", help="only shapes whose name holds this")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Pair]] = {}
    with scratch_folder(arguments.scratch) as folder:
        for shape in shapes(folder):
            if arguments.only and arguments.only not in shape.name:
                continue
            for method in arguments.methods:
                rounds = arguments.rounds if method != "ties" or "zoo" in shape.name else max(2, arguments.rounds // 2)
                found[shape.name, method] = run_shape(shape, method, rounds, folder, arguments.patience)
    head = ["", "merge to disk", "load", "first look", "resident", "its first look", "times faster"]
    head += ["CPU by disk", "CPU resident", "same logits", "others"]
    text = (
        f"Seconds, medians of {arguments.rounds} pairs (fewer for ties on the large shape). The figure to reach is "
        f"{TARGET:.0f} times. CPU seconds are those of all threads, forward passes left out. *Others* is how many "
        "cores other processes kept busy meanwhile. "
        "Versions: " + ", ".join(f"{name} {v}" for name, v in versions(sys.executable, PACKAGES).items()) + "."
    )
    table = markdown_table(head, [row(*key, pairs) for key, pairs in found.items()])
    data = {
        "pairs": [
            {"shape": name, "method": method, **asdict(pair)}
            for (name, method), pairs in found.items()
            for pair in pairs
        ]
    }
    write_report(
        "resident", "From coefficients to a model ready to score", [text, table], data, folder=arguments.reports
    )
    print(table)
    everything = [pair for pairs in found.values() for pair in pairs]
    ratios = [statistics.median([pair.by_disk / pair.in_memory for pair in pairs]) for pairs in found.values()]
    return int(not all(pair.is_equal for pair in everything) or min(ratios) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
