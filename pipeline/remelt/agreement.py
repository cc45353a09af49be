"""Where parents agree and where they do not: names, shapes, dtypes and vocabulary, from headers alone.

Differences that are none are settled here: a tied head stored in one parent only, and buffers that models compute at
load. Every other difference is refused with what was found and the rule that would settle it.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from remelt.checkpoint import RAW, CheckpointIndex, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import MismatchError, RecipeError
from remelt.plan import models_read
from remelt.recipe import CopyRule, Recipe
from remelt.tensor_classes import classify
from remelt.treatment import Copy, Drop, Treatment

# Buffers that models compute when they load; older checkpoints store them, newer ones do not.
NON_PERSISTENT = re.compile(
    r"(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias"
    r"|position_ids)$"
)
_MAX_SHOWN = 5


class Targets(NamedTuple):
    """Names of the output, in storage order, before rules drop any."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


class Parents:
    """The opened checkpoints of a recipe, with what the planner asks of them."""

    def __init__(self, recipe: Recipe, indexes: tuple[CheckpointIndex, ...]) -> None:
        self.recipe, self.indexes = recipe, indexes
        self.layout = recipe.layout
        self.base_index = indexes[recipe.layout]
        self.num_hidden_layers = _num_hidden_layers(self.base_index)
        self.notes = [f"{index.source}: {note}" for index in indexes for note in index.notes]
        floating: Counter[str] = Counter()
        for info in self.base_index.tensors.values():
            if info.is_mergeable:
                floating[info.dtype] += info.num_elements
        self._majority = floating.most_common(1)[0][0] if floating else None
        self._read: dict[tuple[Treatment, ...], tuple[int, ...]] = {}
        if recipe.expected_layers is not None and self.num_hidden_layers not in (None, recipe.expected_layers):
            raise RecipeError(
                f"slices name layers 0 to {recipe.expected_layers}, {self.base_index.source} has "
                f"{self.num_hidden_layers}: only one range over all layers is supported; write layer_range: "
                f"[0, {self.num_hidden_layers}] or use `models:`"
            )

    def models_read(self, treatments: tuple[Treatment, ...]) -> tuple[int, ...]:
        """`plan.models_read`, remembered: a plan has few distinct treatments."""
        places = self._read.get(treatments)
        if places is None:
            places = self._read[treatments] = models_read(treatments)
        return places

    def label(self, place: int) -> str:
        return self.recipe.checkpoints[place].source

    def find(self, place: int, name: str) -> TensorInfo | None:
        """A tensor of one checkpoint; a head that it does not store because it is tied is its embedding."""
        index = self.indexes[place]
        info = index.tensors.get(name)
        if info is None and name.endswith(".weight") and classify(name).kind == "head" and is_tied(index):
            embedding = next((each for each in index.tensors if classify(each).kind == "embedding"), None)
            info = index.tensors[embedding] if embedding is not None else None
        return info

    def layout_info(self, name: str, treatment: Treatment) -> TensorInfo:
        """Shape and dtype that the output follows: the base's, or the copied checkpoint's."""
        info = self.base_index.tensors.get(name)
        if info is None or isinstance(treatment, Copy):
            info = self.find(treatment.model, name) if isinstance(treatment, Copy) else None
        if info is None:
            raise _missing(self, name, treatment)
        return info

    def with_fallbacks(self, name: str, treatments: tuple[Treatment, ...]) -> tuple[Treatment, ...]:
        """Copy a buffer that models compute at load from the base where a parent does not store it."""
        if isinstance(treatments[0], Drop) or not NON_PERSISTENT.search(name):
            return treatments
        if any(self.find(place, name) is None for place in self.models_read(treatments)):
            return (Copy(self.layout),) * len(treatments)
        return treatments

    def output_dtype(self, base_dtype: str) -> tuple[str, bool]:
        """Output dtype of a merged tensor, and whether it stays float32 although the recipe names a narrower one."""
        asked = self.recipe.out_dtype or self.recipe.dtype
        if self.recipe.dtype_all:
            return asked or self._majority or base_dtype, False
        if asked is None or asked == base_dtype:
            return base_dtype, False
        narrower = self._majority is not None and DTYPES[self._majority].item_bits < 32
        if base_dtype == "F32" and narrower:
            return base_dtype, True
        return asked, False


