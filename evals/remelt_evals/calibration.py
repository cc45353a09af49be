"""Calibration data: text that a loss is taken on, cut into blocks of a fixed number of tokens.

    calibration:
      sources:
        - {path: prose.txt}
        - {path: sums.jsonl, prompt: question, field: answer, name: sums, weight: 2}
      blocks: 32            # of each source, for the gradient
      held_out: 16          # of each source, for the loss that is reported and never optimised
      block_tokens: 512
      end_of_text: true     # the tokenizer's token after each document; false for models that never saw it in training

A source's documents follow each other in an order drawn from the seed, and the stream is cut into blocks that do not
overlap. Which blocks are used is drawn as well. All blocks have one length, so that batches need no padding. A `prompt`
is read but not counted: the loss is of what follows it. The loss is the weighted mean over sources of the mean over the
tokens that count, so that a long source does not drown a short one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.errors import EvaluationError
from remelt.strict_config import Section, suggestion

MAX_TEXT_BYTES = 64_000_000
"""Of one source. Calibration takes thousands of tokens; what lies beyond is not read."""
OVERSUPPLY = 4
"""Tokens that blocks are drawn from, for each that is used."""
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

_KEYS = ("sources", "blocks", "held_out", "block_tokens", "end_of_text")
_SOURCE_KEYS = ("path", "name", "prompt", "field", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of text, or of JSON objects, one a line."""

    path: Path
    name: str
    fields: tuple[str, ...] = ("text",)
    """Of a JSON object; their texts are joined without anything between. Ignored for plain text."""
    prompt: tuple[str, ...] = ()
    """The same, for text that stands before them and whose tokens do not count."""
    weight: float = 1.0

    @property
    def is_json(self) -> bool:
        return self.path.suffix in JSON_SUFFIXES


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Which text, and how much of it."""

    sources: tuple[Source, ...]
    blocks: int = 32
    held_out: int = 16
    block_tokens: int = 512
    end_of_text: bool = True
    """Whether the tokenizer's end-of-text token, where it has one, follows each document."""


