"""Charts of the report page as inline SVG: no script, colours from the page's style sheet, light and dark.

Lengths are in the units of each chart's view box, which is as wide as the page's text at its full width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from remelt_evals.report_svg import (
    CHAR,
    Box,
    Scale,
    axis_below,
    grid_lines,
    labelled,
    moved_apart,
    scale_around,
    shade_legend,
    shortened,
    svg_image,
    svg_text,
)

WIDTH = 960.0
_LEAST_PANEL = 160.0


class Mark(NamedTuple):
    """A point of a chart."""

    x: float
    y: float
    kind: str
    """Its class in the style sheet: uniform, parent, init, searcher, failed or stopped."""
    tip: str
    label: str = ""
    error: float | None = None
    is_on_front: bool = False
    is_winner: bool = False


class Bar(NamedTuple):
    """A bar with its error."""

    label: str
    kind: str
    value: float | None
    error: float | None


def progress_chart(marks: Sequence[Mark], references: Sequence[tuple[str, float]], score_name: str) -> str:
    """Score against trial: points with their errors, the best so far as a step line, references as dashed lines."""
    height, left, right, top, bottom = 340.0, 60.0, WIDTH - 150, 16.0, 340.0 - 44
    scored = [mark for mark in marks if mark.kind != "failed"]
    with_errors = len(scored) <= 150
    lows = [mark.y - (mark.error or 0) * with_errors for mark in scored] + [value for _, value in references]
    highs = [mark.y + (mark.error or 0) * with_errors for mark in scored] + [value for _, value in references]
    y = scale_around(min(lows, default=0.0), max(highs, default=1.0), bottom, top)
    x = Scale(-0.5, max(mark.x for mark in marks) + 0.5, left, right)
    parts = [*grid_lines(y, left, right), *axis_below(x, bottom, top, "trial", whole=True)]
    parts.append(svg_text(left - 48, (top + bottom) / 2, score_name, "middle", "axis", turn=-90))
    taken: list[Box] = []
    ends = [(name, y(value), value) for name, value in references]
    for (name, at, value), label_at in zip(ends, moved_apart([at for _, at, _ in ends], 15.0), strict=True):
        parts.append(f'<line class="reference" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(svg_text(right + 8, label_at + 4, f"{name} {value:.3f}", "start", "note"))
    if with_errors:
        parts += [
            f'<line class="error {mark.kind}" x1="{x(mark.x):.1f}" x2="{x(mark.x):.1f}" '
            f'y1="{y(mark.y - mark.error):.1f}" y2="{y(mark.y + mark.error):.1f}"/>'
            for mark in scored
            if mark.error
        ]
    parts.append(_best_so_far(scored, x, y, right))
    for mark in marks:
        at = bottom - 6 if mark.kind == "failed" else y(mark.y)
        parts.append(_point(x(mark.x), at, mark))
    for mark in marks:
        if mark.is_winner:
            parts += labelled(
                x(mark.x), y(mark.y), mark.label, taken, Box(left, top - 14, right, bottom), is_above=True
            )
    return svg_image(WIDTH, height, parts, f"{score_name} of every trial, and the best so far")


def front_chart(panels: Sequence[tuple[str, str, bool, bool, Sequence[Mark]]]) -> str:
    """Trials over pairs of objectives, one panel for each pair; the points of the whole front are filled.

    Args:
        panels: names of both objectives, whether more of each is better, and the trials.
    """
    columns = min(3, len(panels))
    gap, rows = 26.0, math.ceil(len(panels) / columns)
    width = (WIDTH - gap * (columns - 1)) / columns
    each = 250.0 if columns > 2 else 320.0
    parts: list[str] = []
    for place, (name_x, name_y, more_x, more_y, marks) in enumerate(panels):
        left = (place % columns) * (width + gap) + 58
        right = (place % columns) * (width + gap) + width - 8
        top = (place // columns) * (each + 16) + 12
        bottom = top + each - 60
        x = scale_around(min(mark.x for mark in marks), max(mark.x for mark in marks), left, right)
        y = scale_around(min(mark.y for mark in marks), max(mark.y for mark in marks), bottom, top)
        parts += [
            *grid_lines(y, left, right),
            *axis_below(x, bottom, top, _directed(name_x, more_x, right - left), lines=True),
        ]
        title = _directed(name_y, more_y, bottom - top)
        parts.append(svg_text(left - 44, (top + bottom) / 2, title, "middle", "axis", turn=-90))
        if len(panels) == 1:
            parts.append(_front_line(marks, x, y))
        parts += _panel_marks(marks, x, y, Box(left, top, right, bottom))
    return svg_image(WIDTH, rows * (each + 16), parts, "trials over pairs of objectives", "front-panels")


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    marked: Sequence[bool] = (),
    with_numbers: bool = True,
    most: float | Sequence[float] | None = None,
    title: str,
    axis: str = "",
) -> str:
    """Numbers as shades: blue above zero, orange below.

    Args:
        values: for each row, one for each column; None leaves the cell empty.
        marked: columns that get a dot above them.
        with_numbers: whether cells say their number; else only the tip does.
        most: the magnitude that gets the full shade, and all beyond it, of all rows or of each; the largest one by
            default.
        axis: what the columns are.
    """
    left = min(240.0, 22 + CHAR * max(len(row) for row in rows))
    cell_height = 26.0 if with_numbers else max(12.0, min(22.0, 300 / len(rows)))
    cell = min(110.0, (WIDTH - left - 90) / len(columns))
    turn = any(len(name) * CHAR > cell - 6 for name in columns) and with_numbers
    top = 20.0 + (min(120.0, 0.75 * CHAR * max(len(name) for name in columns)) if turn else 8.0)
    known = [abs(value) for row in values for value in row if value is not None]
    largest = max(known, default=0.0)
    is_each = isinstance(most, Sequence)
    shades = list(most) if isinstance(most, Sequence) else [most or largest or 1.0] * len(rows)
    parts: list[str] = []
    step = max(1, math.ceil(34 / cell)) if not with_numbers else 1
    for place, name in enumerate(columns):
        middle = left + (place + 0.5) * cell
        if turn:
            parts.append(svg_text(middle, top - 8, name, "start", "tick", turn=-40))
        elif place % step == 0:
            parts.append(svg_text(middle, top - 8, name, "middle", "tick"))
        if marked and marked[place]:
            parts.append(f'<circle class="winner-dot" cx="{middle:.1f}" cy="{top - 24:.1f}" r="3.5"/>')
    gap = 2.0 if cell > 12 else 0.5
    for row, (name, numbers) in enumerate(zip(rows, values, strict=True)):
        at = top + row * cell_height
        parts.append(svg_text(left - 10, at + cell_height / 2 + 4, shortened(name, left - 16), "end", "tick", tip=name))
        for place, value in enumerate(numbers):
            box = Box(left + place * cell, at, left + (place + 1) * cell - gap, at + cell_height - gap)
            where = f"{name}, {axis} {columns[place]}".replace("  ", " ")
            parts += _cell(box, value, shades[row] or 1.0, with_numbers, where)
    bottom = top + len(rows) * cell_height
    if axis:
        parts.append(svg_text(left + cell * len(columns) / 2, bottom + 18, axis, "middle", "axis"))
        bottom += 16
    has_negative = any(value is not None and value < 0 for row in values for value in row)
    right = left + cell * len(columns)
    end = "row max" if is_each else f"{'≥ ' if largest > shades[0] else ''}{shades[0]:.2g}"
    parts += shade_legend(right + 16, top, end, has_negative=has_negative)
    return svg_image(WIDTH, max(bottom + 12, top + 84), parts, title)


def bar_panels(panels: Sequence[tuple[str, str, Sequence[Bar]]], note: str) -> str:
    """One panel for each eval task, one bar for each checkpoint, errors of one standard error as whiskers.

    Args:
        panels: name, what is measured, and the bars, whose labels are the same in all panels.
    """
    labels = [bar.label for bar in panels[0][2]]
    left = min(190.0, 18 + CHAR * max(len(label) for label in labels))
    gap, row_height = 22.0, 22.0
    # As many as fit, spread evenly over the lines.
    most_columns = max(1, int((WIDTH - left + gap) / (_LEAST_PANEL + gap)))
    columns = math.ceil(len(panels) / math.ceil(len(panels) / most_columns))
    width = (WIDTH - left - gap * (columns - 1)) / columns
    each = 44 + row_height * len(labels) + 26
    parts: list[str] = []
    for place, (name, measure, bars) in enumerate(panels):
        start = left + (place % columns) * (width + gap)
        top = (place // columns) * each + 44
        most = max(((bar.value or 0) + (bar.error or 0) for bar in bars), default=1.0) or 1.0
        x = Scale(0.0, most, start, start + width - 46)
        parts.append(svg_text(start, top - 27, shortened(name, 0.85 * width), "start", "title", tip=name))
        parts.append(svg_text(start, top - 11, shortened(measure, width), "start", "tick", tip=measure))
        for row, bar in enumerate(bars):
            at = top + row * row_height
            if place % columns == 0:
                kind = "tick strong" if bar.kind == "best" else "tick"
                parts.append(svg_text(left - 10, at + 12, shortened(bar.label, left - 14), "end", kind, tip=bar.label))
            parts += _bar(bar, x, at, row_height - 6, name)
        under = top + row_height * len(bars) - 2
        parts.append(f'<line class="base" x1="{start:.1f}" x2="{start:.1f}" y1="{top - 2:.1f}" y2="{under:.1f}"/>')
    return svg_image(WIDTH, math.ceil(len(panels) / columns) * each - 16, parts, note)


def _bar(bar: Bar, x: Scale, top: float, height: float, task: str) -> list[str]:
    if bar.value is None:
        return [svg_text(x.start + 6, top + height - 4, "not scored", "start", "note")]
    end = x(max(0.0, bar.value))
    number = f"{bar.value:.3f}"
    spread = f" ± {bar.error:.3f}" if bar.error is not None else ""
    tip = f"<title>{escape(f'{bar.label}, {task}: {number}{spread}')}</title>"
    parts = [
        f'<rect class="bar {bar.kind}" x="{x.start:.1f}" y="{top:.1f}" width="{end - x.start:.1f}" '
        f'height="{height:.1f}" rx="2">{tip}</rect>'
    ]
    tail = end
    if bar.error:
        low, tail, middle = x(bar.value - bar.error), x(bar.value + bar.error), top + height / 2
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{tail:.1f}M{low:.1f} {middle - 3:.1f}v6'
            f'M{tail:.1f} {middle - 3:.1f}v6"/>'
        )
    kind = "value strong" if bar.kind == "best" else "value"
    parts.append(svg_text(tail + 5, top + height - 4, number, "start", kind))
    return parts


def _front_line(marks: Sequence[Mark], x: Scale, y: Scale) -> str:
    """Through the points of the front, where there are two objectives and it is a line."""
    points = sorted((mark.x, mark.y) for mark in marks if mark.is_on_front)
    path = "L".join(f"{x(one):.1f} {y(two):.1f}" for one, two in points)
    return f'<path class="front-line" d="M{path}"/>' if len(points) > 1 else ""


def _panel_marks(marks: Sequence[Mark], x: Scale, y: Scale, area: Box) -> list[str]:
    # The front last, so that it lies on top.
    ordered = sorted(marks, key=lambda mark: (mark.is_winner, mark.is_on_front, mark.kind == "parent"))
    parts = [_point(x(mark.x), y(mark.y), mark) for mark in ordered]
    taken = [Box(x(m.x) - 4, y(m.y) - 4, x(m.x) + 4, y(m.y) + 4) for m in ordered if m.label or m.is_on_front]
    for mark in ordered:
        if mark.label:
            parts += labelled(x(mark.x), y(mark.y), mark.label, taken, area, gap=12 if mark.is_winner else 8)
    return parts


def _best_so_far(marks: Sequence[Mark], x: Scale, y: Scale, right: float) -> str:
    best = -math.inf
    path = ""
    for mark in sorted(marks, key=lambda mark: mark.x):
        if mark.kind != "stopped" and mark.y > best:
            best = mark.y
            path += f"M{x(mark.x):.1f} {y(best):.1f}" if not path else f"H{x(mark.x):.1f}V{y(best):.1f}"
    return f'<path class="best-line" d="{path}H{right:.1f}"/>' if path else ""


def _point(x: float, y: float, mark: Mark) -> str:
    tip = f"<title>{escape(mark.tip)}</title>"
    kind = f"point {mark.kind}{' front' if mark.is_on_front else ''}"
    if mark.kind == "failed":
        shape = f'<path class="{kind}" d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7">{tip}</path>'
    elif mark.kind == "uniform":
        shape = f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{tip}</rect>'
    elif mark.kind == "parent":
        shape = f'<path class="{kind}" d="M{x:.1f} {y - 5:.1f}l5 8.6h-10z">{tip}</path>'
    else:
        shape = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.6">{tip}</circle>'
    ring = f'<circle class="winner-ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' if mark.is_winner else ""
    return shape + ring


def _cell(box: Box, value: float | None, most: float, with_number: bool, where: str) -> list[str]:
    left, top, width, height = box.left, box.top, box.right - box.left, box.bottom - box.top
    place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{1.5 if width > 8 else 0}"'
    if value is None:
        return [f'<rect class="cell empty" {place}/>']
    share = min(1.0, abs(value) / most)
    kind = "low" if value < 0 else "high"
    tip = f"<title>{escape(where)}: {value:.4g}</title>"
    parts = [
        f'<rect class="cell" {place}/>',
        f'<rect class="cell {kind}" {place} fill-opacity="{0.04 + 0.96 * share:.3f}">{tip}</rect>',
    ]
    if with_number and width > 30:
        ink = "on-dark" if share > 0.55 else ""
        parts.append(svg_text(left + width / 2, top + height / 2 + 4, f"{value:.2f}", "middle", f"number {ink}"))
    return parts


def _directed(name: str, more_is_better: bool, width: float) -> str:
    name = shortened(name, width - 20)
    return f"{name} →" if more_is_better else f"← {name}"