def target_names(parents: Parents) -> Targets:
    """The base's names in storage order, then tensors of other parents that a rule copies or drops.

    Raises MismatchError for a tensor that the base lacks and no rule speaks of.
    """
    known = parents.base_index.tensors
    extra: dict[str, int] = {}
    for place, index in enumerate(parents.indexes):
        if place == parents.layout or index.tensors.keys() <= known.keys():
            continue
        for name in index.tensors:
            if name not in known:
                extra.setdefault(name, place)
    if not extra:
        return Targets(tuple(known), ())
    spoken_for, ignored, unknown = [], [], []
    for name, place in extra.items():
        rule = _first_rule(parents.recipe, name, parents.num_hidden_layers)
        if rule is not None:
            spoken_for.append(name)
        elif NON_PERSISTENT.search(name) or _is_tied_copy(parents, place, name):
            ignored.append(name)
        else:
            unknown.append(name)
    if unknown:
        place = extra[unknown[0]]
        name = _pattern(unknown, known.keys() | extra.keys())
        raise MismatchError(
            f"{parents.label(place)} has {len(unknown)} tensors that the base {parents.base_index.source} lacks: "
            f"{_some(unknown)}. Say what becomes of them with a rule: {{match: {{name: {name!r}}}, drop: true}} or "
            f"{{match: {{name: {name!r}}}, copy: {parents.recipe.checkpoints[place].name}}}"
        )
    notes: tuple[str, ...] = ()
    if ignored:
        notes = (
            f"{len(ignored)} tied or computed tensors that the base does not store are left out: {_some(ignored)}",
        )
    return Targets((*known, *spoken_for), notes)


def agreed_sources(
    parents: Parents, name: str, treatments: tuple[Treatment, ...]
) -> tuple[tuple[int, TensorInfo], ...]:
    """Where the tensor lies in each checkpoint that its treatments read.

    Raises MismatchError where one lacks it, or shapes or dtypes disagree.
    """
    sources = []
    reference: TensorInfo | None = None
    reference_place = parents.layout
    for place in parents.models_read(treatments):
        info = parents.indexes[place].tensors.get(name)
        if info is None:
            info = parents.find(place, name)
            if info is None:
                raise _missing(parents, name, treatments[0], place)
        if reference is None:
            if isinstance(treatments[0], Copy):
                return ((place, info),)
            reference_place = parents.layout if name in parents.base_index.tensors else place
            reference = parents.indexes[reference_place].tensors[name]
        if info.shape != reference.shape:
            raise _shape_mismatch(parents, name, reference_place, reference, place, info)
        if info.dtype != reference.dtype or info.codec != reference.codec:
            _check_dtypes(parents, name, reference_place, reference, place, info)
        sources.append((place, info))
    return tuple(sources)


def is_tied(index: CheckpointIndex) -> bool:
    """Whether the head is the embedding: by config.json, or since no head is stored where config.json is silent."""
    tied = _text_config(index).get("tie_word_embeddings")
    if isinstance(tied, bool):
        return tied
    return not any(classify(name).kind == "head" for name in index.tensors)


def _text_config(index: CheckpointIndex) -> dict[str, object]:
    """Multimodal configs keep the language model's numbers one level down."""
    inner = index.config.get("text_config")
    return {**index.config, **(inner if isinstance(inner, dict) else {})}


def _num_hidden_layers(index: CheckpointIndex) -> int | None:
    number = _text_config(index).get("num_hidden_layers")
    return number if isinstance(number, int) else None


def _first_rule(recipe: Recipe, name: str, num_hidden_layers: int | None) -> int | None:
    from remelt.resolve import matches

    return next(
        (
            number
            for number, rule in enumerate(recipe.rules)
            if matches(rule.match, name, classify(name, num_hidden_layers))
        ),
        None,
    )


