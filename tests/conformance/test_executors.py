"""Every executor gives the same bytes: any number of threads or workers, over two nodes, and when parts of it die."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from checkpoint_files import bf16, write_file
from merge_fixtures import make_recipe, write_pool
from ray_driver import RayDriver, find_writers
from remelt.executor import LocalExecutor
from remelt.merge import merge_recipe
from remelt.verify import verify_merge

METHODS = ("ties", "ties global", "della", "dare_ties", "model_stock")
MEMORY_BYTES = 200_000_000


class Bytes(NamedTuple):
    """What identifies an output."""

    digest: str
    shards: dict[str, str]


def bytes_of(output: Path, digest: str) -> Bytes:
    shards = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}
    return Bytes(digest, shards)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe file for each method, whose outputs have several shards."""
    folder = tmp_path_factory.mktemp("pool")
    pool = write_pool(folder)
    paths = {}
    for method in METHODS:
        operator, _, topk = method.partition(" ")
        options = {} if method == "model_stock" else {"parameters": {"density": 0.5}, "seed": 3}
        if topk:
            options = {"parameters": {"density": 0.5, "topk": topk}}
        paths[method] = folder / f"{method}.yaml"
        paths[method].write_text(make_recipe(pool, operator, max_shard_size="80kB", **options).to_yaml())
    return paths


@pytest.fixture(scope="module")
def expected(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bytes]:
    """The bytes that one thread of one process gives."""
    folder = tmp_path_factory.mktemp("expected")
    return {method: merge_locally(recipe, folder / method, threads=1) for method, recipe in recipes.items()}


def merge_locally(recipe: Path, output: Path, *, threads: int) -> Bytes:
    from remelt.recipe_yaml import load_recipe

    executor = LocalExecutor(threads=threads, memory_bytes=MEMORY_BYTES)
    return bytes_of(output, merge_recipe(load_recipe(recipe), output, executor=executor).digest)


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_threads_give_the_same_bytes(
    method: str, threads: int, recipes: dict[str, Path], expected: dict[str, Bytes], tmp_path: Path
) -> None:
    assert len(expected[method].shards) >= 4
    assert merge_locally(recipes[method], tmp_path / "out", threads=threads) == expected[method]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine; small object stores, since nothing but plans passes through them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    # A lost node is known for lost after five seconds instead of twenty.
    health = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
    head = {**node, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def driver(two_nodes: Any) -> Iterator[RayDriver]:
    """One driver on the cluster, for all tests that let it live."""
    driver = RayDriver({**os.environ, "RAY_ADDRESS": two_nodes.address})
    yield driver
    driver.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_ray_workers_give_the_same_bytes(
    method: str,
    workers: int,
    recipes: dict[str, Path],
    expected: dict[str, Bytes],
    driver: RayDriver,
    tmp_path: Path,
) -> None:
    driver.send(recipes[method], tmp_path / "out", workers=workers)
    assert bytes_of(tmp_path / "out", driver.answer()["digest"]) == expected[method]
    assert verify_merge(tmp_path / "out").problems == ()


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of many units, each long enough to be met at work."""
    folder = tmp_path_factory.mktemp("long")
    pool = {name: folder / name for name in ("base", "p1", "p2", "p3")}
    for seed, path in enumerate(pool.values()):
        rng = np.random.default_rng(seed)
        tensors = {f"model.layers.{n}.w.weight": bf16(rng.standard_normal((400, 600), np.float32)) for n in range(30)}
        write_file(path / "model.safetensors", tensors)
    recipe = make_recipe(pool, "della", parameters={"density": 0.5}, max_shard_size="500kB")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def long_bytes(long_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    return merge_locally(long_recipe, tmp_path_factory.mktemp("long-expected") / "out", threads=2)


def wait_for_work(output: Path, is_wanted: Callable[[int], bool], seconds: float = 60) -> int:
    """The first process that is wanted and seen to write a shard."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for pid in find_writers(output):
            if is_wanted(pid):
                return pid
    raise TimeoutError(output)


def is_child_of(raylet: int) -> Callable[[int], bool]:
    def check(pid: int) -> bool:
        try:
            return psutil.Process(pid).ppid() == raylet
        except psutil.NoSuchProcess:
            return False

    return check


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_costs_its_unit_only(
    long_recipe: Path, long_bytes: Bytes, driver: RayDriver, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    driver.send(long_recipe, output, workers=2)
    pid = wait_for_work(output, lambda pid: True)
    os.kill(pid, signal.SIGKILL)
    assert bytes_of(output, driver.answer()["digest"]) == long_bytes
    assert not (output / ".remelt").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_costs_its_units_only(
    long_recipe: Path, long_bytes: Bytes, two_nodes: Any, driver: RayDriver, tmp_path: Path
) -> None:
    node = two_nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    two_nodes.wait_for_nodes()
    (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
    output = tmp_path / "out"
    driver.send(long_recipe, output)
    wait_for_work(output, is_child_of(raylet))
    two_nodes.remove_node(node, allow_graceful=False)
    assert bytes_of(output, driver.answer()["digest"]) == long_bytes


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_driver_costs_time_only(long_recipe: Path, long_bytes: Bytes, two_nodes: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    environment = {**os.environ, "RAY_ADDRESS": two_nodes.address}
    first = RayDriver(environment)
    first.send(long_recipe, output)
    wait_for_work(output, lambda pid: True)
    first.process.kill()
    first.process.communicate()
    assert not (output / "remelt_manifest.json").exists()
    second = RayDriver(environment)
    second.send(long_recipe, output)
    assert bytes_of(output, second.answer()["digest"]) == long_bytes
    second.close()
