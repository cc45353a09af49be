"""Run one unit: read blocks of all parents, drive each tensor's programs, hand the merged rows to the sinks in order.

Threads take blocks one by one; reading, computing, digesting and writing of different blocks overlap. A block is whole
leaves of one tensor. Outputs leave in the order of their bytes in the shard: a finished block waits until those before
it are written, and whichever thread completes the next one writes all that are ready. The number of blocks in flight is
bounded by the buffers, which are allocated once.

An operator that needs statistics sees its tensor in rounds. Its sources are then mapped into memory until the last one,
which costs no copy of what is in the page cache; where they cannot be, they are copied into the arena. The arena's size
bounds both. What it cannot hold is read again for each round. While the last blocks of a round are under way, idle
threads go on with the next tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.checkpoint import CheckpointIndex, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import NonFiniteError
from remelt.fingerprints import TensorDigest
from remelt.kernels import count_nonfinite, make_program
from remelt.kernels.program import Block, Geometry, Program, geometry_of
from remelt.memory import COPY_BLOCK_BYTES, Sizes, has_kernel, held_bytes, peak_memory_bytes, tensor_block_rows
from remelt.plan import PlannedTensor, RunSettings, TensorRecord, Unit, UnitReceipt
from remelt.range_reader import RangeReader
from remelt.sinks import Sink
from remelt.stored_bits import as_stored
from remelt.survey import is_global
from remelt.treatment import Apply

Bytes = NDArray[np.uint8]
OnBytes = Callable[[int], None]


def open_readers(settings: RunSettings) -> tuple[RangeReader, ...]:
    """A range reader for each checkpoint; files are opened when first read."""
    return tuple(
        RangeReader(CheckpointIndex(model.source, model.root, "", model.files, {})) for model in settings.models
    )


class _Claim(NamedTuple):
    """One block of one round, given to one thread."""

    work: _TensorWork
    round_: int
    block: int
    sequence: int
    """Place in the unit's output, for the applying round; -1 for a measuring one."""
    outputs: list[Bytes]


class _Finished(NamedTuple):
    """A merged block that waits for those before it."""

    work: _TensorWork
    start_byte: int
    outs: list[Bytes]
    num_nonfinite: list[int]
    outputs: list[Bytes]
    """The buffers, whole, to be used again."""


