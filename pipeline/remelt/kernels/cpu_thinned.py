"""CPU programs of operators that thin task vectors: by draws, by magnitude over the tensor, or by rank in the row."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.draws import draw_keys
from remelt.kernels import elements, rows, select
from remelt.kernels.combine import GROUP
from remelt.kernels.cpu_sources import Sources, address_of
from remelt.kernels.cpu_weighted import add_leaves
from remelt.kernels.footprint import CANDIDATE_LIMIT, LOWER_BINS, TABLES, UPPER_BINS
from remelt.kernels.program import Block
from remelt.operators.quantities import (
    ElectionWeights,
    draw_threshold,
    election_weights,
    folded,
    keep_scale,
    kept_range,
    l1_factor,
    rank_probabilities,
    thresholds_of,
)


@dataclass(frozen=True)
class Merge:
    """What is done with the thinned task vectors."""

    coefficients_K: tuple[float, ...]
    elect: str | None
    """weighted, unweighted, or None for a plain sum."""
    normalize: bool
    lambda_: float
    rescale: str
    norm_floor: float

    def numbers(self, scales_K: Sequence[float]) -> NDArray[np.float32]:
        """Weights, divisors, ballots and unit for the kernels, padded with zeros; see `combine.merge_chunk`."""
        if self.elect is None:
            one = folded(self.coefficients_K, self.lambda_, self.normalize, scales_K)
            chosen = ElectionWeights(one, one, one, 1.0)
        else:
            chosen = election_weights(self.coefficients_K, scales_K, self.elect, self.normalize)
        width = max(GROUP, len(self.coefficients_K))
        numbers = np.zeros((4, width), np.float32)
        numbers[:3, : len(self.coefficients_K)] = chosen[:3]
        numbers[3] = chosen.unit
        return numbers


def keys_of(sources: Sources, seed: int, streams_K: Sequence[int]) -> NDArray[np.uint32]:
    """Keys of the draws, (K, spans of 2^32 elements, 2)."""
    name, spans = sources.geometry.name, max(1, -(-sources.geometry.num_elements // (1 << 32)))
    keys = [[draw_keys(seed, stream, name, high) for high in range(spans)] for stream in streams_K]
    return np.array(keys, np.uint32)


class Thinned:
    """The rounds that all have in common: selection first, then the L1 norms where those are to be restored."""

    selection_rounds = 0

    def __init__(self, sources: Sources, merge: Merge, is_thinned_K: Sequence[bool]) -> None:
        self._sources, self._merge = sources, merge
        self._is_thinned = np.array(is_thinned_K, np.bool_)
        self._numbers = merge.numbers([1.0] * sources.num_models)
        self._has_norms = merge.rescale == "l1" and any(is_thinned_K)
        self._norms = np.zeros((sources.geometry.num_leaves if self._has_norms else 0, 2 * sources.num_models))
        self.num_rounds = self.selection_rounds + self._has_norms

    def measure(self, round_: int, block: Block, worker: int) -> None:
        if round_ < self.selection_rounds:
            self._select(round_, block, worker)
            return
        norms = self._norms[block.first_leaf : block.first_leaf + self._sources.num_leaves(block)]
        self._run(block, 0, norms)

    def finish_round(self, round_: int) -> None:
        if round_ < self.selection_rounds:
            self._finish_selection(round_)
            return
        norms = add_leaves(self._norms)
        scales_K = [
            l1_factor(norms[2 * model], norms[2 * model + 1], self._merge.norm_floor) if is_thinned else 1.0
            for model, is_thinned in enumerate(self._is_thinned)
        ]
        self._numbers = self._merge.numbers(scales_K)

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        self._run(block, address_of(out), np.zeros((0, 2 * self._sources.num_models)))

    def _select(self, round_: int, block: Block, worker: int) -> None:
        raise NotImplementedError

    def _finish_selection(self, round_: int) -> None:
        raise NotImplementedError

    def _run(self, block: Block, out_address: int, norms: NDArray[np.float64]) -> None:
        raise NotImplementedError


class Elementwise(Thinned):
    """By draws, or by bands of magnitude: the kernel `thin_elements`."""

    has_draws = False

    def __init__(self, sources: Sources, merge: Merge, is_thinned_K: Sequence[bool]) -> None:
        super().__init__(sources, merge, is_thinned_K)
        leaves = 0 if self.has_draws else sources.geometry.num_leaves
        self._keys = np.zeros((sources.num_models, 1, 2), np.uint32)
        self._thresholds = np.zeros(sources.num_models, np.uint32)
        self._bands = np.empty((leaves, sources.num_models, 2), np.uint32)
        self._bands[..., 0], self._bands[..., 1] = 0, select.NEVER
        self._ties = np.full((leaves, sources.num_models, 2), -1, np.int64)

    def _run(self, block: Block, out_address: int, norms: NDArray[np.float64]) -> None:
        sources, merge = self._sources, self._merge
        leaves = slice(block.first_leaf, block.first_leaf + sources.num_leaves(block))
        elements.thin_elements(
            sources.addresses(block),
            sources.kinds,
            self._is_thinned,
            self.has_draws,
            self._keys,
            self._thresholds,
            self._bands[leaves],
            self._ties[leaves],
            sources.leaf_elements,
            block.first_row * sources.geometry.row_length,
            sources.num_elements(block),
            self._numbers,
            merge.elect is not None,
            merge.normalize,
            np.float32(merge.lambda_),
            out_address,
            sources.out_kind,
            norms,
        )


class Drawn(Elementwise):
    """DARE: every element of a model is kept with one probability."""

    has_draws = True

    def __init__(
        self, sources: Sources, merge: Merge, density_K: Sequence[float], seed: int, streams_K: Sequence[int]
    ) -> None:
        thresholds = [draw_threshold(density) for density in density_K]
        super().__init__(sources, merge, [threshold is not None for threshold in thresholds])
        self._keys = keys_of(sources, seed, streams_K)
        self._thresholds = np.array([threshold or 0 for threshold in thresholds], np.uint32)
        if merge.rescale == "keep":
            self._numbers = merge.numbers([keep_scale(density) for density in density_K])


class Cut(NamedTuple):
    """One end of what is kept of one model: the `rank` largest magnitudes lie above it."""

    model: int
    end: int
    """0 for the lower end of the band, 1 for the upper."""
    rank: int


class Banded(Elementwise):
    """TIES and Breadcrumbs by tensor: magnitudes of descending rank in a range, found by exact selection."""

    def __init__(
        self,
        sources: Sources,
        merge: Merge,
        density_K: Sequence[float],
        gamma_K: Sequence[float],
        *,
        candidate_limit: int = CANDIDATE_LIMIT,
    ) -> None:
        n = sources.geometry.num_elements
        ranges = [kept_range(n, *pair) if n else (0, 0) for pair in zip(density_K, gamma_K, strict=True)]
        self._cuts = [
            Cut(model, end, rank)
            for model, (start, stop) in enumerate(ranges)
            for end, rank in ((0, stop), (1, start))
            if 0 < rank < n
        ]
        # One leaf is sorted rather than counted: the histograms would cost more than the tensor.
        self._is_small = sources.geometry.num_leaves <= 1
        self.selection_rounds = (1 if self._is_small else 3) if self._cuts else 0
        super().__init__(sources, merge, [(start, stop) != (0, n) for start, stop in ranges])
        self._models = np.array([cut.model for cut in self._cuts], np.int64)
        self._rest = np.array([cut.rank for cut in self._cuts], np.int64)
        """Of each cut's bin, then of its threshold, so many count as above it."""
        self._limit = min(candidate_limit, n // 16)
        self._is_gathering = True
        self._lock = threading.Lock()
        self._upper: list[NDArray[np.uint32] | None] = [None] * sources.num_workers
        self._lower: list[NDArray[np.uint64] | None] = [None] * sources.num_workers
        bins = 0 if self._is_small else UPPER_BINS
        self._totals = np.zeros((sources.num_models, bins), np.int64)
        self._gathered: dict[int, tuple[list[NDArray[np.uint16]], NDArray[np.int64]]] = {}
        self._bins = np.zeros(len(self._cuts), np.uint32)
        self._sizes = np.zeros(len(self._cuts), np.int64)
        self._limits = np.zeros(len(self._cuts), np.uint32)
        self._leaf_ties = np.zeros((sources.geometry.num_leaves, len(self._cuts)), np.int64)

    def _select(self, round_: int, block: Block, worker: int) -> None:
        sources = self._sources
        addresses, kinds, count = sources.addresses(block), sources.kinds, sources.num_elements(block)
        if self._is_small:
            self._sort_leaf(addresses, count)
        elif round_ == 0:
            self._count_upper(addresses, count, worker)
        elif round_ == 1 and self._is_gathering:
            self._gather(block, addresses, count)
        elif round_ == 1:
            if self._lower[worker] is None:
                self._lower[worker] = np.zeros((len(self._cuts), LOWER_BINS), np.uint64)
            select.count_lower(addresses, kinds, self._models, self._bins, count, self._lower[worker])
        elif not self._is_gathering:
            ties = self._leaf_ties[block.first_leaf : block.first_leaf + sources.num_leaves(block)]
            select.count_ties(addresses, kinds, self._models, self._limits, sources.leaf_elements, count, ties)

    def _sort_leaf(self, addresses: NDArray[np.uint64], count: int) -> None:
        bits = np.empty(count, np.uint32)
        for place, cut in enumerate(self._cuts):
            select.magnitudes(addresses, self._sources.kinds, cut.model, count, bits)
            limit = np.partition(bits, count - cut.rank)[count - cut.rank]
            self._limits[place] = limit
            self._rest[place] -= np.count_nonzero(bits > limit)
            self._leaf_ties[0, place] = np.count_nonzero(bits == limit)

    def _count_upper(self, addresses: NDArray[np.uint64], count: int, worker: int) -> None:
        table = self._upper[worker]
        if table is None:
            shape = (self._sources.num_models, UPPER_BINS * TABLES)
            table = self._upper[worker] = np.zeros(shape, np.uint32)
        select.count_upper(addresses, self._sources.kinds, self._is_thinned, count, table)
        if self._sources.geometry.num_elements >= 1 << 32:  # a counter could overflow
            self._take_in(worker)

    def _take_in(self, worker: int) -> None:
        """Add a worker's counters to the totals and clear them."""
        table = self._upper[worker]
        if table is not None:
            with self._lock:
                for table_place in range(TABLES):
                    self._totals += table[:, table_place::TABLES]
            table[:] = 0

    def _gather(self, block: Block, addresses: NDArray[np.uint64], count: int) -> None:
        capacities = np.minimum(self._sizes, count) + 1
        offsets = np.cumsum(capacities) - capacities
        found = np.empty(int(capacities.sum()), np.uint16)
        leaf_counts = np.zeros((len(self._cuts), self._sources.num_leaves(block)), np.int64)
        select.gather_lower(
            addresses,
            self._sources.kinds,
            self._models,
            self._bins,
            self._sources.leaf_elements,
            count,
            found,
            offsets,
            leaf_counts,
        )
        used = leaf_counts.sum(1)
        pieces = [found[start : start + num].copy() for start, num in zip(offsets, used, strict=True)]
        self._gathered[block.first_leaf] = (pieces, leaf_counts)

    def _finish_selection(self, round_: int) -> None:
        if self._is_small:
            self._set_bands()
        elif round_ == 0:
            for worker in range(self._sources.num_workers):
                self._take_in(worker)
            self._upper.clear()
            for place, cut in enumerate(self._cuts):
                self._descend(place, self._totals[cut.model], self._bins)
                self._sizes[place] = self._totals[cut.model, self._bins[place]]
            self._totals = self._totals[:0]
            self._is_gathering = int(self._sizes.max()) <= self._limit
            if self._is_gathering and not self._has_norms:
                self.num_rounds = 2
        elif round_ == 1:
            lower = np.zeros(len(self._cuts), np.uint32)
            histograms = None
            for table in self._lower:
                if table is not None:
                    histograms = table if histograms is None else np.add(histograms, table, out=histograms)
            self._lower.clear()
            order = sorted(self._gathered)
            for place in range(len(self._cuts)):
                if histograms is not None:
                    self._descend(place, histograms[place].astype(np.int64), lower)
                    continue
                histogram = np.zeros(LOWER_BINS, np.int64)
                for first in order:
                    select.tally(self._gathered[first][0][place], histogram)
                self._descend(place, histogram, lower)
                for first in order:
                    pieces, leaf_counts = self._gathered[first]
                    ties = self._leaf_ties[first : first + leaf_counts.shape[1], place]
                    select.tally_equal(pieces[place], leaf_counts[place], lower[place], ties)
            self._limits = (self._bins << np.uint32(16)) | lower
            self._gathered.clear()
            if self._is_gathering:
                self._set_bands()
        elif not self._is_gathering:
            self._set_bands()

    def _descend(self, place: int, histogram: NDArray[np.int64], found: NDArray[np.uint32]) -> None:
        """Find the bin of a cut's rank, counted from the largest, and what is left of the rank inside it."""
        from_top = np.cumsum(histogram[::-1])
        place_from_top = int(np.searchsorted(from_top, self._rest[place], side="left"))
        found[place] = len(histogram) - 1 - place_from_top
        self._rest[place] -= from_top[place_from_top] - histogram[found[place]]

    def _set_bands(self) -> None:
        """What each leaf keeps: its ties in full, not at all, or, in the one leaf where they run out, in part."""
        for place, cut in enumerate(self._cuts):
            ties = self._leaf_ties[:, place]
            left = self._rest[place] - (np.cumsum(ties) - ties)
            self._bands[:, cut.model, cut.end] = self._limits[place] + (left <= 0)
            self._ties[:, cut.model, cut.end] = np.where((left > 0) & (left < ties), left, -1)


class GivenBand(Elementwise):
    """TIES with thresholds over the whole model: the survey has found them, and in which tensor the ties run out."""

    def __init__(self, sources: Sources, merge: Merge, bands_K: Sequence[tuple[int, int] | None]) -> None:
        self._left = {model: band[1] for model, band in enumerate(bands_K) if band is not None and band[1] >= 0}
        self.selection_rounds = int(bool(self._left))
        super().__init__(sources, merge, [band is not None for band in bands_K])
        for model, band in enumerate(bands_K):
            if band is not None:
                self._bands[:, model, 0] = band[0]
        self._leaf_ties = np.zeros((sources.geometry.num_leaves, len(self._left)), np.int64)

    def _select(self, round_: int, block: Block, worker: int) -> None:
        sources, models = self._sources, list(self._left)
        ties = self._leaf_ties[block.first_leaf : block.first_leaf + sources.num_leaves(block)]
        limits = self._bands[0, models, 0].copy()
        select.count_ties(
            sources.addresses(block),
            sources.kinds,
            np.array(models, np.int64),
            limits,
            sources.leaf_elements,
            sources.num_elements(block),
            ties,
        )

    def _finish_selection(self, round_: int) -> None:
        for number, (model, kept) in enumerate(self._left.items()):
            ties = self._leaf_ties[:, number]
            left = kept - (np.cumsum(ties) - ties)
            self._ties[:, model, 0] = np.where((left > 0) & (left < ties), left, -1)
            self._bands[:, model, 0] += (left <= 0).astype(np.uint32)


class Ranked(Thinned):
    """DELLA, and TIES and Breadcrumbs by row: the kernel `thin_rows`."""

    def __init__(self, sources: Sources, merge: Merge, is_thinned_K: Sequence[bool]) -> None:
        super().__init__(sources, merge, is_thinned_K)
        self._has_draws = False
        self._keys = np.zeros((sources.num_models, 1, 2), np.uint32)
        self._by_rank = np.zeros((sources.num_models, sources.geometry.row_length), np.uint64)

    @classmethod
    def by_draws(
        cls,
        sources: Sources,
        merge: Merge,
        density_K: Sequence[float],
        half_width_K: Sequence[float],
        seed: int,
        streams_K: Sequence[int],
    ) -> Ranked:
        """DELLA: keep probabilities that rise with the rank."""
        program = cls(sources, merge, [density < 1 for density in density_K])
        program._has_draws = True
        program._keys = keys_of(sources, seed, streams_K)
        for model, pair in enumerate(zip(density_K, half_width_K, strict=True)):
            if program._is_thinned[model]:
                probabilities = rank_probabilities(sources.geometry.row_length, *pair)
                factors = 1.0 / probabilities if merge.rescale == "keep" else np.ones_like(probabilities)
                upper = factors.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
                program._by_rank[model] = upper | thresholds_of(probabilities)
        return program

    @classmethod
    def by_rank(cls, sources: Sources, merge: Merge, density_K: Sequence[float], gamma_K: Sequence[float]) -> Ranked:
        """TIES and Breadcrumbs by row."""
        length = sources.geometry.row_length
        ranges = [kept_range(length, *pair) if length else (0, 0) for pair in zip(density_K, gamma_K, strict=True)]
        program = cls(sources, merge, [pair != (0, length) for pair in ranges])
        for model, (start, stop) in enumerate(ranges):
            program._by_rank[model, start:stop] = 1
        return program

    def _run(self, block: Block, out_address: int, norms: NDArray[np.float64]) -> None:
        sources, merge = self._sources, self._merge
        if block.num_rows == 0 or sources.geometry.row_length == 0:
            return
        rows.thin_rows(
            sources.addresses(block),
            sources.kinds,
            self._is_thinned,
            self._has_draws,
            self._keys,
            self._by_rank,
            sources.geometry.row_length,
            sources.geometry.leaf_rows,
            block.first_row,
            block.num_rows,
            self._numbers,
            merge.elect is not None,
            merge.normalize,
            np.float32(merge.lambda_),
            out_address,
            sources.out_kind,
            norms,
        )
