"""Resident candidates: coefficients are merged straight into the parameters of a model that stays loaded.

The plan, the operators and the unit runner are those of a merge to disk; only the sink differs. So the digest is that
of a merge to disk, and the logits are those of a load of it, bit for bit. The model is built once, by loading a
checkpoint of the candidate's very names, shapes and dtypes whose values are holes in sparse files: transformers itself
says whether such a candidate loads completely. Candidates are then written over it, each of them whole. One that fails
on its way takes the model with it: the next is built anew, and half of a candidate is never scored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remelt.checkpoint import CheckpointIndex
from remelt.companions import companion_files, output_config
from remelt.direct import ParentReaders, merge_into
from remelt.errors import EvaluationError
from remelt.layout import INDEX_FILE, header_bytes
from remelt.memory import default_memory_bytes
from remelt.merge import open_checkpoints
from remelt.plan import MergePlan, Unit
from remelt.planner import Budget, build_plan
from remelt.recipe import Recipe
from remelt_evals.backends import BackendOptions
from remelt_evals.hf_backend import load_model
from remelt_evals.resident_places import StoredShape, find_places
from remelt_evals.resident_sink import ParameterSink, Place, make_place

SMALL_BYTES = 32 * 1024 * 1024
"""A checkpoint below this is merged by one thread: it is done before a second one has found its first block."""


class ResidentCandidate(NamedTuple):
    """A candidate in memory, whole."""

    model: Any
    """The transformers model; it holds this candidate until the next one is merged into it."""
    tokenizer: Any
    digest: str
    candidate_id: str
    read_bytes: int
    seconds: float
    """For the merge; building the model, where that was needed, is not in it."""


class _Live(NamedTuple):
    model: Any
    tokenizer: Any
    places: Mapping[str, Place]


class ResidentCandidates:
    """Merges candidates of one recipe, with any coefficients, into models that it holds; a context manager.

    One model is enough to score candidates one after another. Several candidates that are merged together are read
    once, and take a model each.
    """

    def __init__(
        self, options: BackendOptions, *, memory_bytes: int | None = None, threads: int = 1, scratch: Path | None = None
    ) -> None:
        """
        Args:
            options: of the Hugging Face backend.
            memory_bytes: what merging may hold beside the models, parents kept in memory included; half of the
                machine's by default.
            threads: of a merge.
            scratch: folder for the files that the model is built from; they hold no bytes of weights.
        """
        self._options = options
        self._memory_bytes = memory_bytes or default_memory_bytes()
        self._threads = threads
        self._scratch = scratch
        self._parents: tuple[tuple[str, ...], ParentReaders] | None = None
        self._layout: tuple[object, ...] = ()
        self._problem: str | None = None
        """Why candidates of this layout cannot be written in place."""
        self._live: list[_Live] = []
        self.num_built = 0
        """Models built so far."""

    def __enter__(self) -> ResidentCandidates:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def forget_models(self) -> None:
        """Give the models' memory back; the next merge builds anew. Parents stay open."""
        self._live = []

    def close(self) -> None:
        """Forget the models and let go of the parents."""
        self.forget_models()
        if self._parents is not None:
            self._parents[1].close()
            self._parents = None

    def merge(self, recipes: Sequence[Recipe]) -> list[ResidentCandidate] | str:
        """Merge bound recipes that differ in their parameters alone, each into a model, in one read of the parents.

        Candidates of an earlier call are written over.

        Returns:
            The candidates; or why this architecture's tensors cannot be written in place, so that candidates have to go
            by disk. Nothing is read then.

        Raises:
            RecipeError, CheckpointError, MismatchError, BudgetError, NonFiniteError, OperatorError: as a merge to disk.
            EvaluationError: the candidate does not load, or not completely.
        """
        parents = self._open(recipes[0])
        plan = build_plan(recipes, parents.indexes, self._budget(parents.indexes))
        problem = self._build(plan, parents.indexes[plan.layout_model], len(recipes))
        if problem is not None:
            return problem
        live, self._live = self._live, []

        def make_sink(unit: Unit, number: int) -> ParameterSink:
            return ParameterSink(unit, live[number].places)

        merged = merge_into(plan, parents, make_sink)
        # Only a merge that went through gives the models back.
        self._live = live
        return [
            ResidentCandidate(one.model, one.tokenizer, own.digest, own.candidate_id, own.read_bytes, own.seconds)
            for one, own in zip(live, merged, strict=False)
        ]

    def _budget(self, indexes: Sequence[CheckpointIndex]) -> Budget:
        is_small = max(sum(file.size for file in index.files) for index in indexes) < SMALL_BYTES
        return Budget(memory_bytes=self._memory_bytes, threads=1 if is_small else self._threads)

    def _open(self, recipe: Recipe) -> ParentReaders:
        """The recipe's parents, opened once for all candidates; those that changed are refused by the merge."""
        sources = tuple(checkpoint.source for checkpoint in recipe.checkpoints)
        if self._parents is None or self._parents[0] != sources:
            self.close()
            indexes = open_checkpoints(recipe)
            plan = build_plan(recipe, indexes, self._budget(indexes))
            self._parents = (sources, ParentReaders(indexes, self._memory_bytes - plan.projection.total_bytes))
        return self._parents[1]

    def _build(self, plan: MergePlan, layout: CheckpointIndex, count: int) -> str | None:
        """See to it that there are `count` models of the plan's layout; a sentence where there cannot be."""
        stored = [tensor.stored for unit in plan.units for tensor in unit.tensors]
        wanted = (plan.output_dtype, *((tensor.name, tensor.dtype, tensor.shape) for tensor in stored))
        if wanted != self._layout:
            self._live, self._layout, self._problem = [], wanted, None
        if any(tensor.dtype.startswith("F8") for tensor in stored):
            return "it stores scaled tensors, which are converted while they load"
        while self._problem is None and len(self._live) < count:
            with tempfile.TemporaryDirectory(prefix="remelt-skeleton-", dir=self._scratch) as folder:
                _write_skeleton(plan, layout, Path(folder))
                model, tokenizer = load_model(folder, self._options)
                _own_memory(model)
            self.num_built += 1
            found = find_places(model, [StoredShape(tensor.name, tensor.shape) for tensor in stored])
            self._problem = found.problem
            if found.problem is None:
                places = {tensor.name: make_place(found.views[tensor.name], tensor.dtype) for tensor in stored}
                self._live.append(_Live(model, tokenizer, places))
        return self._problem


def _write_skeleton(plan: MergePlan, layout: CheckpointIndex, folder: Path) -> None:
    """The candidate's checkpoint as a merge to disk would leave it, with holes in the place of values."""
    for name, source in companion_files(Path(layout.root)):
        shutil.copyfile(source, folder / name)
    if not layout.config:
        raise EvaluationError(f"{layout.source} has no config.json, so there is no model to merge into")
    (folder / "config.json").write_bytes(output_config(layout.config, plan.output_dtype, is_scaled=False))
    for unit in plan.units:
        header = header_bytes(tensor.stored for tensor in unit.tensors)
        with (folder / unit.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + unit.write_bytes)
    if len(plan.units) > 1:
        weight_map = {tensor.stored.name: unit.file for unit in plan.units for tensor in unit.tensors}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _own_memory(model: Any) -> None:
    """Put the parameters that still look into the skeleton's files into memory of their own; ties stay ties."""
    import torch

    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values():
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
