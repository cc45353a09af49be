"""Write the checkpoints that the benchmarks merge: Llama-shaped ones, and DeepSeek-V3-shaped ones of any apparent size.

    python benchmarks/make_checkpoints.py llama --output DIR --fine-tunes 4
    python benchmarks/make_checkpoints.py deepseek --output DIR --count 16          # sparse files, 16 x 685 GB apparent
    python benchmarks/make_checkpoints.py deepseek --output DIR --count 16 --dtype bf16
    python benchmarks/make_checkpoints.py miniature --output DIR --count 3

Everything is seeded: the same call writes the same bytes. The Llama shape and the miniature hold real values; the big
DeepSeek checkpoints are true safetensors headers over holes, for planning only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8_BLOCK = 128
SHARED = 0.3  # part of a task vector's variance that all fine-tunes have in common
FP8_MAX = 448.0  # the largest finite float8_e4m3fn


# ---------------------------------------------------------------------------------------------------------------------
# Llama: a base and its fine-tunes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama; the defaults are the 424M-parameter shape of the benchmarks (847 MB in bfloat16)."""

    num_layers: int = 24
    hidden: int = 1024
    intermediate: int = 3488
    vocab: int = 32_000
    num_heads: int = 16

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes in storage order."""
        h, m = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (h,)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{prefix}.self_attn.{name}.weight"] = (h, h)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (h,)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (m, h)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (m, h)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (h, m)
        shapes["model.norm.weight"] = (h,)
        shapes["lm_head.weight"] = (self.vocab, h)
        return shapes

    def config(self, dtype: str) -> dict[str, Any]:
        """The config.json that transformers and mergekit read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "vocab_size": self.vocab,
        }


SMALL_LLAMA = LlamaShape(num_layers=6, hidden=640, intermediate=1728, vocab=8_000, num_heads=10)
"""40M parameters, 80 MB in bfloat16: big enough to be split, small enough to be merged a hundred times."""


