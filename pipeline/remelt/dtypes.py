"""The dtypes a checkpoint may store, named as safetensors names them.

One place for what is known of each: item size, whether arithmetic is defined on it, torch's name for it.
Nothing here imports torch, so that planning never pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """A storage dtype: safetensors' name, torch's attribute name, item size in bits, and its kind."""

    name: str
    torch_name: str
    item_bits: int
    is_floating: bool

    @property
    def is_mergeable(self) -> bool:
        """Whether operators compute on it: floating and of 16 bits or more, which includes no scaled format."""
        return self.is_floating and self.item_bits >= 16


_TABLE = (
    DType("F64", "float64", 64, True),
    DType("F32", "float32", 32, True),
    DType("F16", "float16", 16, True),
    DType("BF16", "bfloat16", 16, True),
    DType("F8_E4M3", "float8_e4m3fn", 8, True),
    DType("F8_E5M2", "float8_e5m2", 8, True),
    DType("F8_E8M0", "float8_e8m0fnu", 8, True),
    DType("I64", "int64", 64, False),
    DType("I32", "int32", 32, False),
    DType("I16", "int16", 16, False),
    DType("I8", "int8", 8, False),
    DType("U64", "uint64", 64, False),
    DType("U32", "uint32", 32, False),
    DType("U16", "uint16", 16, False),
    DType("U8", "uint8", 8, False),
    DType("BOOL", "bool", 8, False),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}

# How recipes write dtypes (mergekit's names and torch's own).
RECIPE_DTYPES: dict[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a dense tensor of `dtype` (safetensors' name) and `shape`."""
    num_elements = 1
    for dim in shape:
        num_elements *= dim
    return num_elements * DTYPES[dtype].item_bits // 8
