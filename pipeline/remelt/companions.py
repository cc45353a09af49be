"""What goes with the weights: config, tokenizer, templates, licence, from the checkpoint that gives the layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remelt.dtypes import DTYPES
from remelt.hub import leads_outside

_NAMES = {
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
_PATTERNS = ("*.jinja", "tokenizer*", "*.tiktoken", "LICENSE*", "NOTICE*")
_MAX_BYTES = 200_000_000


def companion_files(root: Path) -> list[tuple[str, Path]]:
    """Files to copy beside the weights, by name; never Python code, never weights, never what a link drags in."""
    return [(name, root / name) for name in _companions(root) if not leads_outside(root, root / name)]


def linked_companions(root: Path) -> list[str]:
    """Names of those left behind since they are links outside the folder, to whatever a stranger chose."""
    return [name for name in _companions(root) if leads_outside(root, root / name)]


def _companions(root: Path) -> list[str]:
    names = {path.name for pattern in _PATTERNS for path in root.glob(pattern)} | _NAMES
    return [
        name
        for name in sorted(names)
        if (root / name).is_file()
        and not name.endswith((".py", ".safetensors", ".bin"))
        and (root / name).stat().st_size <= _MAX_BYTES
    ]


def output_config(config: Mapping[str, Any], dtype: str | None, *, is_scaled: bool) -> bytes:
    """config.json for the output: the layout's own, with the output's dtype under whichever key it uses.

    `is_scaled` says that the output holds fp8 codes; without them a `quantization_config` would mislead loaders.
    """
    document = dict(config)
    if not is_scaled:
        document.pop("quantization_config", None)
    if dtype is not None and not is_scaled:
        sections = [document]
        if isinstance(document.get("text_config"), dict):
            document["text_config"] = dict(document["text_config"])
            sections.append(document["text_config"])
        for section in sections:
            keys = [key for key in ("dtype", "torch_dtype") if key in section]
            if section is document:
                keys = keys or ["dtype"]
            section.update(dict.fromkeys(keys, DTYPES[dtype].torch_name))
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
