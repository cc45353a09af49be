"""A tiny checkpoint and a small local suite, both made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

CHOICES = ["alpha", "beta", "gamma"]

SUITE = """\
name: tiny
tasks_dir: tasks
batch_size: 4
num_fewshot: 0
tasks:
  - {ability: words, metric: acc, weight: 1.0, search: words_search, selection: words_selection, report: words_report}
  - {ability: prose, metric: bits_per_byte, weight: 0.5, search: prose_search, selection: prose_selection,
     report: prose_report}
"""


def make_checkpoint(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A Llama of two layers with random weights and one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: place + 2 for place, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape: dict[str, object] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    # Large initial weights, so that two seeds prefer different choices.
    model = LlamaForCausalLM(LlamaConfig(**shape | {"initializer_range": 0.3} | changes))
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_tasks(folder: Path, role: str, first: int, count: int = 12) -> None:
    """A multiple choice and a rolling task, as YAML with the data beside it; `first` numbers their items."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(first)
    places = range(first, first + count)
    words = [{"question": f"item {place}:", "answer": rng.randrange(3)} for place in places]
    prose = [
        {"text": " ".join(rng.choices(["river", "stone", "light", "über"], k=6)) + f" {place}"} for place in places
    ]
    for name, items in (("words", words), ("prose", prose)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}_{role}.jsonl").write_text(lines)
    (folder / f"words_{role}.yaml").write_text(
        f"task: words_{role}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: words_{role}.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        f"doc_to_choice: {json.dumps(CHOICES)}\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1.0}\n"
    )
    (folder / f"prose_{role}.yaml").write_text(
        f"task: prose_{role}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: prose_{role}.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - {metric: bits_per_byte, higher_is_better: false}\n"
        "  - {metric: byte_perplexity, higher_is_better: false}\nmetadata: {version: 1.0}\n"
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints with different weights, and one whose weights hold a NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("checkpoints")
    made = {name: make_checkpoint(folder / name, seed) for seed, name in enumerate(("first", "second", "broken"))}
    file = made["broken"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture(scope="session")
def make_suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a suite: each role has its own items unless `selection_first` makes two of them meet."""

    def make(text: str = SUITE, selection_first: int = 100) -> Path:
        folder = tmp_path_factory.mktemp("suite")
        for role, first in (("search", 0), ("selection", selection_first), ("report", 200)):
            write_tasks(folder / "tasks", role, first)
        (folder / "suite.yaml").write_text(text)
        return folder / "suite.yaml"

    return make


@pytest.fixture(scope="session")
def suite_path(make_suite: Callable[..., Path]) -> Path:
    return make_suite()
