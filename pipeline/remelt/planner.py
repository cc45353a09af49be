"""Plan a merge from a bound recipe and the parents' headers: pure, opens nothing.

Every input tensor ends up merged, copied, or dropped by an explicit rule, and every output tensor is planned once; what
does not fit is refused here, in seconds, before any tensor data is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remelt.agreement import Parents, agreed_sources, target_names
from remelt.checkpoint import RAW, CheckpointIndex, Piece, TensorInfo
from remelt.dtypes import DTYPES, tensor_bytes
from remelt.errors import RecipeError
from remelt.layout import Storable, cut_shards, order_in_shard, shard_names
from remelt.memory import Sizes, default_memory_bytes, held_bytes, project, rounds_of
from remelt.numerics import numerics_tag
from remelt.parent_notes import parent_notes
from remelt.plan import (
    MergePlan,
    PlannedTensor,
    RunSettings,
    StoredTensor,
    Survey,
    Unit,
    canonical_json,
    exact,
    joint_id,
    model_files,
    models_read,
    sha256_hex,
)
from remelt.recipe import Recipe
from remelt.recipe_checks import installed_operators
from remelt.resolve import find_unused, resolve
from remelt.survey import NUM_ROUNDS, find_survey, is_global
from remelt.tensor_classes import classify
from remelt.treatment import Apply, Copy, Drop, Treatment


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one process may use. None takes the machine's: half of its memory, all of its cores."""

    memory_bytes: int | None = None
    threads: int = 1
    num_workers: int = 1
    """Processes that share the machine; divides the default memory."""
    device: str = "cpu"


class _Draft:
    """A tensor of the output before it has a place."""

    __slots__ = ("dtype", "home", "name", "shape", "sources", "treatments")

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        treatments: tuple[Treatment, ...],
        sources: tuple[tuple[int, TensorInfo], ...],
        home: int,
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.treatments, self.sources, self.home = treatments, sources, home


def build_plan(
    recipe: Recipe | Sequence[Recipe], indexes: Sequence[CheckpointIndex], budget: Budget | None = None
) -> MergePlan:
    """Plan the merge of `indexes` (one for each of the recipe's checkpoints, in their order).

    Several bound recipes that differ in numbers alone make one plan with as many coefficient sets: the parents are
    read once for all of them.

    Raises:
        RecipeError: a recipe is not bound, or the recipes differ in more than numbers.
        MismatchError: parents disagree in names, shapes, dtypes or vocabulary.
        BudgetError: the memory allowance is too small.
    """
    budget = budget or Budget()
    recipes = (recipe,) if isinstance(recipe, Recipe) else tuple(recipe)
    _check_recipes(recipes, indexes)
    first = recipes[0]
    parents = Parents(first, tuple(indexes))
    targets = target_names(parents)
    columns = [resolve(each, targets.names, num_hidden_layers=parents.num_hidden_layers) for each in recipes]
    drafts, dropped, notes, warnings = _draft_tensors(parents, targets.names, list(zip(*columns, strict=True)))
    unused = find_unused(first, targets.names, num_hidden_layers=parents.num_hidden_layers)
    notes = [*first.notes, *parents.notes, *parent_notes(parents.base_index, indexes), *targets.notes, *notes, *unused]
    by_class = _operators_by_class(drafts, parents.num_hidden_layers, len(recipes))

    groups = _place(drafts, first)
    allowed = budget.memory_bytes or default_memory_bytes(budget.num_workers)
    sizes, projection = project(
        [tensor for group in groups for tensor in group],
        num_records=max(len(group) for group in groups) * (len(indexes) + len(recipes)),
        threads=budget.threads,
        num_sets=len(recipes),
        allowed_bytes=allowed,
        device=budget.device,
    )
    numerics = numerics_tag(budget.device)
    streams = [checkpoint.stream for checkpoint in first.checkpoints]
    fingerprints = [[file.fingerprint for file in index.files] for index in indexes]
    survey, set_surveys = _find_surveys(drafts, len(recipes), fingerprints)
    if survey is not None and budget.device != "cpu":
        raise RecipeError("`topk: global` is counted on the CPU so far; use --device cpu or `topk: tensor`")
    units = tuple(
        _make_unit(number, file, group, fingerprints, numerics, first.seed, streams, sizes, set_surveys)
        for number, (file, group) in enumerate(zip(shard_names(len(groups)), groups, strict=True))
    )
    settings = RunSettings(
        models=tuple(
            model_files(index, checkpoint.stream) for index, checkpoint in zip(indexes, first.checkpoints, strict=True)
        ),
        seed=first.seed,
        numerics=numerics,
        device=budget.device,
        threads=budget.threads,
        memory_bytes=allowed,
        allow_nonfinite=first.allow_nonfinite,
        num_sets=len(recipes),
    )
    run_ids = tuple(
        sha256_hex(canonical_json([unit.set_ids[number] for unit in units])) for number in range(len(recipes))
    )
    return MergePlan(
        run_id=joint_id(run_ids),
        run_ids=run_ids,
        candidate_ids=tuple(
            _candidate_id(drafts, number, fingerprints, numerics, first.seed, streams) for number in range(len(recipes))
        ),
        recipes=tuple(each.canonical() for each in recipes),
        settings=settings,
        survey=survey,
        units=units,
        layout_model=first.layout,
        projection=projection,
        dropped=tuple(dropped),
        notes=tuple(notes),
        warnings=tuple(warnings),
        operators_by_class=by_class,
        output_dtype=_majority_dtype((draft.dtype, draft.shape) for draft in drafts),
    )


