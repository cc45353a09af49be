"""How tests are shared out between processes (`pytest -n 2 --dist loadgroup`).

Tests on a Ray cluster stay together in one process, which starts one cluster; of the others, each file stays together.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures: list[str] = getattr(item, "fixturenames", [])
        group = "ray" if item.get_closest_marker("ray") or "cluster" in fixtures else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
