"""Merge the same recipes under every condition that must not change a byte, and compare the bytes.

    python benchmarks/same_bytes.py

Conditions: local with 1, 2 and 4 threads; Ray with 1, 2 and 3 workers on a two-node local cluster; budgets of 64 MB and
8 GB; torch's instruction sets default, avx2 and avx512; numba compiling for a generic CPU; OMP_NUM_THREADS 1 and 2; and
killed with SIGKILL at ten random moments, then resumed. Compared: the `digest` of the output's manifest, and the sha256
of every shard. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from make_checkpoints import SMALL_LLAMA, write_llama
from measure import (
    REPORTS_DIR,
    markdown_table,
    megabytes,
    remelt_command,
    run_measured,
    scratch_folder,
    versions,
    write_report,
)

SHARD_SIZE = "12MB"  # several units, so that workers have something to share and a resume something to keep
WEIGHTS = (0.5, 0.4, 0.3, 0.25)
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "nuslerp": {},
    "model_stock": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.01},
}
KILLED_METHODS = ("della", "ties")
NUM_KILLS = 10
NUM_RAY_KILLS = 3


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to run a merge."""

    label: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_ray: bool = False


CONDITIONS = (
    *(Condition(f"local, {n} thread{'s' * (n > 1)}", ("--threads", str(n))) for n in (1, 2, 4)),
    *(Condition(f"memory {size}", ("--memory", size)) for size in ("64MB", "8GB")),
    *(
        Condition(f"ATEN_CPU_CAPABILITY={name}", (), {"ATEN_CPU_CAPABILITY": name})
        for name in ("default", "avx2", "avx512")
    ),
    Condition("numba for a generic CPU", (), {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}),
    *(Condition(f"OMP_NUM_THREADS={n}", (), {"OMP_NUM_THREADS": str(n)}) for n in (1, 2)),
    *(
        Condition(f"Ray, {n} worker{'s' * (n > 1)}", ("--executor", "ray", "--workers", str(n)), {}, True)
        for n in (1, 2, 3)
    ),
)


class Bytes(NamedTuple):
    """What identifies an output."""

    digest: str
    shards: tuple[tuple[str, str], ...]
    """Name and sha256 of every safetensors file."""


def bytes_of(output: Path) -> Bytes:
    """Read an output's digest from its manifest, and hash its shards."""
    digest = json.loads((output / "remelt_manifest.json").read_text("utf-8"))["digest"]
    shards = []
    for path in sorted(output.glob("*.safetensors")):
        with path.open("rb") as file:
            shards.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return Bytes(digest, tuple(shards))


def write_recipe(path: Path, method: str, folders: Sequence[Path]) -> Path:
    """Write a recipe over the fine-tunes; the first folder is the base. JSON is YAML."""
    base, *tunes = folders
    if method == "nuslerp":
        tunes = tunes[:2]
    recipe: dict[str, Any] = {"merge_method": method, "seed": 3}
    if method != "linear":
        recipe["base_model"] = str(base)
    recipe["models"] = [
        {"model": str(tune)}
        | ({} if method == "model_stock" else {"parameters": {"weight": weight, **OPTIONS[method]}})
        for tune, weight in zip(tunes, WEIGHTS, strict=False)
    ]
    path.write_text(json.dumps(recipe, indent=1) + "\n", "utf-8")
    return path


def merge_command(recipe: Path, output: Path, condition: Condition) -> list[str]:
    """The command line of a merge under a condition."""
    command = [remelt_command(), "merge", recipe, "--output", output, "--max-shard-size", SHARD_SIZE]
    return [str(word) for word in (*command, *condition.arguments)]