def _generator(*key: object) -> torch.Generator:
    """A generator whose stream depends on the key alone, so that tensors can be made in any order."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def _base_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=_generator(seed, "base", name))
    return 1.0 + 0.1 * noise if "norm" in name else 0.02 * noise


def _task_vector(name: str, shape: tuple[int, ...], base: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """A delta of 1e-3 to 1e-2 of the base's rms, its size drawn for each tensor, heavier-tailed than a Gaussian.

    In bfloat16 much of it rounds to exactly zero, as in light fine-tuning. Any two fine-tunes have a part in common
    (before rounding, a cosine of about `SHARED`): without it Model Stock would return the base.
    """
    generator = _generator(seed, "fine-tune", number, name)
    ratio = 10 ** (-3 + torch.rand((), generator=generator).item())
    noise = torch.randn(shape, generator=generator).mul_((1 - SHARED) ** 0.5)
    noise += torch.randn(shape, generator=_generator(seed, "shared", name)).mul_(SHARED**0.5)
    noise = noise * noise.abs().sqrt_()
    return noise * (ratio * base.square().mean().sqrt() / noise.square().mean().sqrt())


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def write_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], num_shards: int = 1) -> None:
    """Write safetensors in one file, or in `num_shards` of about equal size with an index."""
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(num_shards - 1, written * num_shards // total)][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for place, shard in enumerate(shards):
        file_name = f"model-{place + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_llama(
    output: Path,
    shape: LlamaShape | None = None,
    *,
    num_fine_tunes: int = 4,
    seed: int = 0,
    dtype: str = "bfloat16",
    num_shards: int = 1,
) -> list[Path]:
    """Write a base and its fine-tunes; returns their folders, the base first. What is there already is kept."""
    shape = shape or LlamaShape()
    torch_dtype = TORCH_DTYPES[dtype]
    folders = [output / "base"] + [output / f"tune-{number}" for number in range(1, num_fine_tunes + 1)]
    for number, folder in enumerate(folders):
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, dims in shape.shapes().items():
            # Fine-tuning starts from what is stored, so the delta is added to the rounded base.
            base = _base_tensor(name, dims, seed).to(torch_dtype)
            if number:
                wide = base.float()
                base = (wide + _task_vector(name, dims, wide, seed, number)).to(torch_dtype)
            tensors[name] = base
        write_sharded(folder, tensors, num_shards)
        # Last, since it is what says that the folder is complete.
        _write_config(folder, shape.config(dtype))
    return folders


# ---------------------------------------------------------------------------------------------------------------------
# DeepSeek-V3: the released layout, sparse or in miniature
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One stored tensor of the layout."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        num = ITEM_BYTES[self.dtype]
        for dim in self.shape:
            num *= dim
        return num


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeekShape:
    """Sizes of a DeepSeek-V3; the defaults are the released model's."""

    num_layers: int = 61
    num_dense_layers: int = 3
    hidden: int = 7168
    intermediate: int = 18_432
    expert_intermediate: int = 2048
    num_experts: int = 256
    num_groups: int = 8
    num_groups_per_token: int = 4
    num_experts_per_token: int = 8
    num_heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    qk_nope: int = 128
    qk_rope: int = 64
    v_head: int = 128
    vocab: int = 129_280
    dtype: Literal["fp8", "bf16"] = "fp8"

    def _linear(self, name: str, rows: int, columns: int) -> Iterator[Entry]:
        if self.dtype == "bf16":
            yield Entry(f"{name}.weight", "BF16", (rows, columns))
            return
        yield Entry(f"{name}.weight", "F8_E4M3", (rows, columns))
        yield Entry(f"{name}.weight_scale_inv", "F32", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)))

    def _mlp(self, prefix: str, intermediate: int) -> Iterator[Entry]:
        yield from self._linear(f"{prefix}.gate_proj", intermediate, self.hidden)
        yield from self._linear(f"{prefix}.up_proj", intermediate, self.hidden)
        yield from self._linear(f"{prefix}.down_proj", self.hidden, intermediate)

    def _attention(self, prefix: str) -> Iterator[Entry]:
        yield from self._linear(f"{prefix}.q_a_proj", self.q_rank, self.hidden)
        yield Entry(f"{prefix}.q_a_layernorm.weight", "BF16", (self.q_rank,))
        yield from self._linear(f"{prefix}.q_b_proj", self.num_heads * (self.qk_nope + self.qk_rope), self.q_rank)
        yield from self._linear(f"{prefix}.kv_a_proj_with_mqa", self.kv_rank + self.qk_rope, self.hidden)
        yield Entry(f"{prefix}.kv_a_layernorm.weight", "BF16", (self.kv_rank,))
        yield from self._linear(f"{prefix}.kv_b_proj", self.num_heads * (self.qk_nope + self.v_head), self.kv_rank)
        yield from self._linear(f"{prefix}.o_proj", self.hidden, self.num_heads * self.v_head)

    def entries(self) -> Iterator[Entry]:
        """Every stored tensor, in storage order; 91,991 of them in the released fp8 layout."""
        vector = (self.hidden,)
        yield Entry("model.embed_tokens.weight", "BF16", (self.vocab, self.hidden))
        # One layer more than the model has: multi-token prediction is stored as the layer after the last.
        for layer in range(self.num_layers + 1):
            prefix = f"model.layers.{layer}"
            is_mtp = layer == self.num_layers
            if is_mtp:
                yield Entry(f"{prefix}.embed_tokens.weight", "BF16", (self.vocab, self.hidden))
                yield Entry(f"{prefix}.enorm.weight", "BF16", vector)
                yield Entry(f"{prefix}.hnorm.weight", "BF16", vector)
                yield Entry(f"{prefix}.eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden))
            yield Entry(f"{prefix}.input_layernorm.weight", "BF16", vector)
            yield from self._attention(f"{prefix}.self_attn")
            yield Entry(f"{prefix}.post_attention_layernorm.weight", "BF16", vector)
            if layer < self.num_dense_layers:
                yield from self._mlp(f"{prefix}.mlp", self.intermediate)
            else:
                yield Entry(f"{prefix}.mlp.gate.weight", "BF16", (self.num_experts, self.hidden))
                yield Entry(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (self.num_experts,))
                yield from self._mlp(f"{prefix}.mlp.shared_experts", self.expert_intermediate)
                for expert in range(self.num_experts):
                    yield from self._mlp(f"{prefix}.mlp.experts.{expert}", self.expert_intermediate)
            if is_mtp:
                yield Entry(f"{prefix}.shared_head.norm.weight", "BF16", vector)
                yield Entry(f"{prefix}.shared_head.head.weight", "BF16", (self.vocab, self.hidden))
        yield Entry("model.norm.weight", "BF16", vector)
        yield Entry("lm_head.weight", "BF16", (self.vocab, self.hidden))

    def config(self) -> dict[str, Any]:
        """The config.json of the layout."""
        config: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": self.num_dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "kv_lora_rank": self.kv_rank,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": self.expert_intermediate,
            "moe_layer_freq": 1,
            "n_group": self.num_groups,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.num_experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_heads,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.qk_nope,
            "qk_rope_head_dim": self.qk_rope,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": self.num_groups_per_token,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": self.v_head,
            "vocab_size": self.vocab,
        }
        if self.dtype == "fp8":
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            }
        return config


MINIATURE = DeepSeekShape(
    num_layers=3,
    num_dense_layers=1,
    hidden=160,
    intermediate=288,
    expert_intermediate=96,
    num_experts=8,
    num_groups=2,
    num_groups_per_token=1,
    num_experts_per_token=2,
    num_heads=4,
    q_rank=48,
    kv_rank=32,
    qk_nope=16,
    qk_rope=8,
    v_head=16,
    vocab=512,
)
"""Every tensor class of the released layout in 2.3 MB; 160, 288 and 192 columns leave ragged blocks of 128."""


