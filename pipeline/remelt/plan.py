"""The plan of a merge: frozen values that any executor can run, picklable and canonical as JSON.

A plan is arithmetic over headers: it holds names, shapes, byte ranges and resolved numbers, never a tensor. One unit
is one output shard. A plan carries C >= 1 coefficient sets: one read of the parents makes C outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from remelt.checkpoint import CheckpointIndex, SourceFile, TensorInfo
from remelt.treatment import Apply, Copy, Treatment


class StoredTensor(NamedTuple):
    """A tensor as the output shard stores it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the shard's data section."""
    nbytes: int


class PlannedTensor(NamedTuple):
    """One stored tensor of the output: what makes it, from which bytes, and where it is stored.

    A copied fp8 pair is two of these, codes and scales, each a copy of its own bytes.
    """

    name: str
    shape: tuple[int, ...]
    treatments: tuple[Treatment, ...]
    """One for each coefficient set: all `Apply`, or all the same `Copy`."""
    sources: tuple[tuple[int, TensorInfo], ...]
    """(place of the checkpoint, where its bytes lie), for each checkpoint that is read; in order of places."""
    stored: StoredTensor

    @property
    def read_bytes(self) -> int:
        """Bytes of one pass over the sources."""
        return sum(info.nbytes for _, info in self.sources)

    @property
    def write_bytes(self) -> int:
        """Bytes of one output."""
        return self.stored.nbytes

    @property
    def is_copy(self) -> bool:
        return isinstance(self.treatments[0], Copy)


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of planned work: one output shard of each coefficient set."""

    unit_id: str
    set_ids: tuple[str, ...]
    """The unit id that each coefficient set has when it is merged alone, so that an output never shows in which company
    it was made; with one set, `unit_id`."""
    index: int
    file: str
    """The shard's file name."""
    tensors: tuple[PlannedTensor, ...]
    """In the order of their bytes in the shard."""
    read_bytes: int
    """Bytes read, repeated passes included."""
    write_bytes: int
    """Bytes written for one coefficient set, without the header."""

    def of_sets(self, numbers: Sequence[int]) -> Unit:
        """The same unit for some of the coefficient sets."""
        tensors = (
            tensor._replace(treatments=tuple(tensor.treatments[number] for number in numbers))
            for tensor in self.tensors
        )
        set_ids = tuple(self.set_ids[number] for number in numbers)
        return replace(self, unit_id=joint_id(set_ids), set_ids=set_ids, tensors=tuple(tensors))


class ModelFiles(NamedTuple):
    """Where one checkpoint's files lie: all that a worker needs of it beside the units' byte ranges."""

    source: str
    root: str
    files: tuple[SourceFile, ...]
    stream: int


@dataclass(frozen=True, slots=True)
class Projection:
    """Projected memory of one process, as a sum of named terms in bytes."""

    terms: tuple[tuple[str, int], ...]
    allowed_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.terms)


class SurveyCut(NamedTuple):
    """A threshold that is looked for over the whole of a model."""

    set_number: int
    """The coefficient set."""
    place: int
    """Of the checkpoint."""
    rank: int
    """Magnitudes that are kept over all tensors."""


class Survey(NamedTuple):
    """What must be known of whole models before any unit can be merged; see `remelt.survey`."""

    cuts: tuple[SurveyCut, ...]
    identity: str


class GlobalBands(NamedTuple):
    """What a survey found: which magnitudes each tensor keeps."""

    cuts: tuple[SurveyCut, ...]
    bands: Mapping[str, tuple[tuple[int, int], ...]]
    """Tensor name to (lowest float32 bits kept, ties kept at them or -1 for all), for each cut."""

    def of(self, name: str, set_number: int, models: tuple[int, ...]) -> tuple[tuple[int, int] | None, ...]:
        """For each model of a tensor its band, or None where all is kept."""
        if not self.cuts:
            return (None,) * len(models)
        row = self.bands[name]
        by_place = {cut.place: row[number] for number, cut in enumerate(self.cuts) if cut.set_number == set_number}
        return tuple(by_place.get(place) for place in models)

    def of_sets(self, numbers: Sequence[int]) -> GlobalBands:
        """The bands of some of the coefficient sets, which are numbered anew."""
        kept = [place for place, cut in enumerate(self.cuts) if cut.set_number in numbers]
        cuts = (self.cuts[place] for place in kept)
        return GlobalBands(
            tuple(cut._replace(set_number=numbers.index(cut.set_number)) for cut in cuts),
            {name: tuple(row[place] for place in kept) for name, row in self.bands.items()},
        )


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a worker must know beside a unit: the same for every unit of a plan."""

    models: tuple[ModelFiles, ...]
    seed: int
    numerics: str
    device: str
    """`cpu` or `cuda`."""
    threads: int
    memory_bytes: int
    """What one process may hold beyond its idle imports."""
    allow_nonfinite: bool
    num_sets: int
    bands: GlobalBands | None = None
    """Found by a survey before the units are run, where the plan has one."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will do, decided before any tensor data is read."""

    run_id: str
    """sha256 of the unit ids."""
    run_ids: tuple[str, ...]
    """One for each coefficient set: the run id that it has when it is merged alone."""
    candidate_ids: tuple[str, ...]
    """One for each coefficient set: what it computes, without the layout."""
    recipes: tuple[Mapping[str, Any], ...]
    """The canonical form of each bound recipe."""
    settings: RunSettings
    survey: Survey | None
    """A whole-model statistic that is taken before the units are run, where an operator needs one."""
    units: tuple[Unit, ...]
    layout_model: int
    """Place of the checkpoint that gave layout, config and tokenizer."""
    projection: Projection
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """What a merge refuses although it can be planned, such as arithmetic on fp8 pairs."""
    operators_by_class: tuple[tuple[str, str, int, int], ...]
    """(tensor class, operator or 'copy', tensors, output bytes)."""
    output_dtype: str | None
    """The floating dtype of most of the output, for config.json; None where nothing is floating."""

    @property
    def read_bytes(self) -> int:
        return sum(unit.read_bytes for unit in self.units)

    @property
    def write_bytes(self) -> int:
        return sum(unit.write_bytes for unit in self.units) * self.settings.num_sets

    def of_sets(self, numbers: Sequence[int]) -> MergePlan:
        """What is left of the plan for some of its coefficient sets, once its survey is taken; numbered anew."""
        if list(numbers) == list(range(self.settings.num_sets)):
            return self
        bands = None if self.settings.bands is None else self.settings.bands.of_sets(numbers)
        run_ids = tuple(self.run_ids[number] for number in numbers)
        return replace(
            self,
            run_id=joint_id(run_ids),
            run_ids=run_ids,
            candidate_ids=tuple(self.candidate_ids[number] for number in numbers),
            recipes=tuple(self.recipes[number] for number in numbers),
            settings=replace(self.settings, num_sets=len(numbers), bands=bands),
            survey=None,
            units=tuple(unit.of_sets(numbers) for unit in self.units),
        )


