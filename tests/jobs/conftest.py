"""One Ray cluster for all tests of this room, small parents, and a suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_fixtures import write_pool
from study_fixtures import write_suite


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray cluster for two evaluators and a worker, started once."""
    from remelt_jobs.ray_session import ray_session

    with ray_session(num_cpus=3) as kind:
        yield kind


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three parents, by name."""
    return write_pool(tmp_path_factory.mktemp("parents"), 3)


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two abilities with items for every role."""
    return write_suite(tmp_path_factory.mktemp("suite") / "tiny")