def _cut_into_shards(entries: Sequence[Entry], num_shards: int) -> list[list[Entry]]:
    """Cut in storage order into shards of about equal bytes; a scale stays with its weight."""
    total = sum(entry.nbytes for entry in entries)
    shards: list[list[Entry]] = [[] for _ in range(num_shards)]
    written = place = 0
    for entry in entries:
        if not entry.name.endswith("_scale_inv"):
            place = min(num_shards - 1, written * num_shards // total)
        shards[place].append(entry)
        written += entry.nbytes
    return shards


def _header(shard: Sequence[Entry]) -> tuple[bytes, int]:
    """The bytes of a safetensors header (with its length prefix), and the size of the data behind it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def write_sparse_deepseek(
    output: Path, shape: DeepSeekShape | None = None, *, count: int = 16, num_shards: int = 160, seed: int = 0
) -> list[Path]:
    """Write checkpoints whose headers are true and whose data are holes; returns their folders.

    Each differs from the others by a few bytes in the middle and at the end of every file, so that no two have the same
    fingerprints. About 20 MB of disk each.
    """
    shape = shape or DeepSeekShape()
    entries = list(shape.entries())
    shards = _cut_into_shards(entries, num_shards)
    headers = [_header(shard) for shard in shards]
    file_names = [f"model-{place + 1:05d}-of-{num_shards:06d}.safetensors" for place in range(num_shards)]
    total = sum(size for _, size in headers)
    weight_map = {entry.name: file_name for file_name, shard in zip(file_names, shards, strict=True) for entry in shard}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    folders = [output / f"model-{number:02d}" for number in range(count)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        generator = random.Random(f"{seed}/{number}")
        for file_name, (header, data_bytes) in zip(file_names, headers, strict=True):
            size = len(header) + data_bytes
            with (folder / file_name).open("wb") as file:
                file.write(header)
                file.truncate(size)
                for offset in (size // 2, len(header) + data_bytes // 2, size - 16):
                    os.pwrite(file.fileno(), generator.randbytes(16), offset)
        (folder / "model.safetensors.index.json").write_text(index, "utf-8")
        _write_config(folder, shape.config())
    return folders


def quantise_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale for each 128 x 128 block, the edge blocks ragged: weight = code * scale."""
    rows, columns = weight.shape
    row_blocks, column_blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = torch.zeros(row_blocks * FP8_BLOCK, column_blocks * FP8_BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / FP8_MAX
    spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[:rows, :columns]
    return (weight / spread).to(torch.float8_e4m3fn), scales


def write_miniature_deepseek(
    output: Path, shape: DeepSeekShape = MINIATURE, *, count: int = 3, num_shards: int = 3, seed: int = 0
) -> list[Path]:
    """Write small checkpoints of the same layout with real values; the later ones are fine-tunes of the first."""
    folders = [output / f"model-{number:02d}" for number in range(count)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for entry in shape.entries():
            if entry.name.endswith("_scale_inv"):
                continue
            value = _base_tensor(entry.name, entry.shape, seed)
            if number:
                value = value + _task_vector(entry.name, entry.shape, value, seed, number)
            if entry.dtype == "F8_E4M3":
                tensors[entry.name], tensors[f"{entry.name}_scale_inv"] = quantise_fp8(value)
            else:
                tensors[entry.name] = value.to(torch.float32 if entry.dtype == "F32" else torch.bfloat16)
        write_sharded(folder, tensors, num_shards)
        _write_config(folder, shape.config())
    return folders


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=["llama", "llama-small", "deepseek", "miniature"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fine-tunes", type=int, default=4, help="of a Llama base")
    parser.add_argument("--count", type=int, help="number of DeepSeek-shaped checkpoints (16; miniature 3)")
    parser.add_argument("--shards", type=int, help="files of each checkpoint (1; DeepSeek 160; miniature 3)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (Llama); fp8 or bf16 (DeepSeek)")
    options = parser.parse_args(arguments)
    if options.kind.startswith("llama"):
        folders = write_llama(
            options.output,
            SMALL_LLAMA if options.kind == "llama-small" else LlamaShape(),
            num_fine_tunes=options.fine_tunes,
            seed=options.seed,
            dtype=options.dtype or "bfloat16",
            num_shards=options.shards or 1,
        )
    elif options.kind == "deepseek":
        folders = write_sparse_deepseek(
            options.output,
            DeepSeekShape(dtype=options.dtype or "fp8"),
            count=options.count or 16,
            num_shards=options.shards or 160,
            seed=options.seed,
        )
    else:
        folders = write_miniature_deepseek(
            options.output,
            replace(MINIATURE, dtype=options.dtype or "fp8"),
            count=options.count or 3,
            num_shards=options.shards or 3,
            seed=options.seed,
        )
    print("\n".join(str(folder) for folder in folders))


if __name__ == "__main__":
    main()
