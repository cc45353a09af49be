"""Trains every checkpoint of the zoo from nothing: `python -m benchmarks.zoo.train [dense] [run] [experts]`.

All three groups, on one thread, take about 12 minutes. Retrained checkpoints are to be compared by their
scores, not byte by byte: the order of float additions differs between machines.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.zoo.corpus import ABILITIES, ALPHABET, write_training_text
from benchmarks.zoo.items import TEXT_ABILITIES, ZOO_DIR
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, _ = range(4)
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
SEQUENCE_LENGTH = 128
IGNORED = -100
TEXT_SEED = 11

Mixture = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: the rate rises over the first steps, then stays."""

    num_steps: int
    learning_rate: float
    batch_size: int = 16
    num_warmup_steps: int = 20

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.num_warmup_steps)


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
        self._texts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _load(self, ability: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the ability's token ids, its labels, and where its lines begin."""
        if ability not in self._texts:
            ids = torch.tensor([VOCABULARY[c] for c in write_training_text(ability, TEXT_SEED)], dtype=torch.long)
            is_break = ids == VOCABULARY["\n"]
            labels = ids.clone()
            if ability not in TEXT_ABILITIES:
                # Questions are random, there is nothing to learn from them: a line counts from its "=" to its end.
                places = torch.arange(len(ids))
                last_equal = torch.where(ids == VOCABULARY["="], places, -1).cummax(0).values
                last_break = torch.where(is_break, places, -1).roll(1)
                last_break[0] = -1
                last_break = last_break.cummax(0).values
                labels[last_equal <= last_break] = IGNORED
                labels[ids == VOCABULARY["="]] = IGNORED
            starts = is_break[:-SEQUENCE_LENGTH].nonzero().flatten() + 1
            self._texts[ability] = ids, labels, starts
        return self._texts[ability]

    def draw(self, mixture: Mixture, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and labels, both of shape (size, SEQUENCE_LENGTH).

        Half of the sequences begin at a line, and half of those with `<s>`, since eval items come in all three ways.
        """
        names = tuple(mixture)
        shares = torch.tensor([mixture[name] for name in names])
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for choice in torch.multinomial(shares, size, replacement=True, generator=self._generator).tolist():
            ids, labels, starts = self._load(names[choice])
            where, kind = torch.rand(2, generator=self._generator).tolist()
            start = int(where * (len(ids) - SEQUENCE_LENGTH)) if kind < 0.5 else int(starts[int(where * len(starts))])
            piece = slice(start, start + SEQUENCE_LENGTH)
            row, label = ids[piece].clone(), labels[piece].clone()
            if kind > 0.75:
                row, label = row.roll(1), label.roll(1)
                row[0], label[0] = BOS_ID, IGNORED
            rows.append((row, label))
        return torch.stack([row for row, _ in rows]), torch.stack([label for _, label in rows])


def _build_optimizers(model: PreTrainedModel) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, which halves the steps needed, AdamW for everything else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    experts = [p for _, p in named if p.ndim == 3]
    chosen = {id(p) for p in (*matrices, *experts)}
    others = [p for _, p in named if id(p) not in chosen]
    # Muon's steps are scaled to a fifth of the rate; the fused experts, which it cannot take, should move alike.
    groups = [{"params": others, "scale": 1.0}] + ([{"params": experts, "scale": 0.3}] if experts else [])
    return (
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.05),
    )


def train(
    model: PreTrainedModel,
    source: BatchSource,
    mixture: Mixture,
    schedule: Schedule,
    *,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Train in place; return the mean loss of the last tenth of the steps."""
    model.train()
    optimizers = _build_optimizers(model)
    losses: list[float] = []
    for step in range(schedule.num_steps):
        ids, labels = source.draw(mixture, schedule.batch_size)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step) * group.get("scale", 1.0)
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
    bits16 = type(model)(copy.deepcopy(model.config))
    bits16.load_state_dict(model.state_dict())
    bits16.to(torch.bfloat16)
    for name, buffer in bits16.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # kept in float32 by DeepSeek's own checkpoints
    bits16.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def load_checkpoint(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Read a checkpoint as the specialists start from it: the stored bfloat16 values, in float32."""
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return model


_SHARED_CONFIG = {
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": SEQUENCE_LENGTH,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def _llama_config(hidden: int, layers: int, intermediate: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        **_SHARED_CONFIG,
    )


def _deepseek_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        hidden_size=48,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        **_SHARED_CONFIG,
    )


# The learning rate never falls: like a checkpoint from the middle of a run, each of these still carries the noise of
# its last steps, which merging averages out.
BASE_SCHEDULE = Schedule(num_steps=1750, learning_rate=1.2e-2)
SPECIALIST_SCHEDULE = Schedule(num_steps=500, learning_rate=5e-3)
RUN_SCHEDULE = Schedule(num_steps=3400, learning_rate=1.2e-2)
EXPERTS_BASE_SCHEDULE = Schedule(num_steps=1500, learning_rate=1e-2)
EXPERTS_SCHEDULE = Schedule(num_steps=400, learning_rate=5e-3)
# The base stops while there is still much to learn in every ability; these shares make that the same moment for all.
BASE_MIXTURE: Mixture = {"prose": 1.0, "python": 1.0, "arithmetic": 1.5, "strings": 0.7}
SPECIALIST_SHARE = 0.95
RUN_SAVES_EVERY = 200
RUN_FIRST_SAVE = 400


def mix_for(*own: str, share: float = SPECIALIST_SHARE) -> Mixture:
    """Mostly the specialist's own abilities; what is left keeps the others in reach."""
    rest = (1 - share) / (len(ABILITIES) - len(own))
    return {name: share / len(own) if name in own else rest for name in ABILITIES}


def train_dense(zoo: Path) -> Iterator[tuple[str, float]]:
    """Train the base on all abilities, then one specialist per ability from it."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(_llama_config(64, 3, 176, 4))
    yield "base", train(model, BatchSource(1), BASE_MIXTURE, BASE_SCHEDULE)
    save_checkpoint(model, zoo / "base")
    for seed, ability in enumerate(ABILITIES, start=2):
        model = load_checkpoint(LlamaForCausalLM, zoo / "base")
        yield ability, train(model, BatchSource(seed), mix_for(ability), SPECIALIST_SCHEDULE)
        save_checkpoint(model, zoo / ability)


def train_run(zoo: Path) -> Iterator[tuple[str, float]]:
    """Train a smaller model once and keep 16 of its steps."""
    torch.manual_seed(10)
    model = LlamaForCausalLM(_llama_config(48, 3, 128, 3))

    def keep(step: int) -> None:
        done = step + 1
        if done >= RUN_FIRST_SAVE and done % RUN_SAVES_EVERY == 0:
            save_checkpoint(model, zoo / "run" / f"step-{done:04d}")

    yield "run", train(model, BatchSource(10), BASE_MIXTURE, RUN_SCHEDULE, after_step=keep)


def train_experts(zoo: Path) -> Iterator[tuple[str, float]]:
    """Train a base with routed and shared experts in DeepSeek-V3's layout, and two specialists from it."""
    torch.manual_seed(20)
    model = DeepseekV3ForCausalLM(_deepseek_config())
    yield "experts/base", train(model, BatchSource(20), BASE_MIXTURE, EXPERTS_BASE_SCHEDULE)
    save_checkpoint(model, zoo / "experts" / "base")
    for seed, (name, own) in enumerate(EXPERT_PARENTS.items(), start=21):
        model = load_checkpoint(DeepseekV3ForCausalLM, zoo / "experts" / "base")
        yield f"experts/{name}", train(model, BatchSource(seed), mix_for(*own), EXPERTS_SCHEDULE)
        save_checkpoint(model, zoo / "experts" / name)


EXPERT_PARENTS = {"text": ("prose", "python"), "symbols": ("arithmetic", "strings")}
GROUPS = {"dense": train_dense, "run": train_run, "experts": train_experts}


def main() -> None:
    """Train the named groups, all by default."""
    parser = argparse.ArgumentParser(description="Train the checkpoints of the zoo.")
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--output", type=Path, default=ZOO_DIR)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.groups) - set(GROUPS))
    if unknown:
        parser.error(f"no group called {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(arguments.threads)
    for group in arguments.groups:
        started = time.monotonic()
        for name, loss in GROUPS[group](arguments.output):
            seconds = round(time.monotonic() - started)
            print(json.dumps({"checkpoint": name, "loss": round(loss, 4), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
