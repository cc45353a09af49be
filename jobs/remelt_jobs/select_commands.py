"""The command `select`: Frank-Wolfe selection of coefficients by gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def select(
    config: Annotated[Path, typer.Argument(help="Selection in YAML: pool, base_model, calibration, variant, steps.")],
    output: Annotated[Path, typer.Option("--output", help="Directory of the iterates and of the best merge.")],
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take the selection from a driver that is gone.")
    ] = False,
) -> None:
    """Select coefficients by the gradient of a loss (Frank-Wolfe). Run it again to resume."""
    from remelt_jobs.selection import run_selection
    from remelt_jobs.selection_config import load_selection
    from remelt_jobs.selection_result import BEST, print_result

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    result = run_selection(load_selection(config), output, takeover=takeover, progress=tell)
    if result.is_reused:
        print(
            f"{output}: finished with {len(result.rows)} iterates, nothing done; the best is {result.best} with loss "
            f"{result.rows[result.best].loss:.6f}, in {output / BEST}"
        )
        return
    print_result(result)
