"""Checkpoints that are recognised by their file names but not read: pickles above all, and kinds still to come.

A pickle runs code when it is loaded, so these wait for a reader that loads nothing executable.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CONVERT = "convert it to safetensors first, on a machine where you trust the file"


class UnreadKind(NamedTuple):
    """A kind of checkpoint that is refused with advice."""

    pattern: re.Pattern[str]
    """Matches the name of a file or folder that gives the kind away."""
    kind: str
    advice: str


# In the order of choice: the first that matches any name in the folder is named.
UNREAD_KINDS = (
    UnreadKind(
        re.compile(r"latest|latest_universal|global_step\d+.*|.*zero_pp_rank_.*\.pt|mp_rank_\d+_model_states\.pt"),
        "a DeepSpeed ZeRO directory; pickle files are not read yet",
        "make a safetensors checkpoint of it with DeepSpeed's zero_to_fp32.py and its --safe_serialization",
    ),
    UnreadKind(
        re.compile(r"\.metadata|.*\.distcp"),
        "a torch distributed checkpoint (DCP); pickle files are not read yet",
        "export it to safetensors with the tools of the trainer that wrote it",
    ),
    UnreadKind(
        re.compile(r"pytorch_model\.bin\.index\.json|.*\.bin"),
        "a .bin checkpoint; pickle files are not read yet",
        f"{CONVERT}: load it with transformers and call save_pretrained",
    ),
    UnreadKind(
        re.compile(r".*\.(pt|pth|ckpt|pkl)"), "a .pt or .ckpt checkpoint; pickle files are not read yet", CONVERT
    ),
    UnreadKind(re.compile(r".*\.gguf"), "a GGUF file, which is not read", "merge the checkpoint it was made from"),
    UnreadKind(
        re.compile(r"adapter_model\.safetensors|adapter_config\.json"),
        "a LoRA adapter, which is not read yet",
        "merge it into its base with peft's merge_and_unload and save that",
    ),
)


def recognise_unread(names: frozenset[str]) -> UnreadKind | None:
    """The kind of a folder with these file names, if it is one that is refused by name."""
    for kind in UNREAD_KINDS:
        if any(kind.pattern.fullmatch(name) for name in names):
            return kind
    return None
