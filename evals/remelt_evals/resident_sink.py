"""A sink whose target is a parameter's storage: the engine writes merged blocks where the model will read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.dtypes import DTYPES
from remelt.fingerprints import TensorDigest
from remelt.plan import OutputRecord, StoredTensor, TensorRecord, Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Bytes = NDArray[np.uint8]


class Place(NamedTuple):
    """Where one stored tensor goes."""

    flat: Tensor | None
    """Its view in the model, one-dimensional; None for what the model leaves unread."""
    memory: Bytes | None
    """The same as bytes, where the engine may write: in host memory, in the stored dtype."""
    dtype: torch.dtype
    """As the checkpoint stores it."""


def make_place(view: Tensor | None, stored_dtype: str) -> Place:
    """The place of a tensor stored as `stored_dtype` (safetensors' name)."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[stored_dtype].torch_name)
    if view is None:
        return Place(None, None, dtype)
    flat = view.reshape(-1)
    if flat.device.type != "cpu" or flat.dtype != dtype:
        return Place(flat, None, dtype)
    return Place(flat, flat.view(torch.uint8).numpy(), dtype)


class ParameterSink:
    """Takes one unit's output of one candidate into a model; nothing of it can be scored before all units are in."""

    def __init__(self, unit: Unit, places: Mapping[str, Place]) -> None:
        self._unit, self._places = unit, places
        self._records: list[TensorRecord] = []
        self._digest: TensorDigest | None = None
        self._num_nonfinite = 0

    def target(self, stored: StoredTensor, start_byte: int, nbytes: int) -> Bytes | None:
        memory = self._places[stored.name].memory
        return None if memory is None else memory[start_byte : start_byte + nbytes]

    def write(self, stored: StoredTensor, start_byte: int, bits: Bytes, num_nonfinite: int) -> None:
        if self._digest is None:
            self._digest = TensorDigest(stored.dtype, stored.shape)
        self._digest.update(bits.data)
        self._num_nonfinite += num_nonfinite
        self._place(self._places[stored.name], start_byte, bits)
        if start_byte + bits.nbytes == stored.nbytes:
            self._records.append(
                TensorRecord(stored.name, stored.dtype, stored.shape, self._digest.hexdigest(), self._num_nonfinite)
            )
            self._digest, self._num_nonfinite = None, 0

    @staticmethod
    def _place(place: Place, start_byte: int, bits: Bytes) -> None:
        if place.flat is None or not bits.nbytes:
            return
        if place.memory is not None:
            target = place.memory[start_byte : start_byte + bits.nbytes]
            if target.__array_interface__["data"] != bits.__array_interface__["data"]:
                target[:] = bits
            return
        import torch

        # A conversion rounds as a load into the model's dtype does.
        values = torch.from_numpy(bits).view(place.dtype)
        first = start_byte // values.element_size()
        place.flat[first : first + len(values)].copy_(values)

    def finish(self) -> OutputRecord:
        missing = {tensor.stored.name for tensor in self._unit.tensors} - {record.name for record in self._records}
        if missing:
            raise AssertionError(f"{self._unit.file}: {len(missing)} tensors were not written, such as {min(missing)}")
        return OutputRecord(self._unit.file, self._unit.write_bytes, "", tuple(self._records))

    def abort(self) -> None:
        """Nothing to undo: whoever holds the model forgets it."""
