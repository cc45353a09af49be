"""What commands print of checkpoints, differences and operators: plain aligned text that pipes well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remelt.diff import DiffReport
from remelt.operators import OPERATORS
from remelt.operators.spec import Option
from remelt_jobs.progress import human_bytes


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; numbers to the right, the rest to the left."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(name), *(len(row[place]) for row in texts), 0) for place, name in enumerate(header)]
    is_number = [any(isinstance(row[place], int | float) for row in rows) for place in range(len(header))]
    for row in (list(header), *texts):
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, is_number, strict=True)
        )
        print("  ".join(cells).rstrip())


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def print_inspection(found: Mapping[str, Any]) -> None:
    """The report of `remelt.inspection.inspect` for people: facts first, then tables by dtype and by tensor class."""
    for key, value in found.items():
        if isinstance(value, list):
            for item in value:
                print(f"{key.removesuffix('s')}: {item}")
        elif not isinstance(value, Mapping):
            print(f"{key}: {human_bytes(value) if 'bytes' in key else _text(value)}")
    measures = ("tensors", "parameters", "bytes")
    print()
    print_table(["dtype", *measures], [[dtype, *map(count.get, measures)] for dtype, count in found["dtypes"].items()])
    print()
    print_table(
        ["class", "dtype", *measures],
        [
            [kind, dtype, *map(count.get, measures)]
            for kind, dtypes in found["classes"].items()
            for dtype, count in dtypes.items()
        ],
    )


def print_diff(report: DiffReport, num_tensors: int) -> None:
    """Classes, then the most different tensors."""
    for side, names in ((report.a, report.only_in_a), (report.b, report.only_in_b)):
        if names:
            print(f"only in {side}: {len(names)} tensors, such as {names[0]}")
    for name, shape_a, shape_b in report.shape_differences:
        print(f"shapes differ, not measured: {name} is {list(shape_a)} in a, {list(shape_b)} in b")
    for name, dtype_a, dtype_b in report.dtype_differences[:num_tensors]:
        print(f"dtypes differ: {name} is {dtype_a} in a, {dtype_b} in b")
    rows = report.to_table()
    measures = ("absolute", "rms", "relative", "cosine")
    classes = [row for row in rows if row["level"] != "tensor"]
    print_table(
        ["class", "elements", "changed", *measures],
        [
            [row["class"] or "all", row["num_elements"], row["num_changed"], *(row[key] for key in measures)]
            for row in classes
        ],
    )
    shown = sorted(
        (row for row in rows if row["level"] == "tensor"), key=lambda row: row["relative"] or 0.0, reverse=True
    )[:num_tensors]
    if shown:
        print(f"\nmost different of {len(report.tensors)} tensors, by relative distance:")
        print_table(
            ["tensor", "elements", "changed", *measures],
            [[row["name"], row["num_elements"], row["num_changed"], *(row[key] for key in measures)] for row in shown],
        )


def operator_rows() -> list[dict[str, Any]]:
    """The operator table as JSON values."""
    return [
        {
            "operator": operator.name,
            "summary": operator.summary,
            "scope": operator.scope,
            "base": operator.base,
            "models": [operator.min_models, operator.max_models],
            "options": {option.name: _option_row(option) for option in operator.options.values()},
        }
        for operator in OPERATORS.values()
    ]


def _option_row(option: Option) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": option.kind, "default": option.default, "per_model": option.per_model}
    if option.interval is not None:
        row["interval"] = str(option.interval)
    if option.choices:
        row["choices"] = list(option.choices)
    return row


def print_operators() -> None:
    """One block for each operator: what it does, then its options."""
    for operator in OPERATORS.values():
        base = {"required": "needs a base", "optional": "takes a base", "none": "no base"}[operator.base]
        print(f"{operator.name}: {operator.summary} ({base}; statistics over one {operator.scope})")
        for option in operator.options.values():
            allowed = str(option.interval) if option.interval else " | ".join(option.choices) or "true | false"
            per_model = ", for each model" if option.per_model else ""
            print(f"    {option.name} = {option.default}  {allowed}{per_model}")


def operator_markdown() -> str:
    """The table of the README: one row for each operator, its options with their defaults."""
    rows = ["| `merge_method` | does | base | options (default) |", "|---|---|---|---|"]
    for operator in OPERATORS.values():
        options = "; ".join(_option_text(option) for option in operator.options.values())
        rows.append(f"| `{operator.name}` | {operator.summary} | {operator.base} | {options} |")
    return "\n".join(rows)


def _option_text(option: Option) -> str:
    if option.kind == "bool":
        return f"`{option.name}` {str(option.default).lower()}"
    if option.interval is None:
        return f"`{option.name}` " + "/".join(f"**{c}**" if c == option.default else c for c in option.choices)
    return f"`{option.name}` {option.default:g} in {option.interval}"