def plan_sizes(plan: MergePlan, units: Iterable[Unit] | None = None) -> Sizes:
    """Buffer sizes for running a plan's units in one process; the same numbers that the projection was made of."""
    chosen = plan.units if units is None else tuple(units)
    sizes, _ = project(
        [tensor for unit in chosen for tensor in unit.tensors],
        num_records=max((len(unit.tensors) for unit in chosen), default=0)
        * (len(plan.settings.models) + plan.settings.num_sets),
        threads=plan.settings.threads,
        num_sets=plan.settings.num_sets,
        allowed_bytes=plan.settings.memory_bytes,
        device=plan.settings.device,
    )
    return sizes


def _check_recipes(recipes: Sequence[Recipe], indexes: Sequence[CheckpointIndex]) -> None:
    first = recipes[0]
    for recipe in recipes:
        if not recipe.is_bound:
            names = ", ".join(variable.name for variable in recipe.variables)
            raise RecipeError(
                f"the recipe has ranges to search ({names}): write numbers in their places, or use `remelt search`"
            )
        if _without_numbers(recipe.canonical()) != _without_numbers(first.canonical()):
            raise RecipeError("coefficient sets of one plan must be recipes that differ in their parameters alone")
    if len(indexes) != len(first.checkpoints):
        raise RecipeError(f"the recipe names {len(first.checkpoints)} checkpoints, {len(indexes)} were opened")


def _without_numbers(document: Any) -> Any:
    """A recipe's canonical form with its parameters left out; models that a rule names keep their names."""
    if isinstance(document, Mapping):
        if isinstance(document.get("models"), Mapping):
            # A rule's models: names to their parameters.
            document = {**document, "models": sorted(document["models"])}
        left_out = {"parameters"} if "model" in document else {"parameters", "name"}
        return {key: _without_numbers(value) for key, value in document.items() if key not in left_out}
    if isinstance(document, list):
        return [_without_numbers(item) for item in document]
    return document


def _draft_tensors(
    parents: Parents, names: Sequence[str], rows: Sequence[tuple[Treatment, ...]]
) -> tuple[list[_Draft], list[str], list[str], list[str]]:
    """One draft for each stored tensor of the output, in the base's storage order, with what to tell the user."""
    drafts: list[_Draft] = []
    dropped: list[str] = []
    notes: list[str] = []
    scaled: list[str] = []
    integers: list[str] = []
    kept_wide: list[str] = []
    for name, row in zip(names, rows, strict=True):
        treatments = parents.with_fallbacks(name, row)
        first = treatments[0]
        if isinstance(first, Drop) and all(isinstance(treatment, Drop) for treatment in treatments):
            dropped.append(name)
            continue
        layout_info = parents.layout_info(name, first)
        if isinstance(first, Apply) and layout_info.codec == RAW and not DTYPES[layout_info.dtype].is_floating:
            integers.append(name)
            first = Copy(parents.layout)
            treatments = (first,) * len(row)
        if len({type(treatment) for treatment in treatments}) > 1 or (
            isinstance(first, Copy) and len(set(treatments)) > 1
        ):
            raise RecipeError(
                f"coefficient sets of one plan disagree on {name}: a copy in one, something else in another"
            )
        sources = agreed_sources(parents, name, treatments)
        base_info = parents.base_index.tensors.get(name)
        # A tensor that the base lacks goes after all of the base's files.
        home = len(parents.base_index.files) if base_info is None else base_info.pieces[0].file
        if isinstance(first, Copy):
            drafts.extend(_copy_drafts(name, treatments, first.model, sources[0][1], home))
            continue
        if not all(info.is_mergeable for _, info in sources):
            scaled.append(name)
            drafts.append(_Draft(name, layout_info.dtype, layout_info.shape, treatments, sources, home))
            continue
        dtype, is_kept_wide = parents.output_dtype(layout_info.dtype)
        if is_kept_wide:
            kept_wide.append(name)
        drafts.append(_Draft(name, dtype, layout_info.shape, treatments, sources, home))
    if integers:
        notes.append(f"{len(integers)} integer tensors are copied from the base, such as {integers[0]}")
    if kept_wide:
        notes.append(
            f"{len(kept_wide)} tensors stay in float32 as the base keeps them, such as {kept_wide[0]}; "
            "`dtype: all` casts them too"
        )
    warnings = []
    if scaled:
        warnings.append(
            f"{len(scaled)} tensors are fp8 with block scales, such as {scaled[0]}: arithmetic on them is not "
            "supported yet and a merge of this plan is refused; copy them by a rule, "
            "or dequantise the parents to bfloat16 first"
        )
    return drafts, dropped, notes, warnings


