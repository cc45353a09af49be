"""What a study tries: the uniform merge and every single parent first, then what the searcher asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from remelt.checkpoint import CheckpointIndex
from remelt.commit import read_manifest
from remelt.formats import open_checkpoint
from remelt.hub import is_local
from remelt.recipe import Recipe
from remelt.recipe_checks import installed_operators, merged_entries
from remelt.searchers import SearchSpace
from remelt.starting_points import single, uniform

Origin: TypeAlias = Literal["uniform", "parent", "init", "searcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One thing to be scored: a binding of the recipe's variables, or a parent as it is."""

    number: int
    """Of its trial."""
    origin: Origin
    label: str
    """For people: `uniform`, a parent's name, `init`, or `trial 12`."""
    point: Mapping[str, float] = field(default_factory=dict)
    """In the searcher's box; empty unless a searcher asked for it."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Of the recipe's variables; empty for a parent that they cannot express."""
    model: int | None = None
    """For a parent, its place in `Recipe.checkpoints`; it is scored as it lies, never merged."""

    def to_record(self) -> dict[str, Any]:
        return asdict(self) | {"point": dict(self.point), "values": dict(self.values)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Candidate:
        return cls(**{name: record[name] for name in cls.__slots__})


def parent_places(recipe: Recipe) -> tuple[int, ...]:
    """Places in `Recipe.checkpoints` of the models that count in the merge; a base counts only where it is one."""
    operator = installed_operators()[recipe.merge_method]
    return tuple(dict.fromkeys(entry.model for entry in merged_entries(operator, recipe.base, recipe.entries)))


def starting_candidates(recipe: Recipe, space: SearchSpace) -> tuple[Candidate, ...]:
    """The uniform merge, every single parent, and the recipe's own starting values where they are another point."""
    values = uniform(recipe)
    starts = [Candidate(number=0, origin="uniform", label="uniform", values=values)]
    for place in parent_places(recipe):
        name, parent = recipe.checkpoints[place].name, single(recipe, place) or {}
        starts.append(Candidate(number=len(starts), origin="parent", label=name, values=parent, model=place))
    inits = space.values({variable.name: variable.init for variable in space.box})
    if any(abs(inits[name] - value) > 1e-9 for name, value in values.items()):
        starts.append(Candidate(number=len(starts), origin="init", label="init", values=inits))
    return tuple(starts)


def bound_recipe(recipe: Recipe, candidate: Candidate) -> Recipe | None:
    """The recipe that makes a candidate; None for a parent, which is scored as it lies."""
    return None if candidate.model is not None else recipe.bind(candidate.values)


def published_recipe(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe that publishes a candidate. A parent becomes a linear merge of itself alone: the same values."""
    if candidate.model is None:
        return recipe.bind(candidate.values)
    from remelt.recipe_yaml import parse_recipe

    checkpoint = recipe.checkpoints[candidate.model]
    models = [{"model": checkpoint.source, "name": checkpoint.name, "parameters": {"weight": 1.0}}]
    return parse_recipe({"merge_method": "linear", "models": models, "allow_nonfinite": recipe.allow_nonfinite})


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with local checkpoints by absolute path, for evaluators whose working directory is another."""
    return replace(
        recipe,
        checkpoints=tuple(
            ref._replace(source=str(Path(ref.source).expanduser().absolute())) if is_local(ref.source) else ref
            for ref in recipe.checkpoints
        ),
    )


class Opened(NamedTuple):
    """A checkpoint to be scored as it lies."""

    path: Path
    digest: str


def open_for_evaluation(source: str) -> Opened:
    """Find a checkpoint's folder, fetching it from the Hub if need be, and an identity of its weights.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    index = open_checkpoint(source)
    return Opened(Path(index.root), checkpoint_identity(index))


def checkpoint_identity(index: CheckpointIndex) -> str:
    """What identifies a checkpoint's weights without reading them whole.

    A merge made by remelt says its true digest in its manifest; of others the files' fingerprints are hashed.
    """
    manifest = read_manifest(Path(index.root))
    if manifest is not None:
        return str(manifest["digest"])
    fingerprints = " ".join(sorted(file.fingerprint for file in index.files))
    return "fingerprint:" + hashlib.sha256(fingerprints.encode()).hexdigest()
