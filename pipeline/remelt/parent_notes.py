"""What tensors do not show: parents whose tokenizers or configs say that equal numbers mean different things.

The merge takes tokenizer and config of the checkpoint that gives the layout. Where another parent's disagree, that is
said, and not refused: fine-tunes add tokens and move limits for good reasons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from remelt.checkpoint import CheckpointIndex

TOKENIZER = "tokenizer.json"
_SAYS_NOTHING = {
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}
"""Keys of a config that change nothing in what the weights mean, or that other checks speak of."""
_MAX_SHOWN = 5


def parent_notes(layout: CheckpointIndex, parents: Sequence[CheckpointIndex]) -> list[str]:
    """A sentence for each parent whose tokenizer gives tokens other ids, and for each whose config is another."""
    notes = []
    for parent in {index.root: index for index in parents if index.root != layout.root}.values():
        moved = _moved_tokens(Path(layout.root, TOKENIZER), Path(parent.root, TOKENIZER))
        if moved:
            token, (there, here) = next(iter(moved.items()))
            notes.append(
                f"{parent.source}: its tokenizer gives {len(moved)} tokens other ids than {layout.source}, such as "
                f"{token!r} ({there} there, {here} here): rows of its embeddings and head mean other tokens. Copy "
                "those classes from the base by a rule, or leave the checkpoint out"
            )
        if layout.config and not parent.config:
            notes.append(f"{parent.source} has no config.json: whether it is of the same architecture is not known")
        differing = _differing_keys(layout.config, parent.config) if layout.config and parent.config else []
        if differing:
            shown = ", ".join(
                f"{key} ({_short(parent.config.get(key))} there, {_short(layout.config.get(key))} here)"
                for key in differing[:_MAX_SHOWN]
            )
            more = f", and {len(differing) - _MAX_SHOWN} more" if len(differing) > _MAX_SHOWN else ""
            notes.append(
                f"{parent.source}: its config.json differs from that of {layout.source}, which the merge takes: {shown}"
                f"{more}"
            )
    return notes


def _differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that both have with different values; a key that one lacks is a default of the other's time."""
    return sorted(key for key in one.keys() & other.keys() - _SAYS_NOTHING if one[key] != other[key])


@lru_cache(maxsize=256)
def _moved_tokens(one: Path, other: Path) -> dict[str, tuple[int, int]]:
    """Tokens that both know, by different ids: token -> (id in `other`, id in `one`).

    Remembered: a study plans the same parents for every candidate.
    """
    try:
        texts = one.read_bytes(), other.read_bytes()
        if texts[0] == texts[1]:
            return {}
        ids = [_token_ids(json.loads(text)) for text in texts]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # without a tokenizer.json, or with one of another make, there is nothing to compare
    return {token: (place, ids[0][token]) for token, place in ids[1].items() if ids[0].get(token, place) != place}


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {pair[0]: place for place, pair in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    return {str(token): int(place) for token, place in {**vocabulary, **added}.items()}


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