def _copy_drafts(
    name: str, treatments: tuple[Treatment, ...], place: int, info: TensorInfo, home: int
) -> Iterable[_Draft]:
    """A copied tensor, or the parts of a copied pair, each a raw copy of its own bytes."""
    for piece in info.pieces:
        raw = TensorInfo(piece.dtype, piece.shape, RAW, (Piece(*piece[:5]),))
        yield _Draft(piece.part or name, piece.dtype, piece.shape, treatments, ((place, raw),), home)


def _place(drafts: Sequence[_Draft], recipe: Recipe) -> list[list[PlannedTensor]]:
    """Cut the drafts into shards and give each tensor its offset."""
    storables = [
        Storable(draft.name, draft.dtype, draft.shape, tensor_bytes(draft.dtype, draft.shape), draft.home)
        for draft in drafts
    ]
    shards = cut_shards(
        storables, max_shard_bytes=recipe.max_shard_bytes, keep_base_files=recipe.shard_layout == "base"
    )
    groups = []
    for shard in shards:
        group, offset = [], 0
        for place in order_in_shard(shard, storables):
            draft, nbytes = drafts[place], storables[place].nbytes
            stored = StoredTensor(draft.name, draft.dtype, draft.shape, offset, nbytes)
            group.append(PlannedTensor(draft.name, draft.shape, draft.treatments, draft.sources, stored))
            offset += nbytes
        groups.append(group)
    if not groups:
        raise RecipeError("the recipe's rules drop every tensor; nothing is left to write")
    return groups


def _make_unit(
    number: int,
    file: str,
    group: Sequence[PlannedTensor],
    fingerprints: Sequence[Sequence[str]],
    numerics: str,
    seed: int,
    streams: Sequence[int],
    sizes: Sizes,
    set_surveys: Sequence[Survey | None],
) -> Unit:
    sources = _sources_identity(group, fingerprints)
    set_ids = []
    for set_number, survey in enumerate(set_surveys):
        table: dict[Treatment, int] = {}
        tensors = [
            [
                tensor.name,
                tensor.stored.dtype,
                tensor.shape,
                [table.setdefault(tensor.treatments[set_number], len(table))],
            ]
            for tensor in group
        ]
        identity = {
            "file": file,
            "tensors": tensors,
            "treatments": [treatment_identity(treatment) for treatment in table],
            "sources": sources,
            "numerics": numerics,
            "randomness": _randomness(table, seed, streams),
        }
        if survey is not None and any(is_global(treatment) for treatment in table):
            # A threshold over the whole model depends on tensors of other units, too.
            identity["survey"] = survey.identity
        set_ids.append(sha256_hex(canonical_json(identity)))
    return Unit(
        joint_id(set_ids),
        tuple(set_ids),
        number,
        file,
        tuple(group),
        sum(tensor.read_bytes * _passes(tensor, sizes, numerics.partition("-")[0]) for tensor in group),
        sum(tensor.write_bytes for tensor in group),
    )


def _find_surveys(
    drafts: Sequence[_Draft], num_sets: int, fingerprints: Sequence[Sequence[str]]
) -> tuple[Survey | None, list[Survey | None]]:
    """The survey of all coefficient sets together, and the one that each would need alone."""
    together = find_survey(((draft.name, draft.shape, draft.treatments) for draft in drafts), fingerprints)
    if together is None or num_sets == 1:
        return together, [together] * num_sets
    alone = [
        find_survey(((draft.name, draft.shape, (draft.treatments[number],)) for draft in drafts), fingerprints)
        for number in range(num_sets)
    ]
    return together, alone


def treatment_identity(treatment: Treatment) -> list[object]:
    """What of a treatment enters ids: everything that decides bytes, floats spelled exactly."""
    if isinstance(treatment, Apply):
        version = installed_operators()[treatment.operator].version
        return ["apply", version, *(exact(part) for part in treatment)]
    assert isinstance(treatment, Copy)
    return ["copy", treatment.model]


