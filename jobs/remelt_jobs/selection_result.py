"""What came of a selection: its tables, as values, as JSON and on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from remelt_jobs.tables import print_table

BEST = "best"
"""Folder of the iterate of the least loss, merged and verified."""


class Row(NamedTuple):
    """One iterate, for the table."""

    number: int
    loss: float
    held_out: float | None
    gap: float
    kinds: dict[str, int]
    """How many blocks took a step of each kind."""
    largest_step: float
    num_active: int
    """Vertices with a coefficient in any block."""


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """What came of a selection."""

    output: Path
    names_V: tuple[str, ...]
    rows: tuple[Row, ...]
    best: int
    """Number of the iterate of the least loss."""
    weights_V: tuple[float, ...]
    """Of the best iterate: each vertex's coefficient, averaged over blocks."""
    stopped: str
    digest: str
    """Of the merge in `best`."""
    num_gradients: int
    num_losses: int
    notes: tuple[str, ...]
    is_reused: bool = False

    def to_json(self) -> str:
        document = asdict(self) | {"output": str(self.output), "rows": [row._asdict() for row in self.rows]}
        del document["is_reused"]
        return json.dumps(document, indent=1)


def print_result(result: SelectionResult) -> None:
    """The tables: gap and loss by iteration, weights by checkpoint."""
    print_table(
        ["iterate", "loss", "held out", "gap", "largest step", "active", "steps"],
        [
            [
                f"{row.number}{'*' if row.number == result.best else ''}",
                round(row.loss, 6),
                None if row.held_out is None else round(row.held_out, 6),
                row.gap,
                row.largest_step,
                row.num_active,
                ", ".join(f"{count} {kind}" for kind, count in row.kinds.items()) or "stopped",
            ]
            for row in result.rows
        ],
    )
    print()
    weights = sorted(zip(result.names_V, result.weights_V, strict=True), key=lambda pair: -pair[1])
    print_table(["checkpoint", "weight"], [[name, weight] for name, weight in weights])
    print(
        f"\nstopped: {result.stopped}; {result.num_gradients} gradients and {result.num_losses} losses; the best "
        f"iterate is {result.best}, merged and verified in {result.output / BEST}, digest {result.digest}"
    )
    for note in result.notes:
        print(f"note: {note}")
