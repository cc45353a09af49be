"""Writes the report items: `python -m benchmarks.zoo.report_items`.

The seed stands here and nowhere else, and no script of training or search imports this module or reads the `report`
part of the corpus, so the figures that are reported were never optimised (tests/evals/test_zoo.py checks it).
"""

from __future__ import annotations

from benchmarks.zoo.items import ZOO_DIR, write_items

REPORT_SEED = 5_208_644


def main() -> None:
    """Write the items of the role `report`."""
    write_items("report", REPORT_SEED, ZOO_DIR / "items")


if __name__ == "__main__":
    main()
