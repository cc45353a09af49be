"""The loading check: silent on good checkpoints of every kind, one sentence for each fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remelt.errors import CheckpointError
from remelt_evals.loading_check import check_loading

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}

MIXTURES = [name for name in MODELS if name not in ("llama", "tied")]

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind, as `save_pretrained` writes it."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    for name, (config_class, changes) in MODELS.items():
        config = getattr(transformers, config_class)(**SHAPE | changes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


def changed(checkpoint: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with other tensors."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(change(load_file(checkpoint / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_checkpoint_loads_without_a_problem(name: str, saved: dict[str, Path]) -> None:
    result = check_loading(saved[name])
    assert result.problems == ()
    assert result.is_ok
    assert result.architecture.endswith("ForCausalLM")


def test_a_tied_head_may_be_stored_or_not(saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved["tied"] / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    stored = changed(
        saved["tied"], tmp_path / "c", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    assert check_loading(stored).is_ok


def test_declared_ignorable_keys_are_no_problem(saved: dict[str, Path], tmp_path: Path) -> None:
    import torch

    # What old checkpoints store and what DeepSeek-V3 declares for its next-token-prediction layer.
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert check_loading(changed(saved["llama"], tmp_path / "old", lambda tensors: tensors | old)).is_ok
    mtp = {"model.layers.61.eh_proj.weight": torch.zeros(2, 2)}
    assert check_loading(changed(saved["deepseek_v3"], tmp_path / "mtp", lambda tensors: tensors | mtp)).is_ok


def test_each_fault_of_a_dense_model_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    import torch

    name = "model.layers.1.mlp.up_proj.weight"
    missing = changed(saved["llama"], tmp_path / "a", lambda t: {key: t[key] for key in t if key != name})
    assert check_loading(missing).problems == (f"1 tensor is missing and would be left at random: {name}",)
    extra = changed(saved["llama"], tmp_path / "b", lambda t: t | {"model.bogus": torch.zeros(1)})
    assert check_loading(extra).problems == ("1 tensor is not expected by the model: model.bogus",)
    smaller = changed(saved["llama"], tmp_path / "c", lambda t: t | {name: t[name][:-1].clone()})
    assert check_loading(smaller).problems == (
        f"1 tensor is of another shape than the model's: {name} is 47x32, the model has 48x32",
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_a_missing_expert_is_found_behind_the_fused_tensor(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    # Layer 1 has experts in all of them; DeepSeek's layer 0 is dense.
    whole = changed(
        saved[name], tmp_path / "whole", lambda t: {k: t[k] for k in t if not (".1." in k and ".experts.2." in k)}
    )
    (problem,) = check_loading(whole).problems
    assert "of another shape than the model's" in problem
    assert "experts.down_proj is" in problem
    part = changed(
        saved[name],
        tmp_path / "part",
        lambda t: {k: t[k] for k in t if not ("layers.1." in k and (".experts.2.gate" in k or ".experts.2.w1" in k))},
    )
    (problem,) = check_loading(part).problems
    assert "cannot be put together" in problem
    assert "model.layers.1.mlp.experts.gate_up_proj" in problem
    layer = changed(
        saved[name], tmp_path / "layer", lambda t: {k: t[k] for k in t if not ("layers.1." in k and ".experts." in k)}
    )
    (problem,) = check_loading(layer).problems
    assert problem.startswith("2 tensors are missing")


def test_a_checkpoint_that_transformers_cannot_load_is_a_problem_and_prints_nothing(
    saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    extra = changed(saved["llama"], tmp_path / "a", lambda t: t | {"model.bogus": torch.zeros(1)})
    assert not check_loading(extra).is_ok
    assert capfd.readouterr() == ("", "")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    (problem,) = check_loading(strange).problems
    assert problem.startswith("transformers cannot load it")
    truncated = changed(saved["llama"], tmp_path / "truncated", lambda t: t)
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert check_loading(truncated).problems[0].startswith("transformers cannot load it")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        check_loading(tmp_path)
