"""One threshold over the whole model: what `topk: global` needs to know before any tensor can be merged.

Three passes over the parents, each a sum over units that any executor can take: the upper bits of all magnitudes, the
lower bits of the one bin that holds the wanted rank, and for each tensor how many elements tie at the threshold. From
the last follows which tensors keep their ties: names in sorted order, as the TIES code flattens a model (Yadav et al.
2023, section 3), then flat indexes. Counts are integers, so that no order of units, workers or threads changes them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.dtypes import DTYPES
from remelt.errors import RecipeError
from remelt.kernels.footprint import LOWER_BINS, TABLES, UPPER_BINS
from remelt.kernels.program import Block, geometry_of
from remelt.memory import Sizes, tensor_block_rows
from remelt.operators.quantities import kept_range, per_model
from remelt.plan import (
    GlobalBands,
    MergePlan,
    PlannedTensor,
    RunSettings,
    Survey,
    SurveyCut,
    Unit,
    canonical_json,
    sha256_hex,
)
from remelt.range_reader import RangeReader
from remelt.stored_bits import as_stored
from remelt.treatment import Apply, Treatment

NUM_ROUNDS = 3
Counts = NDArray[np.int64]


class SurveyRequest(NamedTuple):
    """What a pass asks of every unit."""

    round_: int
    cuts: tuple[SurveyCut, ...]
    bits: tuple[int, ...]
    """For each cut: nothing yet, the upper bits of its bin, or its whole threshold."""


class UnitCounts(NamedTuple):
    """What a pass found in one unit."""

    counts: Counts
    """(cuts, bins) in the first two rounds."""
    ties: dict[str, tuple[int, ...]]
    """Tensor name to ties of each cut, in the last round."""
    read_bytes: int


def is_global(treatment: Treatment) -> bool:
    """Whether a treatment needs a threshold over the whole model."""
    return isinstance(treatment, Apply) and dict(treatment.options).get("topk") == "global"


def find_survey(
    tensors: Iterable[tuple[str, tuple[int, ...], tuple[Treatment, ...]]], fingerprints: Sequence[Sequence[str]]
) -> Survey | None:
    """What must be counted for (name, shape, treatments) of a plan's tensors, or None.

    Raises RecipeError where a model's density is not one number for the whole model.
    """
    densities: dict[tuple[int, int], float] = {}
    elements: dict[tuple[int, int], int] = {}
    names = []
    for name, shape, treatments in tensors:
        for number, treatment in enumerate(treatments):
            if not isinstance(treatment, Apply) or not is_global(treatment):
                continue
            names.append([number, name, shape])
            options: dict[str, Any] = dict(treatment.options)
            for place, density in zip(
                treatment.models, per_model(options["density"], len(treatment.models)), strict=True
            ):
                key = (number, place)
                if densities.setdefault(key, density) != density:
                    raise RecipeError(
                        f"`topk: global` ranks a whole model, so its density is one number; {name} asks for "
                        f"{density:g}, tensors before it for {densities[key]:g}. Give one density, or use "
                        "`topk: tensor`"
                    )
                elements[key] = elements.get(key, 0) + geometry_of(name, shape).num_elements
    if not names:
        return None
    cuts = []
    for (number, place), density in densities.items():
        _, kept = kept_range(elements[number, place], density)
        if 0 < kept < elements[number, place]:
            cuts.append(SurveyCut(number, place, kept))
    identity = sha256_hex(canonical_json([sorted(names), sorted(cuts), [sorted(files) for files in fingerprints]]))
    return Survey(tuple(sorted(cuts)), identity)


def survey_bytes(plan: MergePlan) -> int:
    """Bytes that the passes read."""
    if plan.survey is None or not plan.survey.cuts:
        return 0
    return NUM_ROUNDS * sum(
        tensor.read_bytes
        for unit in plan.units
        for tensor in unit.tensors
        if any(is_global(treatment) for treatment in tensor.treatments)
    )


def measure_unit(
    unit: Unit, settings: RunSettings, sizes: Sizes, readers: Sequence[RangeReader], request: SurveyRequest
) -> UnitCounts:
    """One pass over a unit's tensors, with all threads."""
    items = chain.from_iterable(_blocks(tensor, settings, sizes) for tensor in unit.tensors)
    lock = threading.Lock()
    tallies = [_Tally(request) for _ in range(settings.threads)]
    failures: list[BaseException] = []

    def work(tally: _Tally) -> None:
        buffer = np.empty(sizes.source_bytes, np.uint8)
        try:
            while not failures:
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                _measure_block(*item, readers, buffer, tally)
        except BaseException as failure:  # handed to the calling thread
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(tally,), daemon=True) for tally in tallies[1:]]
    for thread in threads:
        thread.start()
    work(tallies[0])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    ties: dict[str, Counts] = {}
    if request.round_ == 2:
        # Empty tensors, too: each has a band.
        ties = {
            tensor.name: np.zeros(len(request.cuts), np.int64)
            for tensor in unit.tensors
            if any(is_global(treatment) for treatment in tensor.treatments)
        }
    for tally in tallies:
        for name, found in tally.ties.items():
            ties[name] = ties[name] + found
    return UnitCounts(
        sum((tally.total() for tally in tallies), np.zeros((len(request.cuts), 1), np.int64)),
        {name: tuple(int(count) for count in found) for name, found in ties.items()},
        sum(tally.read_bytes for tally in tallies),
    )


