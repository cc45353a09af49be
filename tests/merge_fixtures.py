"""Small parents of a Llama-like layout on disk, and recipes over them, for tests of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_files import bf16, write_file
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def parent_tensors(
    seed: int, *, base_seed: int = 0, vocabulary: int = 50
) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Tensors of one parent in bfloat16 with an integer one among them: the base's plus a task vector."""
    shapes = {"model.embed_tokens.weight": (vocabulary, 48)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (48, 48),
            f"{prefix}.mlp.up_proj.weight": (700, 48),
            f"{prefix}.mlp.down_proj.weight": (48, 700),
            f"{prefix}.input_layernorm.weight": (48,),
        }
    shapes |= {"model.norm.weight": (48,), "lm_head.weight": (vocabulary, 48)}
    base, own = np.random.default_rng(base_seed), np.random.default_rng(1000 + seed)
    tensors: dict[str, tuple[str, np.ndarray[Any, Any]]] = {}
    for name, shape in shapes.items():
        values = base.standard_normal(shape).astype(np.float32)
        if seed:
            values = values + own.standard_normal(shape).astype(np.float32) * 0.1
        tensors[name] = bf16(values)
    tensors["model.position_offset"] = ("I64", np.arange(3))
    return tensors


def write_parent(folder: Path, seed: int, **changes: Any) -> Path:
    """A parent checkpoint with config.json; `changes` go to `parent_tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", parent_tensors(seed, **changes))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_pool(root: Path, num_parents: int = 3) -> dict[str, Path]:
    """A base and parents, by name: base, p1, p2, ..."""
    names = ["base", *(f"p{number}" for number in range(1, num_parents + 1))]
    return {name: write_parent(root / name, number) for number, name in enumerate(names)}


def make_recipe(pool: Mapping[str, Path], method: str = "linear", **changes: Any) -> Recipe:
    """A recipe over all parents of a pool with weight 0.4 each; operators with a base take the pool's."""
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(path), "name": name, "parameters": {"weight": 0.4}}
            for name, path in pool.items()
            if name != "base"
        ],
    }
    if method != "linear":
        document["base_model"] = str(pool["base"])
    document.update(changes)
    return parse_recipe(document)
