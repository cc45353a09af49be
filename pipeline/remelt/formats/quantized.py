"""Quantised checkpoints: fp8 with block scales is paired into logical tensors, every other kind is refused by name.

DeepSeek's fp8 layout: `X.weight` in float8_e4m3 with `X.weight_scale_inv`, one scale for each block of
`weight_block_size` elements of the last two dimensions; value = code * scale
(https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py, `weight_dequant`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from remelt.checkpoint import FP8_BLOCK, RAW, Piece, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import CheckpointError

CODE_DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
DEFAULT_BLOCK = (128, 128)
"""DeepSeek's, for a checkpoint whose config.json declares none."""

# Parts of the names of integer tensors that give a quantisation away where config.json does not.
_TELLTALES = (
    (".qweight", "gptq or awq"),
    (".qzeros", "gptq or awq"),
    (".quant_state.bitsandbytes", "bitsandbytes"),
    (".weight_packed", "compressed-tensors"),
    ("_blocks", "mxfp4"),
    (".weight.absmax", "bitsandbytes"),
    ("proj.weight", "an integer format"),
)

DEQUANTISE_FIRST = "dequantise first, for instance with the model's own tools, and merge the bfloat16 checkpoint"


class Quantization(NamedTuple):
    """What config.json declares."""

    method: str | None
    block: tuple[int, int]
    """Rows and columns that share an fp8 scale."""


def read_quantization(config: Mapping[str, Any], source: str) -> Quantization:
    """Find the declared quantisation and refuse every kind but block-scaled fp8.

    Raises:
        CheckpointError: the kind is unknown to us.
    """
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        # compression_config is the older key of compressed-tensors.
        declared = section.get("quantization_config") or section.get("compression_config")
        if declared:
            return _known_quantization(declared, source)
    return Quantization(None, DEFAULT_BLOCK)


def _known_quantization(declared: object, source: str) -> Quantization:
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if not isinstance(declared, dict) or method != "fp8":
        raise _unknown_kind(source, f"quant_method {method} in config.json")
    block = declared.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _unknown_kind(source, f"quant_method fp8 with weight_block_size {block}, where two sizes are read")
    return Quantization("fp8", (block[0], block[1]))


def _unknown_kind(source: str, found: str) -> CheckpointError:
    return CheckpointError(f"{source}: quantised checkpoint of unknown kind: found {found}; {DEQUANTISE_FIRST}")


def pair_fp8(tensors: dict[str, TensorInfo], block: tuple[int, int], source: str) -> int:
    """Join every fp8 weight with its scales into one logical tensor, in place; gives the number of pairs.

    The logical tensor stands where its codes do, with pieces (codes, scales).

    Raises:
        CheckpointError: a quantised tensor without its scales, scales without codes, or of another number than the
            blocks of the weight.
    """
    codes = [name for name, info in tensors.items() if info.dtype == CODE_DTYPE]
    checked: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for name in codes:
        info = tensors[name]
        scale_name = name + SCALE_SUFFIX
        scale = tensors.pop(scale_name, None)
        if scale is None:
            raise _unknown_kind(source, f"{name} in {CODE_DTYPE} without {scale_name}")
        if (info.shape, scale.shape) not in checked:
            _check_scales(name, info, scale, block, source)
            checked.add((info.shape, scale.shape))
        if scale.dtype not in SCALE_DTYPES:
            raise _unknown_kind(source, f"{scale_name} in {scale.dtype}, where {', '.join(SCALE_DTYPES)} are read")
        pieces = (info.pieces[0], Piece(*scale.pieces[0][:5], scale_name))
        tensors[name] = TensorInfo(info.dtype, info.shape, FP8_BLOCK, pieces)
    _refuse_other_kinds(tensors, source)
    return len(codes)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight: one for each block of the last two dimensions, a part of one included."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _check_scales(name: str, codes: TensorInfo, scale: TensorInfo, block: tuple[int, int], source: str) -> None:
    if len(codes.shape) < 2:
        raise _unknown_kind(source, f"{name} in {CODE_DTYPE} of shape {list(codes.shape)}, where matrices are read")
    wanted = scale_shape(codes.shape, block)
    if scale.shape != wanted:
        raise CheckpointError(
            f"{source}: {name}{SCALE_SUFFIX} has shape {list(scale.shape)}, but {name} of shape {list(codes.shape)} in "
            f"blocks of {block[0]} x {block[1]} needs {list(wanted)}; check weight_block_size in config.json"
        )


def _refuse_other_kinds(tensors: Mapping[str, TensorInfo], source: str) -> None:
    for name, info in tensors.items():
        # The two commonest kinds of tensor leave at once: this loop sees every tensor of every checkpoint.
        if info.codec != RAW or info.dtype == "BF16":
            continue
        dtype = DTYPES[info.dtype]
        if not dtype.is_mergeable and dtype.is_floating:
            raise _unknown_kind(source, f"{name} in {info.dtype} without a known scale")
        if not dtype.is_floating:
            for mark, kind in _TELLTALES:
                if mark in name:
                    raise _unknown_kind(source, f"{name} in {info.dtype}, as {kind} has it")
        elif name.endswith(SCALE_SUFFIX):
            raise CheckpointError(
                f"{source}: {name} has no fp8 weight {name.removesuffix(SCALE_SUFFIX)}; {DEQUANTISE_FIRST}"
            )