class Blocks(NamedTuple):
    """Blocks of tokens, N of length L, with their share in the loss."""

    tokens_NL: NDArray[np.int32]
    counted_NL: NDArray[np.bool_]
    """Whether a token's loss counts; never that of a block's first, which nothing predicts."""
    source_N: NDArray[np.int32]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    """Of the sources; their sum is 1."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """What each block's mean loss counts in the whole: a source's weight, divided by tokens that count."""
        counts_N = self.counted_NL.sum(axis=1)
        counts_S = np.bincount(self.source_N, counts_N, minlength=len(self.names))
        shares: NDArray[np.float64] = np.array(self.weights)[self.source_N] * counts_N / counts_S[self.source_N]
        return shares

    @property
    def digest(self) -> str:
        """sha256 of tokens, sources and weights."""
        found = hashlib.sha256(json.dumps([self.names, self.weights, self.tokens_NL.shape]).encode())
        found.update(np.ascontiguousarray(self.tokens_NL, "<i4").tobytes())
        found.update(np.packbits(self.counted_NL).tobytes())
        found.update(np.ascontiguousarray(self.source_N, "<i4").tobytes())
        return found.hexdigest()


class _Cut(NamedTuple):
    """Blocks of one source."""

    tokens_NL: NDArray[np.int32]
    counted_NL: NDArray[np.bool_]


class Document(NamedTuple):
    """A text, and what stands before it and does not count."""

    prompt: str
    text: str


def parse_calibration(section: Section, folder: Path) -> Calibration:
    """Read the `calibration:` mapping; paths are relative to `folder`."""
    section.allow(_KEYS)
    default = Calibration(sources=())
    sources = tuple(_parse_source(each, folder) for each in section.sections("sources"))
    if not sources:
        section.refuse("no sources: list at least one file as {path: FILE}", "sources")
    names = [source.name for source in sources]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        section.refuse(f"two sources have the name {twice[0]!r}; give each a `name` of its own", "sources")
    if not sum(source.weight for source in sources) > 0:
        section.refuse("the weights are all 0", "sources")
    return Calibration(
        sources=sources,
        blocks=section.integer("blocks", default.blocks, low=1),
        held_out=section.integer("held_out", default.held_out, low=1),
        block_tokens=section.integer("block_tokens", default.block_tokens, low=2, high=1 << 20),
        end_of_text=section.flag("end_of_text", default.end_of_text),
    )


def _parse_source(section: Section, folder: Path) -> Source:
    section.allow(_SOURCE_KEYS)
    path = folder / section.text("path")
    for key in ("field", "prompt"):
        if section.has(key) and path.suffix not in JSON_SUFFIXES:
            section.refuse(f"`{key}` goes with {', '.join(JSON_SUFFIXES)}; {path.name} is read as plain text", key)
    return Source(
        path=path,
        name=section.text("name", path.stem),
        fields=section.texts("field") if section.has("field") else ("text",),
        prompt=section.texts("prompt") if section.has("prompt") else (),
        weight=section.number("weight", 1.0, low=0),
    )


def make_blocks(calibration: Calibration, tokenizer: Any, *, seed: int) -> tuple[Blocks, Blocks]:
    """Tokenise and cut: the blocks for the gradient, and the held-out ones.

    Args:
        tokenizer: transformers' tokenizer of the base.
        seed: draws the order of documents and which blocks are used.

    Raises:
        EvaluationError: a file cannot be read, lacks the field, or has too little text.
    """
    kept: list[_Cut] = []
    held: list[_Cut] = []
    num_wanted = calibration.blocks + calibration.held_out
    for number, source in enumerate(calibration.sources):
        rng = np.random.default_rng([seed, number])
        tokens, counted = _token_stream(source, tokenizer, rng, calibration)
        num_found = len(tokens) // calibration.block_tokens
        if num_found < num_wanted:
            raise EvaluationError(
                f"{source.path}: {len(tokens):,} tokens make {num_found} blocks of {calibration.block_tokens}; "
                f"{calibration.blocks} blocks and {calibration.held_out} held out were asked for. Give more text, "
                "fewer blocks or a smaller block_tokens"
            )
        size = num_found * calibration.block_tokens
        tokens_NL, counted_NL = tokens[:size].reshape(num_found, -1), counted[:size].reshape(num_found, -1)
        counted_NL[:, 0] = False
        order = rng.permutation(num_found)[:num_wanted]
        for cuts, chosen in ((kept, order[: calibration.blocks]), (held, order[calibration.blocks :])):
            if not counted_NL[chosen].any():
                raise EvaluationError(f"{source.path}: no token of the blocks counts; are all of them prompts?")
            cuts.append(_Cut(tokens_NL[chosen], counted_NL[chosen]))
    total = sum(source.weight for source in calibration.sources)
    names = tuple(source.name for source in calibration.sources)
    weights = tuple(source.weight / total for source in calibration.sources)

    def joined(cuts: Sequence[_Cut]) -> Blocks:
        source_N = np.repeat(np.arange(len(cuts), dtype=np.int32), [len(cut.tokens_NL) for cut in cuts])
        tokens_NL, counted_NL = (np.concatenate(parts) for parts in zip(*cuts, strict=True))
        return Blocks(tokens_NL, counted_NL, source_N, names, weights)

    return joined(kept), joined(held)


def _token_stream(
    source: Source, tokenizer: Any, rng: np.random.Generator, calibration: Calibration
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens of a source's documents in a drawn order, and which of them count; a few times what is wanted at most."""
    documents = list(read_documents(source))
    has_end = calibration.end_of_text and tokenizer.eos_token_id is not None
    wanted = (calibration.blocks + calibration.held_out) * calibration.block_tokens
    tokens: list[int] = []
    counted: list[bool] = []
    for place in rng.permutation(len(documents)):
        document = documents[place]
        prompt, text = (tokenizer.encode(part, add_special_tokens=False) if part else [] for part in document)
        tokens += prompt + text
        if has_end:
            tokens.append(int(tokenizer.eos_token_id))
        counted += [False] * len(prompt) + [True] * (len(text) + has_end)
        if len(tokens) >= OVERSUPPLY * wanted:
            break
    return np.array(tokens, np.int32), np.array(counted, np.bool_)


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source: a JSON object's fields each, or the whole of a plain text.

    Raises:
        EvaluationError: the file cannot be read, is no UTF-8 or no JSON, or an object lacks a field.
    """
    try:
        with source.path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as problem:
        raise EvaluationError(f"{source.path}: cannot be read: {problem.strerror}") from problem
    if len(data) > MAX_TEXT_BYTES:
        data = data[: data.rfind(b"\n", 0, MAX_TEXT_BYTES) + 1] or data[:MAX_TEXT_BYTES]
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise EvaluationError(
            f"{source.path}: is no UTF-8 text ({problem.reason} at byte {problem.start}); save it as UTF-8"
        ) from problem
    if not source.is_json:
        yield Document("", text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _document(source, number, line)


def _document(source: Source, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as problem:
        raise EvaluationError(f"{source.path}: line {number} is no JSON: {problem}; write one object a line") from None
    if not isinstance(record, dict):
        raise EvaluationError(f"{source.path}: line {number} is no JSON object; write one object a line")
    for field in (*source.prompt, *source.fields):
        if not isinstance(record.get(field), str):
            found = "lacks" if field not in record else "has no text under"
            raise EvaluationError(
                f"{source.path}: line {number} {found} the field {field!r}; {suggestion(field, sorted(record))}"
            )
    prompt, text = ("".join(record[field] for field in fields) for fields in (source.prompt, source.fields))
    return Document(prompt, text)
