"""What charts are drawn from: scales, ticks, axes, labels that keep clear of each other, as pieces of SVG.

Colours and fonts are classes of the page's style sheet, so that a chart follows it from light to dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

FONT = 12.0
CHAR = 6.5
"""A character's mean width at the font size; generous, so that what is laid out by it does not overlap."""


class Box(NamedTuple):
    """Where something stands, so that labels keep clear of it."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class Scale(NamedTuple):
    """A linear map from values to lengths."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def labelled(
    x: float, y: float, text: str, taken: list[Box], area: Box, *, is_above: bool = False, gap: float = 8
) -> list[str]:
    """A label beside a point where there is room for it; none where there is not.

    Args:
        taken: what labels keep clear of; the label's own place is added.
        is_above: whether above the point is tried first, as beside a line.
        gap: between the point and a label beside it.
    """
    width, half = CHAR * len(text), FONT / 2
    places = [
        (x + gap, y + 4, "start", x + gap),
        (x - gap, y + 4, "end", x - gap - width),
        (x, y - gap - 1, "middle", x - width / 2),
        (x, y + gap + 9, "middle", x - width / 2),
    ]
    if is_above:
        places = [(x, y - 12, "middle", x - width / 2), (x + 8, y + 17, "start", x + 8), *places]
    for at, line, anchor, left in places:
        box = Box(left, line - FONT + 2, left + width, line + half - 3)
        inside = box.left >= area.left and box.right <= area.right + 6 and box.top >= area.top - 8
        if inside and box.bottom <= area.bottom and not any(box.meets(other) for other in taken):
            taken.append(box)
            return [svg_text(at, line, text, anchor, "label")]
    return []


def shade_legend(left: float, top: float, end: str, *, has_negative: bool) -> list[str]:
    """A ladder of shades; `end` is what the full shade stands for."""
    steps = [share / 4 for share in range(4, (-5 if has_negative else -1), -1)]
    size = 12.0 if has_negative else 16.0
    parts = []
    for place, share in enumerate(steps):
        kind = "low" if share < 0 else "high"
        parts.append(
            f'<rect class="cell {kind}" x="{left:.1f}" y="{top + place * size:.1f}" width="12" height="{size - 1:.1f}" '
            f'fill-opacity="{0.04 + 0.96 * abs(share):.3f}"/>'
        )
    parts.append(svg_text(left + 17, top + 10, end, "start", "tick"))
    low = f"-{end.removeprefix('≥ ')}" if has_negative else "0"
    parts.append(svg_text(left + 17, top + len(steps) * size - 3, low, "start", "tick"))
    return parts


def grid_lines(y: Scale, left: float, right: float) -> list[str]:
    parts = []
    for value, text in ticks(y.low, y.high, 5):
        at = y(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(svg_text(left - 7, at + 4, text, "end", "tick"))
    return parts


def axis_below(
    x: Scale, bottom: float, top: float, name: str, *, whole: bool = False, lines: bool = False
) -> list[str]:
    parts = [f'<line class="base" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>']
    count = 10 if whole else max(2, int((x.end - x.start) / 48))
    for value, text in ticks(x.low, x.high, count, whole=whole):
        if lines:
            parts.append(
                f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            )
        parts.append(svg_text(x(value), bottom + 16, text, "middle", "tick"))
    parts.append(svg_text((x.start + x.end) / 2, bottom + 34, name, "middle", "axis"))
    return parts


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two values, about `count` of them, with their text."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += not float(step * 10**digits).is_integer() and not whole
    first = math.ceil(low / step - 1e-9)
    values = [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value + 0.0:.{digits}f}") for value in values]


def scale_around(low: float, high: float, start: float, end: float) -> Scale:
    """A scale with a margin around the values."""
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - margin, high + margin, start, end)


def moved_apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved apart so that no two are closer than `least`; their order stays."""
    order = sorted(range(len(places)), key=lambda place: places[place])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved


def shortened(text: str, width: float) -> str:
    most = max(3, int(width / CHAR))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def svg_text(x: float, y: float, text: str, anchor: str, kind: str, *, turn: float = 0, tip: str = "") -> str:
    around = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    title = f"<title>{escape(tip)}</title>" if tip and tip != text else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{around}>{title}{escape(text)}</text>'


def svg_image(width: float, height: float, parts: Sequence[str], title: str, kind: str = "chart") -> str:
    """The pieces in a view box, with a title for those who hear the page."""
    body = "\n".join(part for part in parts if part)
    box = f"0 0 {width:.0f} {height:.0f}"
    return f'<svg class="{kind}" viewBox="{box}" role="img" aria-label="{escape(title)}">\n{body}\n</svg>'
