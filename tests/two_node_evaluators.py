"""Two nodes of two logical GPUs, and two evaluators that ask for all of them: prints what was scheduled, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from remelt_evals.backends import BackendOptions
from remelt_evals.suite import load_suite
from remelt_jobs.evaluator_pool import EvaluatorPool
from remelt_jobs.study_config import Evaluators
from remelt_jobs.trial import Work

MEMORY = 80 * 2**20


def main(checkpoint: str, suite: str) -> None:
    """Start the nodes, score one checkpoint on the evaluator that fits, and look at the placement groups."""
    head = {"num_cpus": 1, "num_gpus": 2, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=MEMORY)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    evaluators = Evaluators(count=2, nodes=2, cpus=0.5, gpus=2)
    work = Work(
        recipe=None, checkpoint=checkpoint, role="search", suite=suite, suite_digest=load_suite(Path(suite)).digest
    )
    with EvaluatorPool(evaluators, BackendOptions(name="dummy"), "two-nodes", 1) as pool:
        deadline = time.monotonic() + 120
        while not pool.has_room and time.monotonic() < deadline:
            pool.wait(1.0)
        pool.submit({"a": work})
        outcomes = {}
        while not outcomes and time.monotonic() < deadline:
            outcomes = pool.wait(1.0)
        assert outcomes["a"].report is not None, outcomes["a"].failure
        groups = list(ray.util.placement_group_table().values())
        created = [group for group in groups if group["state"] == "CREATED"]
        told = {
            "states": sorted(group["state"] for group in groups),
            "num_nodes_of_the_one_that_runs": len(set(created[0]["bundles_to_node_id"].values())),
            "free_gpus": ray.available_resources().get("GPU", 0),
        }
    deadline = time.monotonic() + 30
    states: list[str] = []
    while states != ["REMOVED", "REMOVED"] and time.monotonic() < deadline:
        states = sorted(group["state"] for group in ray.util.placement_group_table().values())
        time.sleep(0.1)
    print(json.dumps({**told, "states_at_the_end": states}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
