"""Merging on Ray when something is wrong: a parent, a worker, the cluster's nodes, or the versions on it."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from checkpoint_files import write_file
from command import Command, Run, the_line
from merge_fixtures import make_recipe, parent_tensors
from ray_driver import find_writers
from remelt.errors import BudgetError, ExecutionError, NumericsError
from remelt.merge import merge_recipe, open_checkpoints, run_plan
from remelt.planner import build_plan
from remelt.recipe_yaml import load_recipe
from remelt.verify import verify_merge
from remelt_jobs import ray_executor
from remelt_jobs.ray_executor import RayExecutor

pytestmark = pytest.mark.ray

MEMORY_BYTES = 200_000_000


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.mark.slow
def test_an_error_of_ours_in_a_worker_is_the_commands_own(
    cluster: str, parents: dict[str, Path], remelt: Command, tmp_path: Path
) -> None:
    tensors = parent_tensors(1)
    tensors["model.norm.weight"][1][:3] = 0x7FC0
    write_file(tmp_path / "bad" / "model.safetensors", tensors)
    recipe = tmp_path / "recipe.yaml"
    pool = {**parents, "p1": tmp_path / "bad"}
    recipe.write_text(make_recipe(pool, "ties", parameters={"density": 0.5}, max_shard_size="100kB").to_yaml())
    run = remelt("merge", recipe, "--output", tmp_path / "out", "--executor", "ray", "--memory", "200MB")
    line = the_line(run, was_begun=True)
    assert re.match(r"NaN or Inf in a parent: model\.norm\.weight of .*bad \(3 values\)", line)
    assert not (tmp_path / "out" / "remelt_manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_worker_with_other_numerics_is_refused(cluster: str, parents: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(parents, "linear")
    indexes = open_checkpoints(recipe)
    executor = RayExecutor(num_workers=1, memory_bytes=MEMORY_BYTES)
    plan = build_plan(recipe, indexes, executor.budget())
    other = replace(plan, settings=replace(plan.settings, numerics="cpu-999"))
    with pytest.raises(NumericsError, match=r"numerics cpu-999, this worker with cpu-\d+: .* same version of remelt"):
        run_plan(other, indexes, [tmp_path / "out"], executor)
    assert not list((tmp_path / "out").rglob("*.safetensors*"))


def large_pool(folder: Path) -> dict[str, Path]:
    """A base and two parents of 24 MB in 12 tensors."""
    pool = {}
    for seed, name in enumerate(("base", "p1", "p2")):
        bits = np.random.default_rng(seed).integers(0x3C00, 0x3F80, (12, 1000, 1000), np.uint16)
        tensors = {f"model.layers.{number}.w.weight": ("BF16", matrix) for number, matrix in enumerate(bits)}
        pool[name] = folder / name
        write_file(pool[name] / "model.safetensors", tensors)
    return pool


def test_no_tensor_passes_through_the_object_store(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that goes to a task or comes from one, as Ray itself would pickle it, beside what the store held."""
    import ray
    from ray._private.internal_api import memory_summary

    passed: list[int] = []
    put, get = ray.put, ray.get

    def weighed_put(value: Any) -> Any:
        passed.append(len(ray.cloudpickle.dumps(value)))
        return put(value)

    def weighed_get(reference: Any) -> Any:
        value = get(reference)
        passed.append(len(ray.cloudpickle.dumps(value)))
        return value

    recipe = make_recipe(large_pool(tmp_path), "ties", parameters={"density": 0.5}, max_shard_size="5MB")
    executor = RayExecutor(num_workers=2, memory_bytes=MEMORY_BYTES)
    plan = build_plan(recipe, open_checkpoints(recipe), executor.budget())
    passed += [len(pickle.dumps(unit)) for unit in plan.units]
    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", weighed_put)
        patch.setattr(ray, "get", weighed_get)
        merged = merge_recipe(recipe, tmp_path / "out", executor=executor)
    assert len(plan.units) == 6 and len(passed) >= 2 + 2 * len(plan.units)
    assert max(passed) < 20_000 and sum(passed) < 200_000
    assert merged.num_bytes > 24_000_000
    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    consumed = re.search(r"Objects consumed by Ray tasks: (\d+) MiB", summary)
    assert re.search(r"Plasma memory usage 0 MiB", summary)
    assert consumed is None or int(consumed[1]) < 1


def kill_writers(output: Path, stop: threading.Event, killed: list[int]) -> None:
    """Kill every process that is seen to write a shard, until told to stop."""
    while not stop.is_set():
        for pid in find_writers(output):
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_is_named_and_the_merge_resumes(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(large_pool(tmp_path), "della", parameters={"density": 0.5}, max_shard_size="5MB")
    executor = RayExecutor(num_workers=1, memory_bytes=MEMORY_BYTES)
    stop = threading.Event()
    killed: list[int] = []
    killer = threading.Thread(target=kill_writers, args=(tmp_path / "out", stop, killed))
    killer.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ray_executor, "MAX_RETRIES", 1)
            with pytest.raises(
                ExecutionError, match=r"unit model-0000\d-of-00006\.safetensors was lost 2 times .*resume"
            ):
                merge_recipe(recipe, tmp_path / "out", executor=executor)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 2
    merged = merge_recipe(recipe, tmp_path / "out", executor=executor)
    assert verify_merge(merged.path).problems == ()


def test_a_unit_that_no_node_can_take_is_refused_in_words(
    cluster: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    """Ray by itself would wait for such a node for ever."""
    executor = RayExecutor(threads=64, memory_bytes=10 * MEMORY_BYTES)
    with pytest.raises(BudgetError, match=r"no node of the cluster .*64.*3.*--threads"):
        merge_recipe(make_recipe(parents, "linear"), tmp_path / "out", executor=executor)


def console(*arguments: object, address: str | None = None) -> subprocess.CompletedProcess[str]:
    """The console script, with a cluster's address or none in its environment."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    command = [str(Path(sys.executable).with_name("remelt")), *map(str, arguments)]
    environment["REMELT_TEST_COMMAND"] = str(command)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_an_address_where_nothing_listens_is_refused_at_once(parents: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(parents, "linear").to_yaml())
    arguments = ("merge", recipe, "--output", tmp_path / "out", "--executor", "ray")
    done = console(*arguments, address=f"127.0.0.1:{port}")
    line = the_line(Run(done.returncode, done.stdout, done.stderr), was_begun=True)
    assert re.search(rf"RAY_ADDRESS is 127\.0\.0\.1:{port}, and no Ray cluster .*refused.* unset it", line)


@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_for_the_merge_and_gone_after_it(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(parents, "ties", parameters={"density": 0.5}, max_shard_size="100kB").to_yaml())
    here = merge_recipe(load_recipe(recipe), tmp_path / "here", threads=1, memory_bytes=MEMORY_BYTES)
    done = console("merge", recipe, "--output", tmp_path / "out", "--executor", "ray")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{tmp_path / 'out'}: .*, digest {here.digest}\n", done.stdout)
    assert not re.search("Traceback|Error|WARNING|raylet", done.stderr), done.stderr
    assert descendants(done) == []


def descendants(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Processes that still have the environment of an ended command: what it started and left behind."""
    mark = f"REMELT_TEST_COMMAND={done.args}".encode()
    left = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                left.append(" ".join(process.cmdline()))
    return left
