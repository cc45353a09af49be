"""Trains every checkpoint of the zoo from nothing: `python -m benchmarks.zoo.train [dense] [run] [experts]`.

All three groups, on one thread, take about a quarter of an hour. Retrained checkpoints are to be compared by their
scores, not byte by byte: the order of float additions differs between machines.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.zoo.corpus import ABILITIES, ALPHABET, write_training_text
from benchmarks.zoo.items import ZOO_DIR

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, _ = range(4)
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
SEQUENCE_LENGTH = 128
BATCH_SIZE = 32
TEXT_SEED = 11

Mixture = Mapping[str, float]
EVEN: Mixture = dict.fromkeys(ABILITIES, 1.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    num_steps: int
    learning_rate: float
    warmup: int = 50
    constant: bool = False
    """Keep the learning rate to the end, instead of letting it fall along a cosine to a twentieth."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / self.warmup)
        if self.constant:
            return rate
        return rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.num_steps)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: the printable ASCII characters and the line break."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


class BatchSource:
    """Draws training batches from the texts of the abilities, each with its share."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._texts: dict[str, torch.Tensor] = {}
        self._line_starts: dict[str, torch.Tensor] = {}

    def _load(self, ability: str) -> None:
        text = write_training_text(ability, TEXT_SEED)
        self._texts[ability] = torch.tensor([VOCABULARY[c] for c in text], dtype=torch.long)
        breaks = (self._texts[ability][:-SEQUENCE_LENGTH] == VOCABULARY["\n"]).nonzero().flatten()
        self._line_starts[ability] = breaks

    def draw(self, mixture: Mixture, size: int = BATCH_SIZE) -> torch.Tensor:
        """Return token ids of shape (size, SEQUENCE_LENGTH).

        Half of the sequences begin at a line, and half of those with `<s>`, since eval items come in all three ways.
        """
        names = tuple(mixture)
        shares = torch.tensor([mixture[name] for name in names])
        rows = []
        for choice in torch.multinomial(shares, size, replacement=True, generator=self._generator).tolist():
            ability = names[choice]
            if ability not in self._texts:
                self._load(ability)
            text, starts = self._texts[ability], self._line_starts[ability]
            where, kind = torch.rand(2, generator=self._generator).tolist()
            if kind < 0.5:
                start = int(where * (len(text) - SEQUENCE_LENGTH))
            else:
                start = int(starts[int(where * len(starts))]) + 1
            row = text[start : start + SEQUENCE_LENGTH]
            if kind > 0.75:
                row = torch.cat((torch.tensor([BOS_ID]), row[:-1]))
            rows.append(row)
        return torch.stack(rows)


def train(
    model: PreTrainedModel,
    source: BatchSource,
    mixture: Mixture,
    schedule: Schedule,
    *,
    batch_size: int = BATCH_SIZE,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Train in place with AdamW; return the mean loss of the last tenth of the steps."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    losses: list[float] = []
    for step in range(schedule.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        ids = source.draw(mixture, batch_size)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step)
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """Write weights in bfloat16, config, generation config and tokenizer."""
    bits16 = type(model)(model.config)
    bits16.load_state_dict(model.state_dict())
    bits16.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def load_checkpoint(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Read a checkpoint as the specialists start from it: the stored bfloat16 values, in float32."""
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return model


def _config(hidden: int, layers: int, intermediate: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=SEQUENCE_LENGTH,
        rope_theta=1000.0,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


BASE_SCHEDULE = Schedule(num_steps=2500, learning_rate=4e-3)
SPECIALIST_SCHEDULE = Schedule(num_steps=800, learning_rate=1.5e-3)
# What a specialist reads: mostly its own ability. The rest keeps it in reach of the others.
SPECIALIST_SHARE = 0.94


def train_dense(zoo: Path) -> Iterator[tuple[str, float]]:
    """Train the base on all abilities, then one specialist per ability from it."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(_config(64, 3, 176, 4))
    yield "base", train(model, BatchSource(1), EVEN, BASE_SCHEDULE)
    save_checkpoint(model, zoo / "base")
    for seed, ability in enumerate(ABILITIES, start=2):
        model = load_checkpoint(LlamaForCausalLM, zoo / "base")
        rest = (1 - SPECIALIST_SHARE) / (len(ABILITIES) - 1)
        mixture = {name: SPECIALIST_SHARE if name == ability else rest for name in ABILITIES}
        yield ability, train(model, BatchSource(seed), mixture, SPECIALIST_SCHEDULE)
        save_checkpoint(model, zoo / ability)


GROUPS = {"dense": train_dense}


def main() -> None:
    """Train the named groups, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], help="what to train; all by default")
    parser.add_argument("--output", type=Path, default=ZOO_DIR)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for group in arguments.groups or GROUPS:
        started = time.monotonic()
        for name, loss in GROUPS[group](arguments.output):
            print(json.dumps({"checkpoint": name, "loss": round(loss, 4), "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