def _sources_identity(tensors: Iterable[PlannedTensor], fingerprints: Sequence[Sequence[str]]) -> list[list[object]]:
    files: set[tuple[int, str]] = set()
    for tensor in tensors:
        for place, info in tensor.sources:
            for piece in info.pieces:
                files.add((place, fingerprints[place][piece.file]))
    return [[place, fingerprint] for place, fingerprint in sorted(files)]


def _candidate_id(
    drafts: Sequence[_Draft],
    number: int,
    fingerprints: Sequence[Sequence[str]],
    numerics: str,
    seed: int,
    streams: Sequence[int],
) -> str:
    table: dict[Treatment, int] = {}
    tensors = [
        [draft.name, draft.dtype, draft.shape, table.setdefault(draft.treatments[number], len(table))]
        for draft in drafts
    ]
    tensors.sort()
    numbering = {place: order for order, place in enumerate(dict.fromkeys(row[3] for row in tensors))}
    for row in tensors:
        row[3] = numbering[row[3]]
    treatments = sorted((numbering[place], treatment_identity(treatment)) for treatment, place in table.items())
    identity = {
        "tensors": tensors,
        "treatments": [treatment for _, treatment in treatments],
        "sources": [sorted(files) for files in fingerprints],
        "numerics": numerics,
        "randomness": _randomness(table, seed, streams),
    }
    return sha256_hex(canonical_json(identity))


def _randomness(treatments: Iterable[Treatment], seed: int, streams: Sequence[int]) -> list[object] | None:
    """What the draws depend on beside names and options: the seed, and the stream of each model that is drawn for."""
    models = {place for treatment in treatments if _is_random(treatment) for place in models_read((treatment,))}
    return [seed, [[place, streams[place]] for place in sorted(models)]] if models else None


def _is_random(treatment: Treatment) -> bool:
    return isinstance(treatment, Apply) and installed_operators()[treatment.operator].is_random


def _passes(tensor: PlannedTensor, sizes: Sizes, device: str) -> int:
    """How often a tensor's sources are read: once, unless the arena cannot keep them between rounds."""
    return 1 if held_bytes(tensor, device) <= sizes.arena_bytes else 1 + rounds_of(tensor, device)


def _operators_by_class(
    drafts: Iterable[_Draft], num_hidden_layers: int | None, num_sets: int
) -> tuple[tuple[str, str, int, int], ...]:
    tensors: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for draft in drafts:
        treatment = draft.treatments[0]
        operator = treatment.operator if isinstance(treatment, Apply) else "copy"
        key = (classify(draft.name, num_hidden_layers).kind, operator)
        tensors[key] += 1
        sizes[key] += tensor_bytes(draft.dtype, draft.shape) * num_sets
    return tuple((*key, tensors[key], sizes[key]) for key in sorted(tensors))


def _majority_dtype(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    sizes: Counter[str] = Counter()
    for dtype, shape in tensors:
        if DTYPES[dtype].is_mergeable:
            sizes[dtype] += tensor_bytes(dtype, shape) * 8 // DTYPES[dtype].item_bits
    return sizes.most_common(1)[0][0] if sizes else None


def plan_summary(plan: MergePlan, *, full: bool = False) -> Mapping[str, object]:
    """The plan as JSON values: `remelt plan --json`; with `full`, the units and their tensors as well."""
    summary: dict[str, object] = {
        "run_id": plan.run_id,
        "candidate_ids": list(plan.candidate_ids),
        "numerics": plan.settings.numerics,
        "num_tensors": sum(len(unit.tensors) for unit in plan.units),
        "num_units": len(plan.units),
        "num_phases": 1 if plan.survey is None else 1 + NUM_ROUNDS,
        "coefficient_sets": plan.settings.num_sets,
        "bytes_read": plan.read_bytes,
        "bytes_written": plan.write_bytes,
        "operators_by_class": [
            {"class": kind, "operator": operator, "tensors": tensors, "bytes": size}
            for kind, operator, tensors, size in plan.operators_by_class
        ],
        "memory": {
            "projected_bytes": plan.projection.total_bytes,
            "allowed_bytes": plan.projection.allowed_bytes,
            "terms": dict(plan.projection.terms),
        },
        "checkpoints": [model.source for model in plan.settings.models],
        "dropped": len(plan.dropped),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }
    if full:
        summary["dropped_tensors"] = list(plan.dropped)
        summary["units"] = [
            {
                "unit_id": unit.unit_id,
                "file": unit.file,
                "bytes_read": unit.read_bytes,
                "bytes_written": unit.write_bytes,
                "tensors": [
                    {
                        "name": tensor.name,
                        "dtype": tensor.stored.dtype,
                        "shape": list(tensor.shape),
                        "treatment": tensor.treatments[0]._asdict() | {"kind": type(tensor.treatments[0]).__name__},
                    }
                    for tensor in unit.tensors
                ],
            }
            for unit in plan.units
        ]
    return summary
