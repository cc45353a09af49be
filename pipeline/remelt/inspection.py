"""What a checkpoint holds, as plain data for `remelt inspect`: from its index alone, no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remelt.checkpoint import RAW, CheckpointIndex
from remelt.tensor_classes import classify, num_layers

# What the families call the number of routed experts in config.json.
_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")


def inspect(index: CheckpointIndex) -> dict[str, Any]:
    """Describe a checkpoint; the result is JSON as it is.

    `dtypes` and `classes` count tensors, parameters and bytes (scales of quantised tensors in the bytes only);
    `tied_head` says that the output layer uses the embedding; `experts` is per layer, None for a dense model.
    """
    layers = _from_config(index.config, ("num_hidden_layers",))
    if layers is None:
        layers = num_layers(index.tensors)
    dtypes: dict[str, dict[str, int]] = {}
    classes: dict[str, dict[str, dict[str, int]]] = {}
    last_expert = -1
    for name, info in index.tensors.items():
        found = classify(name, layers)
        last_expert = max(last_expert, -1 if found.expert is None else found.expert)
        dtype = info.dtype if info.codec == RAW else f"{info.dtype} ({info.codec})"
        for counts in (dtypes, classes.setdefault(found.kind, {})):
            count = counts.setdefault(dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
            count["tensors"] += 1
            count["parameters"] += info.num_elements
            count["bytes"] += info.nbytes
    return {
        "source": index.source,
        "root": index.root,
        "format": index.format,
        "architectures": index.config.get("architectures"),
        "model_type": index.config.get("model_type"),
        "files": len(index.files),
        "file_bytes": sum(file.size for file in index.files),
        "tensors": len(index.tensors),
        "parameters": sum(count["parameters"] for count in dtypes.values()),
        "bytes": sum(count["bytes"] for count in dtypes.values()),
        "dtypes": dtypes,
        "classes": classes,
        "layers": layers,
        "experts": last_expert + 1 if last_expert >= 0 else _from_config(index.config, _EXPERT_KEYS),
        "quantization": index.quantization,
        "tied_head": "embedding" in classes and "head" not in classes,
        "notes": list(index.notes),
    }


def _from_config(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that config.json has as a number, in itself or in the text part of a multimodal one."""
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        for key in keys:
            if type(section.get(key)) is int:
                return int(section[key])
    return None