@contextmanager
def two_node_cluster(is_needed: bool) -> Iterator[dict[str, str]]:
    """Start two Ray nodes of two CPUs each on this machine; yields the environment that finds them."""
    if not is_needed:
        yield {}
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    # Small object stores: nothing but plans and receipts passes through them.
    node = {"num_cpus": 2, "object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=128 * 2**20)
        cluster.wait_for_nodes()
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def count_receipts(output: Path) -> int:
    """Receipts that a killed run left behind."""
    return sum(1 for path in (output / ".remelt").rglob("*.json") if "receipt" in str(path))


def has_begun(output: Path) -> bool:
    """Whether a run has opened its first shard: before that (imports, Ray's start) there is nothing to interrupt."""
    return any((output / ".remelt" / "shards").glob("*"))


class Kill(NamedTuple):
    """One run that was killed, then resumed."""

    after_seconds: float
    receipts: int
    """Units that were through when it was killed."""
    was_finished: bool
    is_same: bool


def kill_and_resume(
    command: Sequence[str], output: Path, expected: Bytes, environment: Mapping[str, str], moment: float
) -> Kill:
    """Kill a merge with SIGKILL so long after it began to work, run it again to its end, compare."""
    shutil.rmtree(output, ignore_errors=True)
    whole = {**os.environ, **environment}
    process = subprocess.Popen(
        command, env=whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not has_begun(output):
        time.sleep(0.002)
    time.sleep(moment)
    was_finished = process.poll() is not None
    if not was_finished:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    receipts = count_receipts(output)
    run_measured(command, environment=environment, poll_tree=False).check()
    return Kill(moment, receipts, was_finished, bytes_of(output) == expected)


def working_seconds(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> float:
    """How long a merge works from the moment that it opens its first shard."""
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not has_begun(output):
        time.sleep(0.002)
    begun = time.perf_counter()
    if process.wait():
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, merge under every condition, write the report; 1 where bytes differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--no-ray", action="store_true", help="leave out what needs a Ray cluster")
    parser.add_argument("--kills", type=int, default=NUM_KILLS, help="of each operator that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: a temporary one)")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)
    conditions = [condition for condition in CONDITIONS if not (condition.needs_ray and options.no_ray)]
    expected: dict[str, Bytes] = {}
    differing: dict[str, list[str]] = {condition.label: [] for condition in conditions}
    kills: dict[str, list[Kill]] = {}
    with scratch_folder(options.scratch) as scratch, two_node_cluster(not options.no_ray) as ray_environment:
        folders = write_llama(scratch / "llama-small", SMALL_LLAMA, num_fine_tunes=len(WEIGHTS))
        input_bytes = (folders[0] / "model.safetensors").stat().st_size
        recipes = {method: write_recipe(scratch / f"same-{method}.yaml", method, folders) for method in options.methods}
        output = scratch / "out-same-bytes"
        num_shards = 0
        for method, recipe in recipes.items():
            for condition in conditions:
                shutil.rmtree(output, ignore_errors=True)
                environment = {**condition.environment, **(ray_environment if condition.needs_ray else {})}
                command = merge_command(recipe, output, condition)
                run = run_measured(command, environment=environment, poll_tree=False).check()
                found = bytes_of(output)
                num_shards = len(found.shards)
                is_same = found == expected.setdefault(method, found)
                if not is_same:
                    differing[condition.label].append(method)
                print(
                    f"{'same' if is_same else 'DIFFERS':8}{method:18}{condition.label:30}{run.seconds:6.1f} s",
                    flush=True,
                )
        for method in (method for method in KILLED_METHODS if method in recipes):
            local = Condition("", ("--threads", "1"))
            episodes: list[tuple[str, Condition, Mapping[str, str], int]] = [
                (f"{method}, local", local, {}, options.kills)
            ]
            if not options.no_ray:
                ray_condition = Condition("", ("--executor", "ray", "--workers", "2"))
                episodes.append((f"{method}, Ray driver", ray_condition, ray_environment, NUM_RAY_KILLS))
            for label, condition, extra, count in episodes:
                command = merge_command(recipes[method], output, condition)
                whole_seconds = working_seconds(command, output, extra)
                kills[label] = []
                for _ in range(count):
                    moment = moments.uniform(0, whole_seconds)
                    kill = kill_and_resume(command, output, expected[method], extra, moment)
                    kills[label].append(kill)
                    print(
                        f"{'same' if kill.is_same else 'DIFFERS':8}{label:24} killed after {moment:5.2f} s of"
                        f" {whole_seconds:.2f} s, {kill.receipts} of {num_shards} units done"
                        f"{', finished' if kill.was_finished else ''}",
                        flush=True,
                    )
        shutil.rmtree(output, ignore_errors=True)

    intro = (
        f"Base and {len(WEIGHTS)} fine-tunes of {megabytes(input_bytes)} MB in bfloat16, {len(options.methods)}"
        f" operators ({', '.join(options.methods)}), outputs in {num_shards} shards. The reference of each"
        " operator is its first run; the same means the same manifest digest and the same sha256 of every shard."
    )
    rows = [
        (label, len(options.methods) - len(methods), ", ".join(methods) or "none")
        for label, methods in differing.items()
    ]
    kill_rows = [
        (
            label,
            len(made),
            sum(not kill.was_finished for kill in made),
            ", ".join(str(kill.receipts) for kill in made),
            sum(kill.is_same for kill in made),
        )
        for label, made in kills.items()
    ]
    digests = [(method, f"`{found.digest[:32]}`") for method, found in expected.items()]
    numbers = versions(sys.executable, ("remelt", "torch", "numpy", "numba", "ray"))
    sections = [
        intro,
        ", ".join(f"{name} {number}" for name, number in numbers.items()) + ".",
        markdown_table(("condition", "operators with the same bytes", "differing"), rows),
        "Killed with SIGKILL at random moments after work began, then run again:",
        markdown_table(("run", "times", "killed before its end", "units done at the kill", "same bytes"), kill_rows),
        markdown_table(("operator", "digest, first half"), digests),
    ]
    data = {
        "versions": numbers,
        "digests": {method: found.digest for method, found in expected.items()},
        "differing": differing,
        "kills": {label: [kill._asdict() for kill in made] for label, made in kills.items()},
    }
    write_report("same_bytes", "Same bytes", sections, data, folder=options.reports)
    print("\n\n".join(sections[2:]))
    is_clean = not any(differing.values()) and all(kill.is_same for made in kills.values() for kill in made)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