def _is_tied_copy(parents: Parents, place: int, name: str) -> bool:
    return classify(name).kind == "head" and is_tied(parents.indexes[place]) and is_tied(parents.base_index)


def _missing(parents: Parents, name: str, treatment: Treatment, place: int | None = None) -> MismatchError:
    if place is None:
        if not isinstance(treatment, Copy):
            return MismatchError(
                f"a rule merges {name!r}, which the base {parents.base_index.source} lacks: a merge takes its shape "
                "from the base. Copy it by a rule from a model that has it, or drop it"
            )
        place = treatment.model
    index = parents.indexes[place]
    absent = [each for each in parents.base_index.tensors if each not in index.tensors] or [name]
    copies = sum(isinstance(rule, CopyRule) for rule in parents.recipe.rules)
    base_name = parents.recipe.checkpoints[parents.layout].name
    name = _pattern(absent, parents.base_index.tensors)
    return MismatchError(
        f"{parents.label(place)} lacks {len(absent)} tensors that {parents.base_index.source} has: {_some(absent)}"
        + (" (a copy rule asks for one)" if copies and isinstance(treatment, Copy) else "")
        + f". Say what becomes of them with a rule: {{match: {{name: {name!r}}}, copy: {base_name}}} or "
        f"{{match: {{name: {name!r}}}, drop: true}}"
    )


def _shape_mismatch(
    parents: Parents, name: str, place_a: int, info_a: TensorInfo, place_b: int, info_b: TensorInfo
) -> MismatchError:
    shapes = f"{list(info_a.shape)} in {parents.label(place_a)} and {list(info_b.shape)} in {parents.label(place_b)}"
    found = f"{name} is {shapes}"
    kind = classify(name).kind
    if kind in ("embedding", "head") and info_a.shape[1:] == info_b.shape[1:]:
        base_name = parents.recipe.checkpoints[parents.layout].name
        return MismatchError(
            f"vocabulary mismatch: {found} ({info_a.shape[0]} against {info_b.shape[0]} tokens). To keep the base's "
            f"embeddings and head, add under `rules:` {{match: {{class: [embedding, head]}}, copy: {base_name}}}"
        )
    return MismatchError(
        f"shape mismatch: {found}. Parents must share one architecture; a rule can copy or drop the tensor: "
        f"{{match: {{name: {name!r}}}, copy: {parents.recipe.checkpoints[parents.layout].name}}}"
    )


def _check_dtypes(
    parents: Parents, name: str, place_a: int, info_a: TensorInfo, place_b: int, info_b: TensorInfo
) -> None:
    both_floating = info_a.is_mergeable and info_b.is_mergeable
    if both_floating and (parents.recipe.dtype or parents.recipe.out_dtype or parents.recipe.dtype_all):
        return
    kinds = [info.dtype if info.codec == RAW else f"{info.dtype} with block scales" for info in (info_a, info_b)]
    found = (
        f"dtype mismatch: {name} is {kinds[0]} in {parents.label(place_a)} and {kinds[1]} in {parents.label(place_b)}"
    )
    if both_floating:
        raise MismatchError(
            f"{found}. Arithmetic is in float32 whatever they are; say what to write with `dtype:` in the recipe, "
            "for example dtype: bfloat16"
        )
    raise MismatchError(
        f"{found}. They cannot be mixed: convert one parent, or copy the tensor by a rule: "
        f"{{match: {{name: {name!r}}}, copy: {parents.recipe.checkpoints[parents.layout].name}}}"
    )


def _pattern(names: Sequence[str], everything: Iterable[str]) -> str:
    """A glob for a rule: one that matches `names` and nothing else, or the first name where that is none."""
    start = os.path.commonprefix(names)  # noqa: RUF071 (characters are meant)
    end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]  # noqa: RUF071
    pattern = f"{start}*{end}"
    matched = set(fnmatch.filter(everything, pattern))
    return pattern if len(names) > 1 and matched == set(names) else names[0]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_SHOWN])
    return shown if len(names) <= _MAX_SHOWN else f"{shown}, and {len(names) - _MAX_SHOWN} more"
