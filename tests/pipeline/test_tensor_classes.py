"""Classes of tensors, told from the names that each architecture stores."""

import pytest

from remelt.tensor_classes import TensorClass, classify, num_layers

NAMES = {
    # Llama, Qwen2/3, Mistral, Gemma
    "model.embed_tokens.weight": ("embedding", None, None),
    "lm_head.weight": ("head", None, None),
    "model.norm.weight": ("norm", None, None),
    "model.layers.31.self_attn.q_proj.weight": ("attention", 31, None),
    "model.layers.0.self_attn.q_proj.bias": ("attention", 0, None),
    "model.layers.7.self_attn.q_norm.weight": ("norm", 7, None),
    "model.layers.7.mlp.gate_proj.weight": ("mlp", 7, None),
    "model.layers.7.mlp.gate_up_proj.weight": ("mlp", 7, None),
    "model.layers.7.input_layernorm.weight": ("norm", 7, None),
    "model.layers.7.pre_feedforward_layernorm.weight": ("norm", 7, None),
    "language_model.model.layers.7.mlp.up_proj.weight": ("mlp", 7, None),
    "model.layers.2.linear_attn.in_proj_qkvz.weight": ("attention", 2, None),
    # Mistral's own layout
    "tok_embeddings.weight": ("embedding", None, None),
    "output.weight": ("head", None, None),
    "layers.3.attention.wq.weight": ("attention", 3, None),
    "layers.3.feed_forward.w1.weight": ("mlp", 3, None),
    "layers.3.ffn_norm.weight": ("norm", 3, None),
    # Mixtral
    "model.layers.4.block_sparse_moe.experts.5.w1.weight": ("routed_experts", 4, 5),
    "model.layers.4.block_sparse_moe.gate.weight": ("router", 4, None),
    # Qwen-MoE
    "model.layers.4.mlp.experts.59.down_proj.weight": ("routed_experts", 4, 59),
    "model.layers.4.mlp.experts.gate_up_proj": ("routed_experts", 4, None),
    "model.layers.4.mlp.gate.weight": ("router", 4, None),
    "model.layers.4.mlp.shared_expert.up_proj.weight": ("shared_experts", 4, None),
    "model.layers.4.mlp.shared_expert_gate.weight": ("shared_experts", 4, None),
    # DeepSeek-V2/V3
    "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": ("attention", 60, None),
    "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("attention", 60, None),
    "model.layers.60.self_attn.kv_a_layernorm.weight": ("norm", 60, None),
    "model.layers.60.mlp.experts.255.up_proj.weight": ("routed_experts", 60, 255),
    "model.layers.60.mlp.experts.255.up_proj.weight_scale_inv": ("routed_experts", 60, 255),
    "model.layers.60.mlp.shared_experts.up_proj.weight": ("shared_experts", 60, None),
    "model.layers.60.mlp.gate.weight": ("router", 60, None),
    "model.layers.60.mlp.gate.e_score_correction_bias": ("router", 60, None),
    "model.layers.61.eh_proj.weight": ("mtp", 61, None),
    "model.layers.61.shared_head.head.weight": ("mtp", 61, None),
    "mtp.layers.0.mlp.experts.3.up_proj.weight": ("mtp", None, 3),
    # gpt-oss
    "model.layers.9.mlp.experts.gate_up_proj_blocks": ("routed_experts", 9, None),
    "model.layers.9.mlp.experts.gate_up_proj_scales": ("routed_experts", 9, None),
    "model.layers.9.mlp.experts.down_proj_bias": ("routed_experts", 9, None),
    "model.layers.9.mlp.router.weight": ("router", 9, None),
    "model.layers.9.mlp.router.bias": ("router", 9, None),
    "model.layers.9.self_attn.sinks": ("attention", 9, None),
    # towers and unknown architectures
    "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight": ("vision", None, None),
    "model.visual.blocks.3.attn.qkv.weight": ("vision", None, None),
    "multi_modal_projector.linear_1.weight": ("vision", None, None),
    "h.11.attn.c_attn.weight": ("other", 11, None),
    "transformer.h.11.mlp.c_fc.weight": ("other", 11, None),
    "something.else": ("other", None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_class_layer_and_expert_follow_from_the_name(name: str) -> None:
    assert classify(name) == TensorClass(*NAMES[name])


def test_layers_behind_the_last_are_multi_token_prediction() -> None:
    assert classify("model.layers.61.mlp.experts.7.up_proj.weight", 61) == ("mtp", 61, 7)
    assert classify("model.layers.61.embed_tokens.weight", 61).kind == "mtp"
    assert classify("model.layers.60.mlp.experts.7.up_proj.weight", 61).kind == "routed_experts"


def test_layers_are_counted_without_those_of_prediction_and_vision() -> None:
    llama = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12))]
    assert num_layers(llama) == 12
    assert num_layers([*llama, "vision_tower.encoder.layers.26.mlp.fc1.weight", "mtp.layers.20.norm.weight"]) == 12
    deepseek = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(62)]
    assert num_layers([*deepseek, "model.layers.61.eh_proj.weight"]) == 61
    assert num_layers(["a.weight"]) == 0