class TensorRecord(NamedTuple):
    """What a run learned of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    num_nonfinite: int


class OutputRecord(NamedTuple):
    """One shard file of one coefficient set."""

    file: str
    nbytes: int
    sha256: str
    tensors: tuple[TensorRecord, ...]


@dataclass(frozen=True, slots=True)
class UnitReceipt:
    """Proof that a unit's shards are on disk, whole and synced."""

    unit_id: str
    outputs: tuple[OutputRecord, ...]
    """One for each coefficient set."""
    parents: tuple[tuple[int, TensorRecord], ...]
    """(place of the checkpoint, record) of each source tensor, digested on the way."""
    read_bytes: int
    write_bytes: int
    seconds: float
    peak_memory_bytes: int
    numerics: str

    def split(self, set_ids: Sequence[str]) -> tuple[UnitReceipt, ...]:
        """A receipt for each coefficient set, as if it had been merged alone; the bytes read are those of the pass."""
        return tuple(
            replace(self, unit_id=set_id, outputs=(output,), write_bytes=self.write_bytes // len(self.outputs))
            for set_id, output in zip(set_ids, self.outputs, strict=True)
        )

    def without_parents(self) -> UnitReceipt:
        """The receipt as it is kept in memory: records of parents stay in its file, there are K for each output."""
        return replace(self, parents=())

    def to_json(self) -> str:
        return json.dumps(
            {
                "unit_id": self.unit_id,
                "outputs": [output._asdict() for output in self.outputs],
                "parents": self.parents,
                "read_bytes": self.read_bytes,
                "write_bytes": self.write_bytes,
                "seconds": self.seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
                "numerics": self.numerics,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> UnitReceipt:
        """Read a receipt back; raises ValueError or KeyError where it is damaged."""
        fields = json.loads(text)
        return cls(
            fields["unit_id"],
            tuple(
                OutputRecord(o["file"], o["nbytes"], o["sha256"], tuple(_record(t) for t in o["tensors"]))
                for o in fields["outputs"]
            ),
            tuple((place, _record(record)) for place, record in fields["parents"]),
            fields["read_bytes"],
            fields["write_bytes"],
            fields["seconds"],
            fields["peak_memory_bytes"],
            fields["numerics"],
        )


def _record(fields: list[Any]) -> TensorRecord:
    name, dtype, shape, digest, num_nonfinite = fields
    return TensorRecord(name, dtype, tuple(shape), digest, num_nonfinite)


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces; floats must have been spelled by `exact` before."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def joint_id(ids: Sequence[str]) -> str:
    """The id of what has these ids by its coefficient sets; a single one is its own."""
    return ids[0] if len(ids) == 1 else sha256_hex(canonical_json(list(ids)))


def exact(value: Any) -> Any:
    """Spell floats as `float.hex` inside a JSON-safe value, so that an id depends on every bit of a coefficient."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    if isinstance(value, Mapping):
        return {key: exact(item) for key, item in value.items()}
    return value


def model_files(index: CheckpointIndex, stream: int) -> ModelFiles:
    return ModelFiles(index.source, index.root, index.files, stream)


def models_read(treatments: tuple[Treatment, ...]) -> tuple[int, ...]:
    """Places of the checkpoints that any of the treatments reads, sorted."""
    places: set[int] = set()
    for treatment in treatments:
        if isinstance(treatment, Apply):
            places.update(treatment.models)
            if treatment.base is not None:
                places.add(treatment.base)
        elif isinstance(treatment, Copy):
            places.add(treatment.model)
    return tuple(sorted(places))
