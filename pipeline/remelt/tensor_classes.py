"""What part of a model a tensor belongs to, told from its name.

Covers the names of Llama, Qwen (2, 3 and their mixtures of experts), Mistral (both layouts), Gemma, Mixtral,
DeepSeek-V2/V3 and gpt-oss. Other architectures still merge; what is not recognised has the class `other`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias, get_args

Kind: TypeAlias = Literal[
    "embedding",
    "head",
    "attention",
    "mlp",
    "routed_experts",
    "shared_experts",
    "router",
    "norm",
    "mtp",
    "vision",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class TensorClass(NamedTuple):
    """Class, layer and expert of a tensor."""

    kind: Kind
    layer: int | None
    """Layer of the language model; None outside its layers, in a vision tower and in a module called `mtp`."""
    expert: int | None
    """Number of the routed expert; None for all others, fused experts included."""


_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|block|layer)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")

# Each set holds whole components of a dotted name.
_VISION = frozenset(
    [
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "visual",
        "vision_adapter",
        "vision_language_adapter",
        "multi_modal_projector",
        "mm_projector",
        "patch_merger",
        "image_newline",
        "vision_embed_tokens",
        "embed_vision",
    ]
)
_EMBEDDING = frozenset(["embed_tokens", "tok_embeddings", "word_embeddings", "wte"])
_HEAD = frozenset(["lm_head", "embed_out", "output"])
_ATTENTION = frozenset(["self_attn", "attention", "linear_attn"])
_MLP = frozenset(["mlp", "feed_forward", "block_sparse_moe"])
_SHARED = frozenset(["shared_expert", "shared_experts", "shared_expert_gate"])
_ROUTER = frozenset(["gate", "router"])
# Tensors that only a multi-token-prediction layer of DeepSeek's layout has.
_MTP = frozenset(["eh_proj", "enorm", "hnorm", "shared_head"])


@lru_cache(maxsize=1 << 18)
def classify(name: str, num_hidden_layers: int | None = None) -> TensorClass:
    """The class, layer and expert of the tensor called `name`.

    Norms inside attention (`q_norm`, `kv_a_layernorm`) are `norm`; the gate of a shared expert is `shared_experts`;
    DeepSeek's `e_score_correction_bias` is `router`; scales of a quantised weight are classed as their weight is.

    Args:
        name: as stored, such as `model.layers.3.mlp.experts.17.up_proj.weight`.
        num_hidden_layers: of the language model. DeepSeek stores its multi-token-prediction layers behind the last
            one, so a layer from this number on is `mtp`; without it only tensors that no other layer has are.
    """
    components = name.split(".")
    parts = frozenset(components)
    if parts & _VISION:
        return TensorClass("vision", None, None)
    if "mtp" in parts:
        return TensorClass("mtp", None, int(found[1]) if (found := _EXPERT.search(name)) else None)
    stack = _LAYER.search(name)
    layer = int(stack[2]) if stack else None
    expert = int(found[1]) if (found := _EXPERT.search(name)) else None
    is_behind = layer is not None and num_hidden_layers is not None and layer >= num_hidden_layers
    if is_behind or parts & _MTP:
        return TensorClass("mtp", layer, expert)
    if stack and stack[1] != "layers":
        # GPT-2 and its like: a stack of layers that is known, with modules whose names are not.
        return TensorClass("other", layer, expert)
    return TensorClass(_kind(components, parts, layer), layer, expert)


def _kind(components: list[str], parts: frozenset[str], layer: int | None) -> Kind:
    if parts & _EMBEDDING:
        return "embedding"
    if layer is None and parts & _HEAD:
        return "head"
    if parts & _SHARED:
        return "shared_experts"
    if "experts" in parts:
        return "routed_experts"
    if _is_norm(components):
        return "norm"
    if parts & _MLP:
        return "router" if parts & _ROUTER else "mlp"
    return "attention" if parts & _ATTENTION else "other"


def _is_norm(components: list[str]) -> bool:
    """Whether the module that holds the tensor is a normalisation: `input_layernorm`, `q_norm`, `ffn_norm`, `norm`."""
    module = components[-2] if len(components) > 1 else components[-1]
    return module == "norm" or module.endswith(("_norm", "layernorm"))


def num_layers(names: Iterable[str]) -> int:
    """Layers of the language model, counted from tensor names: multi-token-prediction layers are not among them.

    DeepSeek's prediction layers are told by tensors that no other layer has (`eh_proj`, `enorm`, `hnorm`).
    """
    last, first_mtp = -1, None
    for name in names:
        found = classify(name)
        if found.layer is None:
            continue
        if found.kind == "mtp":
            first_mtp = found.layer if first_mtp is None else min(first_mtp, found.layer)
        else:
            last = max(last, found.layer)
    return last + 1 if first_mtp is None else first_mtp