def _blocks(tensor: PlannedTensor, settings: RunSettings, sizes: Sizes) -> Iterable[tuple[PlannedTensor, int, int]]:
    if not any(is_global(treatment) for treatment in tensor.treatments):
        return
    geometry = geometry_of(tensor.name, tensor.shape)
    rows = tensor_block_rows(tensor, geometry, sizes.block_elements, settings.device)
    for first in range(0, geometry.num_rows, rows):
        yield tensor, first, min(first + rows, geometry.num_rows)


class _Tally:
    """One thread's counters."""

    def __init__(self, request: SurveyRequest) -> None:
        self.request = request
        self.ties: dict[str, Counts] = {}
        self.read_bytes = 0
        self._upper = np.zeros((len(request.cuts), UPPER_BINS), np.int64) if request.round_ == 0 else None
        self._lower = np.zeros((len(request.cuts), LOWER_BINS), np.uint64) if request.round_ == 1 else None

    def total(self) -> Counts:
        if self._upper is not None:
            return self._upper
        return np.zeros((len(self.request.cuts), 1), np.int64) if self._lower is None else self._lower.astype(np.int64)

    def add(self, name: str, apply: Apply, numbers: list[int], block: Block, dtypes: Mapping[int, str]) -> None:
        """Count one block for the cuts `numbers`, which are in the order of the operator's models."""
        from remelt.kernels import select
        from remelt.kernels.cpu_sources import Sources

        assert apply.base is not None
        geometry = geometry_of(name, (block.num_rows, len(block.tensors_K[0]) // block.num_rows))
        sources = Sources(geometry, dtypes[apply.base], [dtypes[place] for place in apply.models], "F32", 1)
        addresses, count = sources.addresses(block), sources.num_elements(block)
        models = np.array([apply.models.index(self.request.cuts[number].place) for number in numbers], np.int64)
        bits = np.array([self.request.bits[number] for number in numbers], np.uint32)
        if self._upper is not None:
            table = np.zeros((sources.num_models, UPPER_BINS * TABLES), np.uint32)
            is_wanted = np.isin(np.arange(sources.num_models), models)
            select.count_upper(addresses, sources.kinds, is_wanted, count, table)
            for number, model in zip(numbers, models, strict=True):
                self._upper[number] += table[model].reshape(UPPER_BINS, TABLES).sum(1, dtype=np.int64)
        elif self._lower is not None:
            table_of_cuts = np.zeros((len(numbers), LOWER_BINS), np.uint64)
            select.count_lower(addresses, sources.kinds, models, bits, count, table_of_cuts)
            self._lower[numbers] += table_of_cuts
        else:
            ties = np.zeros((sources.num_leaves(block), len(numbers)), np.int64)
            select.count_ties(addresses, sources.kinds, models, bits, sources.leaf_elements, count, ties)
            of_tensor = self.ties.setdefault(name, np.zeros(len(self.request.cuts), np.int64))
            of_tensor[numbers] += ties.sum(0)


def _measure_block(
    tensor: PlannedTensor,
    first: int,
    stop: int,
    readers: Sequence[RangeReader],
    buffer: NDArray[np.uint8],
    tally: _Tally,
) -> None:
    row_length = geometry_of(tensor.name, tensor.shape).row_length
    stored, dtypes, used = {}, {}, 0
    for place, info in tensor.sources:
        itemsize = DTYPES[info.dtype].item_bits // 8
        size = (stop - first) * row_length * itemsize
        view = buffer[used : used + size]
        used += size
        readers[place].read_into(info, first * row_length * itemsize, view)
        tally.read_bytes += size
        stored[place], dtypes[place] = as_stored(view, info.dtype), info.dtype
    for set_number, treatment in enumerate(tensor.treatments):
        if not isinstance(treatment, Apply) or not is_global(treatment):
            continue
        cuts = tally.request.cuts
        numbers = [
            number
            for place in treatment.models
            for number, cut in enumerate(cuts)
            if (cut.set_number, cut.place) == (set_number, place)
        ]
        if numbers:
            block = Block(
                0, first, stop - first, stored[treatment.base or 0], tuple(stored[place] for place in treatment.models)
            )
            tally.add(tensor.name, treatment, numbers, block, dtypes)


class SurveyResult:
    """The passes as they are summed up: ask `request` for each, `take` every unit, `finish_round`."""

    def __init__(self, survey: Survey) -> None:
        self._cuts = survey.cuts
        self._rest = [cut.rank for cut in survey.cuts]
        self._bits = [0] * len(survey.cuts)
        self._counts: Counts = np.zeros((len(survey.cuts), 1), np.int64)
        self._ties: dict[str, tuple[int, ...]] = {}

    def request(self, round_: int) -> SurveyRequest:
        return SurveyRequest(round_, self._cuts, tuple(self._bits))

    def take(self, found: UnitCounts) -> None:
        self._counts = self._counts + found.counts
        self._ties.update(found.ties)

    def finish_round(self, round_: int) -> None:
        if round_ < 2:
            for number, counts in enumerate(self._counts):
                from_top = np.cumsum(counts[::-1])
                place = int(np.searchsorted(from_top, self._rest[number], side="left"))
                chosen = len(counts) - 1 - place
                self._rest[number] -= int(from_top[place] - counts[chosen])
                self._bits[number] = chosen if round_ == 0 else self._bits[number] << 16 | chosen
        self._counts = np.zeros((len(self._cuts), 1), np.int64)

    def bands(self) -> GlobalBands:
        """What each tensor keeps, once all rounds are finished."""
        left = list(self._rest)
        bands: dict[str, tuple[tuple[int, int], ...]] = {}
        for name in sorted(self._ties):
            row = []
            for number, ties in enumerate(self._ties[name]):
                threshold = self._bits[number]
                is_partial = 0 < left[number] < ties
                row.append((threshold + (left[number] <= 0 < ties), left[number] if is_partial else -1))
                left[number] = max(0, left[number] - ties)
            bands[name] = tuple(row)
        return GlobalBands(self._cuts, bands)


def take_survey(survey: Survey, measure: Callable[[SurveyRequest], Iterable[UnitCounts]]) -> GlobalBands:
    """All passes of a survey; `measure` makes one of them over every unit of the plan."""
    result = SurveyResult(survey)
    for round_ in range(NUM_ROUNDS if survey.cuts else 0):
        for found in measure(result.request(round_)):
            result.take(found)
        result.finish_round(round_)
    return result.bands()


def bands_to_json(identity: str, bands: GlobalBands) -> str:
    return json.dumps({"identity": identity, "cuts": bands.cuts, "bands": dict(bands.bands)})


def bands_from_json(text: str, survey: Survey) -> GlobalBands | None:
    """The bands of an earlier run of the same survey, else None."""
    try:
        found = json.loads(text)
        if found["identity"] != survey.identity:
            return None
        return GlobalBands(
            survey.cuts, {name: tuple((low, rest) for low, rest in row) for name, row in found["bands"].items()}
        )
    except (ValueError, KeyError, TypeError):
        return None