class _TensorWork:
    """One tensor in flight."""

    def __init__(self, planned: PlannedTensor, settings: RunSettings, sizes: Sizes) -> None:
        self.planned = planned
        self.geometry: Geometry = geometry_of(planned.name, planned.shape)
        self.programs: list[Program] = []
        itemsize = DTYPES[planned.stored.dtype].item_bits // 8
        if planned.is_copy:
            self.block_bytes = COPY_BLOCK_BYTES
        else:
            self.programs = [_bind(planned, number, self.geometry, settings) for number in range(settings.num_sets)]
            self.block_rows = tensor_block_rows(planned, self.geometry, sizes.block_elements, settings.device)
            self.block_bytes = self.block_rows * self.geometry.row_length * itemsize
        self.num_rounds = max((program.num_rounds for program in self.programs), default=0)
        applies = (treatment for treatment in planned.treatments if isinstance(treatment, Apply))
        self.may_view = all(has_kernel(apply, settings.device) for apply in applies)
        """Kernels take any address; a torch function takes what was read for it."""
        # A tensor without elements still passes through the sink once, as one empty block.
        self.num_blocks = max(1, -(-planned.stored.nbytes // max(1, self.block_bytes)))
        self.round = 0
        self.next_block = 0
        self.outstanding = 0
        self.is_finishing = False
        self.turns = [0] * len(planned.sources)
        """The next block of each source to be digested."""
        self.digests = [TensorDigest(info.dtype, info.shape) for _, info in planned.sources]
        self.num_nonfinite = [0] * len(planned.sources)
        self.arena: Bytes | None = None
        self.arena_start = -1
        self._windows: list[Bytes] | None = None
        self._windows_lock = threading.Lock()

    def rows(self, block: int) -> tuple[int, int]:
        first = block * self.block_rows
        return first, min(first + self.block_rows, self.geometry.num_rows)

    def windows(self, readers: Sequence[RangeReader]) -> list[Bytes]:
        """The sources, mapped whole; none where one of them cannot be. They count against the arena's place."""
        windows = self._windows
        if windows is None:
            with self._windows_lock:
                windows = self._windows
                if windows is None:
                    found = [readers[place].window(info) for place, info in self.planned.sources]
                    mapped = [window for window in found if window is not None]
                    windows = self._windows = mapped if len(mapped) == len(found) else []
        return windows

    def let_go(self) -> None:
        """Unmap the sources, though threads that wait and outputs that are not yet written still know this tensor."""
        self._windows = []

    def held_view(self, source: int, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of a source in the arena."""
        assert self.arena is not None
        offset = sum(info.nbytes for _, info in self.planned.sources[:source])
        return self.arena[offset + start : offset + stop]


def _bind(planned: PlannedTensor, set_number: int, geometry: Geometry, settings: RunSettings) -> Program:
    treatment = planned.treatments[set_number]
    assert isinstance(treatment, Apply)
    bands_K = None
    if settings.bands is not None and is_global(treatment):
        bands_K = settings.bands.of(planned.name, set_number, treatment.models)
    infos = dict(planned.sources)
    return make_program(
        treatment,
        geometry,
        base_dtype=None if treatment.base is None else infos[treatment.base].dtype,
        dtypes_K=tuple(infos[place].dtype for place in treatment.models),
        out_dtype=planned.stored.dtype,
        streams_K=tuple(settings.models[place].stream for place in treatment.models),
        seed=settings.seed,
        num_workers=settings.threads,
        device=settings.device,
        bands_K=bands_K,
    )


class _Arena:
    """First-fit allocation inside one buffer, so that held tensors reuse the same pages."""

    def __init__(self, size: int) -> None:
        self._buffer = np.empty(size, np.uint8)
        self._used: list[tuple[int, int]] = []

    def take(self, size: int) -> tuple[int, Bytes] | None:
        start = 0
        for used_start, used_stop in sorted(self._used):
            if used_start - start >= size:
                break
            start = used_stop
        if start + size > len(self._buffer):
            return None
        self._used.append((start, start + size))
        return start, self._buffer[start : start + size]

    def give_back(self, start: int) -> None:
        self._used = [span for span in self._used if span[0] != start]

    @property
    def size(self) -> int:
        return len(self._buffer)


class UnitRunner:
    """The threads, rounds and buffers of one unit; use `UnitRun`."""

    def __init__(
        self,
        unit: Unit,
        settings: RunSettings,
        sizes: Sizes,
        readers: Sequence[RangeReader],
        sinks: Sequence[Sink],
        on_bytes: OnBytes,
        are_parents_known: bool,
    ) -> None:
        self._unit, self._settings, self._sizes = unit, settings, sizes
        self._are_parents_known = are_parents_known
        self._readers, self._sinks, self._on_bytes = readers, sinks, on_bytes
        self._changed = threading.Condition()
        self._active: list[_TensorWork] = []
        self._next_tensor = 0
        self._sequence = 0
        self._num_drained = 0
        self._is_draining = False
        self._ready: dict[int, _Finished] = {}
        self._failure: BaseException | None = None
        self._arena = _Arena(sizes.arena_bytes)
        self._free_outputs = [
            [np.empty(sizes.output_bytes, np.uint8) for _ in range(settings.num_sets)] for _ in range(sizes.num_outputs)
        ]
        self._parents: list[tuple[int, TensorRecord]] = []
        self._read_by_worker = [0] * settings.threads
        self.write_bytes = 0
        self.nonfinite_outputs: dict[str, int] = {}
        """NaN and Inf values written, by tensor, over all coefficient sets."""

    @property
    def read_bytes(self) -> int:
        """Bytes read so far, repeated passes included."""
        return sum(self._read_by_worker)

    def run(self) -> list[tuple[int, TensorRecord]]:
        """Work the whole unit; returns the record of each source tensor."""
        threads = [
            threading.Thread(target=self._run_worker, args=(worker,), name=f"remelt-{worker}", daemon=True)
            for worker in range(1, self._settings.threads)
        ]
        for thread in threads:
            thread.start()
        self._run_worker(0)
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        if self._next_tensor < len(self._unit.tensors) or self._num_drained < self._sequence or self._active:
            raise AssertionError(
                f"{self._unit.file}: stopped at tensor {self._next_tensor} of {len(self._unit.tensors)}"
            )
        return self._parents

    def _run_worker(self, worker: int) -> None:
        try:
            buffer = np.empty(self._sizes.source_bytes, np.uint8)
            while (claim := self._claim()) is not None:
                if claim.work.planned.is_copy:
                    self._copy_block(claim, worker)
                else:
                    self._work_block(claim, buffer, worker)
                self._complete(claim)
        except BaseException as failure:  # handed to the thread that called run()
            with self._changed:
                self._failure = self._failure or failure
                self._changed.notify_all()

    # Scheduling. All under the one condition; blocks are milliseconds long, so it is rarely contended.

    def _claim(self) -> _Claim | None:
        with self._changed:
            while self._failure is None:
                claim = self._find_block()
                if claim is not None:
                    return claim
                if self._admit():
                    continue
                if not self._active:
                    return None
                self._changed.wait()
            return None

    def _find_block(self) -> _Claim | None:
        outputs_open = True
        for work in self._active:
            is_open = work.next_block < work.num_blocks and not work.is_finishing
            if work.round < work.num_rounds:
                outputs_open = False
                if is_open:
                    return self._give(work, -1, [])
            elif outputs_open and is_open:
                outputs_open = bool(self._free_outputs)
                if outputs_open:
                    self._sequence += 1
                    return self._give(work, self._sequence - 1, self._free_outputs.pop())
        return None

    def _give(self, work: _TensorWork, sequence: int, outputs: list[Bytes]) -> _Claim:
        work.next_block += 1
        work.outstanding += 1
        return _Claim(work, work.round, work.next_block - 1, sequence, outputs)

    def _admit(self) -> bool:
        """Take the next tensor in, unless enough are in flight or the arena is full for now."""
        if self._next_tensor == len(self._unit.tensors) or len(self._active) >= self._sizes.num_tensors:
            return False
        planned = self._unit.tensors[self._next_tensor]
        need = held_bytes(planned, self._settings.device)
        place = None
        if need and need <= self._arena.size:
            place = self._arena.take(need)
            if place is None:
                return False
        work = _TensorWork(planned, self._settings, self._sizes)
        if place is not None:
            work.arena_start, work.arena = place
        self._active.append(work)
        self._next_tensor += 1
        return True

    def _complete(self, claim: _Claim) -> None:
        work = claim.work
        with self._changed:
            work.outstanding -= 1
            if work.outstanding or work.next_block < work.num_blocks or work.is_finishing:
                return
            work.is_finishing = True
        if work.round < work.num_rounds:
            for program in work.programs:
                if work.round < program.num_rounds:
                    program.finish_round(work.round)
        with self._changed:
            if work.round < work.num_rounds:
                work.round, work.next_block, work.is_finishing = work.round + 1, 0, False
                # A program may find that it has measured enough.
                work.num_rounds = max(program.num_rounds for program in work.programs)
            else:
                self._active.remove(work)
                work.let_go()
                if work.arena_start >= 0:
                    self._arena.give_back(work.arena_start)
                if not self._are_parents_known:
                    self._parents.extend(self._source_records(work))
            self._changed.notify_all()

    @staticmethod
    def _source_records(work: _TensorWork) -> list[tuple[int, TensorRecord]]:
        return [
            (place, TensorRecord(work.planned.name, info.dtype, info.shape, digest.hexdigest(), num_nonfinite))
            for (place, info), digest, num_nonfinite in zip(
                work.planned.sources, work.digests, work.num_nonfinite, strict=True
            )
        ]

    # One block.

    def _copy_block(self, claim: _Claim, worker: int) -> None:
        work = claim.work
        place, info = work.planned.sources[0]
        start = claim.block * work.block_bytes
        stop = min(start + work.block_bytes, work.planned.stored.nbytes)
        out = claim.outputs[0][: stop - start]
        self._read(place, info, start, out, worker)
        num_nonfinite = self._count(claim, 0, out)
        self._digest_in_turn(claim, [out])
        self._deposit(claim, start, [out] * len(self._sinks), [num_nonfinite] * len(self._sinks))

    def _work_block(self, claim: _Claim, buffer: Bytes, worker: int) -> None:
        work = claim.work
        first, stop = work.rows(claim.block)
        elements = (stop - first) * work.geometry.row_length
        views, num_digested = self._sources(claim, buffer, first * work.geometry.row_length, elements, worker)
        stored = {
            place: as_stored(view, info.dtype) for (place, info), view in zip(work.planned.sources, views, strict=True)
        }
        itemsize = DTYPES[work.planned.stored.dtype].item_bits // 8
        start = first * work.geometry.row_length * itemsize
        outs = self._outs(claim, start, elements * itemsize)
        if any(out.nbytes != elements * itemsize for out in outs):
            raise AssertionError(f"{work.planned.name}: an output buffer is smaller than {elements * itemsize} bytes")
        nonfinite_outs = []
        for number, (treatment, program) in enumerate(zip(work.planned.treatments, work.programs, strict=True)):
            assert isinstance(treatment, Apply)
            block = Block(
                first // work.geometry.leaf_rows,
                first,
                stop - first,
                None if treatment.base is None else stored[treatment.base],
                tuple(stored[place] for place in treatment.models),
            )
            if outs:
                out = as_stored(outs[number], work.planned.stored.dtype)
                program.apply(block, out, worker)
                nonfinite_outs.append(count_nonfinite(out, work.planned.stored.dtype))
            elif claim.round_ < program.num_rounds:
                program.measure(claim.round_, block, worker)
        if claim.round_ == 0:
            self._digest_in_turn(claim, views, num_digested)
        if outs:
            self._deposit(claim, start, outs, nonfinite_outs)

    def _outs(self, claim: _Claim, start: int, nbytes: int) -> list[Bytes]:
        """Where a block of each coefficient set is made: where it will lie if its sink says so, else in a buffer."""
        stored, outs = claim.work.planned.stored, []
        for sink, buffer in zip(self._sinks, claim.outputs, strict=False):
            target = sink.target(stored, start, nbytes)
            outs.append(buffer[:nbytes] if target is None else target)
        return outs

    def _sources(
        self, claim: _Claim, buffer: Bytes, first_element: int, elements: int, worker: int
    ) -> tuple[list[Bytes], int]:
        """The block's bytes of each source: where the reader has them in memory, else read into the arena or the
        worker's buffer, or found in the arena.

        A source is digested while its bytes are near, if the blocks before it have been; returns how many were.
        """
        work, views, used, num_digested = claim.work, [], 0, 0
        is_first = claim.round_ == 0
        windows = work.windows(self._readers) if work.arena is not None and work.may_view else []
        for number, (place, info) in enumerate(work.planned.sources):
            itemsize = DTYPES[info.dtype].item_bits // 8
            start, size = first_element * itemsize, elements * itemsize
            mapped = self._readers[place].view(info, start, size) if work.may_view else None
            if mapped is not None:
                view = mapped
                self._took(size, worker)
            elif windows:
                mapped = view = windows[number][start : start + size]
                if is_first:
                    self._took(size, worker)
            elif work.arena is not None:
                view = work.held_view(number, start, start + size)
            else:
                view = buffer[used : used + size]
                used += size
            if view.nbytes != size:
                raise AssertionError(f"{work.planned.name}: a buffer of {view.nbytes} bytes for {size}")
            if mapped is None and (is_first or work.arena is None):
                self._read(place, info, start, view, worker)
            views.append(view)
            if is_first and not self._are_parents_known:
                self._count(claim, number, view)
                if num_digested == number and work.turns[number] == claim.block:
                    self._digest(claim, number, view)
                    num_digested += 1
        return views, num_digested

    def _read(self, place: int, info: TensorInfo, start: int, view: Bytes, worker: int) -> None:
        self._readers[place].read_into(info, start, view)
        self._took(view.nbytes, worker)

    def _took(self, nbytes: int, worker: int) -> None:
        self._read_by_worker[worker] += nbytes
        self._on_bytes(nbytes)

    def _count(self, claim: _Claim, number: int, view: Bytes) -> int:
        """Count NaN and Inf of a block of a source."""
        _, info = claim.work.planned.sources[number]
        if not DTYPES[info.dtype].is_mergeable:
            return 0
        count = count_nonfinite(as_stored(view, info.dtype), info.dtype)
        if count:
            with self._changed:
                claim.work.num_nonfinite[number] += count
        return count

    def _digest_in_turn(self, claim: _Claim, views: Sequence[Bytes], num_digested: int = 0) -> None:
        """Digest the sources from `num_digested` on, each after the blocks before this one."""
        work = claim.work
        if self._are_parents_known:
            return
        for number in range(num_digested, len(views)):
            if work.turns[number] != claim.block:
                with self._changed:
                    self._changed.wait_for(partial(self._is_turn, claim, number))
                if self._failure is not None:
                    return
            self._digest(claim, number, views[number])
        with self._changed:
            self._changed.notify_all()

    def _is_turn(self, claim: _Claim, number: int) -> bool:
        return claim.work.turns[number] == claim.block or self._failure is not None

    def _digest(self, claim: _Claim, number: int, view: Bytes) -> None:
        claim.work.digests[number].update(view.data)
        # Only the thread whose turn it is writes here; those that wait are woken once it has done all its sources.
        claim.work.turns[number] += 1

    # Output, in order.

    def _deposit(self, claim: _Claim, start_byte: int, outs: list[Bytes], num_nonfinite: list[int]) -> None:
        with self._changed:
            self._ready[claim.sequence] = _Finished(claim.work, start_byte, outs, num_nonfinite, claim.outputs)
            if self._is_draining:
                return
            self._is_draining = True
        while True:
            with self._changed:
                entry = self._ready.pop(self._num_drained, None)
                if entry is None or self._failure is not None:
                    self._is_draining = False
                    return
            stored = entry.work.planned.stored
            for sink, out, count in zip(self._sinks, entry.outs, entry.num_nonfinite, strict=True):
                sink.write(stored, entry.start_byte, out, count)
                self.write_bytes += out.nbytes
                if count:
                    self.nonfinite_outputs[stored.name] = self.nonfinite_outputs.get(stored.name, 0) + count
                self._on_bytes(out.nbytes)
            with self._changed:
                self._num_drained += 1
                self._free_outputs.append(entry.outputs)
                self._changed.notify_all()


class UnitRun:
    """One unit on its way: worked, then finished. Two steps, so that a sync can overlap with the next unit's work."""

    def __init__(
        self,
        unit: Unit,
        settings: RunSettings,
        sizes: Sizes,
        readers: Sequence[RangeReader],
        sinks: Sequence[Sink],
        on_bytes: OnBytes = lambda _: None,
        *,
        are_parents_known: bool = False,
    ) -> None:
        """`are_parents_known`: what is read was found finite and digested before, and is not again."""
        self._unit, self._settings, self._sinks = unit, settings, sinks
        self._runner: UnitRunner | None = UnitRunner(unit, settings, sizes, readers, sinks, on_bytes, are_parents_known)
        self._started = time.perf_counter()
        self._parents: list[tuple[int, TensorRecord]] = []
        self._read_bytes = self._write_bytes = 0

    @property
    def unit(self) -> Unit:
        """The unit that is worked."""
        return self._unit

    def work(self) -> None:
        """Merge the unit into its sinks.

        Raises NonFiniteError after the unit's pass, naming every parent tensor with NaN or Inf, unless they are
        allowed. On any failure the sinks are aborted.
        """
        runner = self._runner
        assert runner is not None, "a unit is worked once"
        try:
            self._parents = runner.run()
            if not self._settings.allow_nonfinite:
                refuse_nonfinite(self._parents, self._settings)
                _refuse_nonfinite_outputs(runner.nonfinite_outputs)
        except BaseException:
            for sink in self._sinks:
                sink.abort()
            raise
        self._read_bytes, self._write_bytes = runner.read_bytes, runner.write_bytes
        # The next unit is worked while this one is synced: its buffers must be free by then.
        self._runner = None

    def finish(self) -> UnitReceipt:
        """Make the outputs durable; the receipt proves it."""
        outputs = tuple(sink.finish() for sink in self._sinks)
        return UnitReceipt(
            self._unit.unit_id,
            outputs,
            tuple(self._parents),
            self._read_bytes,
            self._write_bytes,
            time.perf_counter() - self._started,
            peak_memory_bytes(),
            self._settings.numerics,
        )


def refuse_nonfinite(parents: Sequence[tuple[int, TensorRecord]], settings: RunSettings) -> None:
    """Raise NonFiniteError where a parent's tensor holds NaN or Inf, naming ten at most."""
    found = [
        f"{record.name} of {settings.models[place].source} ({record.num_nonfinite} values)"
        for place, record in parents
        if record.num_nonfinite
    ]
    if found:
        shown = "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")
        raise NonFiniteError(
            f"NaN or Inf in a parent: {shown}. Nothing is published. Repair the checkpoint, leave the tensor out by a "
            f"rule, or allow it: `allow_nonfinite: true` in the recipe, `--allow-nonfinite` on the command line"
        )


def _refuse_nonfinite_outputs(counts: dict[str, int]) -> None:
    if counts:
        name, count = next(iter(counts.items()))
        raise NonFiniteError(
            f"the merge of finite parents has NaN or Inf in {len(counts)} tensors, such as {name} ({count} values): "
            "the output dtype is too narrow or a coefficient too large. Nothing is published. Write a wider "
            "`out_dtype`, or allow it: `allow_nonfinite: true` in the recipe, `--allow-nonfinite` on the command line"
        )
