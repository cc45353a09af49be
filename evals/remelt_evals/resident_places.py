"""Where the tensors of a checkpoint lie in a loaded model: the parameter of the same name, or a part of a fused one.

transformers renames tensors and fuses some while it loads (the experts of a mixture become one parameter). Its own
conversion mapping says how; here it is read backwards, from the fused parameter to the views that its parts are. What
cannot be written in place (a part that is transposed, split or permuted on its way) is said in a sentence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 3
_LEFT_UNREAD = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Buffers that older checkpoints store and transformers passes over for every model, beside what its class declares."""


class StoredShape(NamedTuple):
    """A tensor as the checkpoint stores it."""

    name: str
    shape: tuple[int, ...]


class Places(NamedTuple):
    """Where each stored tensor belongs, or why it cannot be said."""

    views: Mapping[str, Tensor | None]
    """Stored name to a contiguous view of its shape; None for what the model leaves unread, as its class declares."""
    problem: str | None


class _Part(NamedTuple):
    """A stored tensor on its way into a converted parameter."""

    pattern: str
    stored: StoredShape


def find_places(model: Any, tensors: Iterable[StoredShape]) -> Places:
    """Give each stored tensor its place in the model's parameters and persistent buffers.

    Args:
        model: loaded by transformers from a checkpoint of these very names, shapes and dtypes.
        tensors: all that the checkpoint stores.

    Every parameter is filled exactly once, but for those that the model class declares as not stored; else there is a
    problem, and the views are empty.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        return _impossible(f"this version of transformers shows no conversion mapping ({error})")
    if getattr(model, "hf_quantizer", None) is not None:
        return _impossible("the model is quantised while it loads")
    live: dict[str, Tensor] = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix

    views: dict[str, Tensor | None] = {}
    parts: dict[str, list[_Part]] = defaultdict(list)
    for stored in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):
        key, pattern = rename_source_key(stored.name, renamings, converters, prefix, live)
        if key not in live and stored.name in live:
            # As the loader does: a name that fits should not have been renamed.
            key, pattern = rename_source_key(stored.name, [], [], prefix, live)
        if key not in live:
            if not _is_declared(key, (*_LEFT_UNREAD, *(model._keys_to_ignore_on_load_unexpected or ()))):
                return _impossible(f"{stored.name} has no place in the model")
            views[stored.name] = None
        elif pattern is not None:
            parts[key].append(_Part(pattern, stored))
        else:
            views[stored.name] = live[key].detach()
    for key, members in parts.items():
        found = _views_of_parts(live[key].detach(), by_pattern[members[0].pattern], members)
        if isinstance(found, str):
            return _impossible(f"{key} is put together from {len(members)} tensors, {found}")
        views |= found
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    problem = _check(model, live, views, shapes)
    return Places({}, problem) if problem else Places(views, None)


def _impossible(problem: str) -> Places:
    return Places({}, problem)


def _views_of_parts(target: Tensor, converter: Any, members: Sequence[_Part]) -> dict[str, Tensor] | str:
    """The views of `target` that its parts fill, by going through the converter's steps backwards; or why not."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if len(converter.target_patterns) != 1:
        return "which also make other parameters"
    steps = [type(step) for step in converter.operations]
    if steps not in ([MergeModulelist], [Concatenate], [MergeModulelist, Concatenate]):
        return f"by {', '.join(step.__name__ for step in steps)}, which cannot be written in place"
    groups: dict[str, list[StoredShape]] = {pattern: [] for pattern in converter.source_patterns}
    for pattern, stored in members:
        groups[pattern].append(stored)
    if not all(groups.values()):
        return "some of which are missing"

    # What is concatenated: the stacks of all patterns, or where nothing is stacked the tensors themselves.
    stack = next((step for step in converter.operations if isinstance(step, MergeModulelist)), None)
    rows = list(groups.values()) if stack is not None else [[stored] for group in groups.values() for stored in group]
    joined: Sequence[Tensor] = [target]
    if steps[-1] is Concatenate:
        dim = converter.operations[-1].dim
        sizes = [_shape_of(row, stack)[dim] for row in rows]
        if sum(sizes) != target.shape[dim]:
            return f"which are {sum(sizes)} long in dimension {dim}, where the parameter has {target.shape[dim]}"
        joined = [target.narrow(dim, sum(sizes[:place]), size) for place, size in enumerate(sizes)]
    elif len(rows) != 1:
        return "of several kinds, with nothing said about their order"
    views: dict[str, Tensor] = {}
    for row, piece in zip(rows, joined, strict=True):
        places = [piece] if stack is None else piece.unbind(stack.dim)
        if len(places) != len(row):
            return f"of which there are {len(row)}, where the parameter has {len(places)}"
        views.update({stored.name: place for stored, place in zip(row, places, strict=True)})
    return views


def _shape_of(row: Sequence[StoredShape], stack: Any) -> list[int]:
    """The shape of what a row of tensors becomes before it is concatenated."""
    shape = list(row[0].shape)
    if stack is not None:
        shape.insert(stack.dim if stack.dim >= 0 else len(shape) + 1 + stack.dim, len(row))
    return shape


def _check(
    model: Any, live: Mapping[str, Tensor], views: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why the views do not fill the model exactly once, or None."""
    filled: dict[int, int] = defaultdict(int)
    for name, view in views.items():
        if view is None:
            continue
        if tuple(view.shape) != shapes[name]:
            return f"{name} is {_by(shapes[name])}, its place in the model {_by(view.shape)}"
        if not view.is_contiguous():
            return f"{name} lies scattered in its parameter"
        # Tied parameters are one tensor under several names; their views share its storage.
        filled[view.untyped_storage().data_ptr()] += view.numel()
    # A storage may hold several parameters, so sizes are compared storage by storage.
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in live.items():
        storage = tensor.untyped_storage().data_ptr()
        wanted[storage][id(tensor)] = tensor.numel()
        names[storage].append(name)
    empty, wrong = [], []
    for storage, tensors in wanted.items():
        size, found = sum(tensors.values()), filled[storage]
        if found == 0 and size:
            patterns = model._keys_to_ignore_on_load_missing or ()
            empty += [] if any(_is_declared(name, patterns) for name in names[storage]) else names[storage]
        elif found != size:
            wrong += names[storage]
    if empty:
        return f"{_listed(empty)} would be left as they are: the candidate does not store them"
    if wrong:
        return f"{_listed(wrong)} would not be filled exactly once (tied in the model, apart in the candidate?)"
    return None


def _is_declared(key: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, key) is not None for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
