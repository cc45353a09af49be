"""Coefficients of a merge over checkpoints and groups of layers, from its recipe alone.

The recipe is resolved for tensors with the usual names of a decoder, so gradients, filters and rules count as they do
in the merge; neighbours with equal coefficients become one group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from remelt.errors import RemeltError

_ASSUMED_LAYERS = 24
_MOST_GROUPS = 16

# One tensor of each class that a rule can name.
_IN_LAYER = {
    "attention": "model.layers.{}.self_attn.q_proj.weight",
    "mlp": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.layers.{}.input_layernorm.weight",
}
_EXPERTS_IN_LAYER = {
    "routed_experts": "model.layers.{}.mlp.experts.0.down_proj.weight",
    "shared_experts": "model.layers.{}.mlp.shared_experts.down_proj.weight",
    "router": "model.layers.{}.mlp.gate.weight",
}
_OUTSIDE = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}

Values = tuple[float, ...]


class Group(NamedTuple):
    """Tensors with the same coefficients."""

    name: str
    method: str
    """The operator, or `copy`, or `drop`."""
    values: Values
    """One for each row of the grid."""


@dataclass(frozen=True, slots=True)
class CoefficientGrid:
    """Coefficients over checkpoints (rows) and groups of layers (columns)."""

    rows: tuple[str, ...]
    groups: tuple[Group, ...]
    note: str = ""
    """What a reader must know, such as that the number of layers was assumed."""


def coefficient_grid(recipe_json: str) -> CoefficientGrid | None:
    """The grid of a bound recipe; None where the recipe cannot be resolved here (an operator of another installation).

    Args:
        recipe_json: as the `runs` table has it.
    """
    from remelt.recipe_yaml import parse_recipe
    from remelt.resolve import resolve

    try:
        recipe = parse_recipe(json.loads(recipe_json))
        layers, is_known = _num_layers(recipe.checkpoints[recipe.layout].source, recipe.expected_layers)
        classes = {**_IN_LAYER, **(_EXPERTS_IN_LAYER if _names_experts(recipe_json) else {})}
        keys: list[_Key] = [(kind, None) for kind in _OUTSIDE]
        keys += [(kind, layer) for kind in classes for layer in range(layers)]
        names = [_OUTSIDE[kind] if layer is None else classes[kind].format(layer) for kind, layer in keys]
        treatments = dict(zip(keys, resolve(recipe, names, num_hidden_layers=layers), strict=True))
    except RemeltError:
        return None
    places = [place for place in range(len(recipe.checkpoints)) if place in _places(treatments.values())]
    cells = {key: _cell(treatment, places) for key, treatment in treatments.items()}
    if len(set(cells.values())) == 1:
        groups = [Group("all tensors", *next(iter(cells.values())))]
    else:
        groups = _groups(cells, list(classes), layers)
    varies_by_layer = len({cells[kind, layer] for kind, layer in keys if layer is not None}) > 1
    note = "" if is_known or not varies_by_layer else f"layers of a model with {layers}, which was assumed"
    return CoefficientGrid(tuple(recipe.checkpoints[place].name for place in places), tuple(groups), note)


_Key = tuple[str, int | None]
_Cell = tuple[str, Values]


def _names_experts(recipe_json: str) -> bool:
    return any(kind in recipe_json for kind in (*_EXPERTS_IN_LAYER, "experts"))


def _num_layers(source: str, expected: int | None) -> tuple[int, bool]:
    """How many layers the merged model has, and whether that is known or assumed."""
    if expected is not None:
        return expected, True
    try:
        config = json.loads((Path(source).expanduser() / "config.json").read_text())
        found = config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        found = None
    return (found, True) if isinstance(found, int) and 0 < found < 1000 else (_ASSUMED_LAYERS, False)


def _places(treatments: Iterable[Any]) -> set[int]:
    from remelt.treatment import Apply, Copy

    places: set[int] = set()
    for treatment in treatments:
        if isinstance(treatment, Apply):
            places.update(treatment.models)
        elif isinstance(treatment, Copy):
            places.add(treatment.model)
    return places


def _cell(treatment: Any, places: Sequence[int]) -> _Cell:
    from remelt.treatment import Apply, Copy

    if isinstance(treatment, Copy):
        return "copy", tuple(1.0 if place == treatment.model else 0.0 for place in places)
    if not isinstance(treatment, Apply):
        return "drop", tuple(0.0 for _ in places)
    weights = dict(zip(treatment.models, treatment.coefficients, strict=True))
    position = dict(treatment.options).get("t")
    if isinstance(position, float) and len(treatment.models) == 2:
        weights = {treatment.models[0]: 1.0 - position, treatment.models[1]: position}
    return treatment.operator, tuple(weights.get(place, 0.0) for place in places)


def _groups(cells: Mapping[_Key, _Cell], classes: Sequence[str], layers: int) -> list[Group]:
    """Embedding, ranges of layers (of each class, where classes differ), head."""
    first = classes[0]
    by_class = any(cells[kind, layer] != cells[first, layer] for kind in classes for layer in range(layers))
    kinds = classes if by_class else [first]
    most = max(2, _MOST_GROUPS // len(kinds))
    groups = [Group("embedding", *cells["embedding", None])]
    for kind in kinds:
        column = [cells[kind, layer] for layer in range(layers)]
        for low, high in _ranges(column, most):
            span = f"{low}" if low == high else f"{low}–{high}"
            method = column[low][0]
            values = tuple(
                sum(cell[1][row] for cell in column[low : high + 1]) / (high - low + 1)
                for row in range(len(column[low][1]))
            )
            groups.append(Group(f"{kind} {span}" if by_class else f"layers {span}", method, values))
    return [*groups, Group("head", *cells["head", None])]


def _ranges(column: Sequence[_Cell], most: int) -> list[tuple[int, int]]:
    """First and last layer of each run of equal cells; where that gives too many, of `most` runs of equal length."""
    starts = [layer for layer in range(len(column)) if layer == 0 or column[layer] != column[layer - 1]]
    if len(starts) > most:
        starts = sorted({round(part * len(column) / most) for part in range(most)})
    return list(zip(starts, [start - 1 for start in starts[1:]] + [len(column) - 1], strict=True))
