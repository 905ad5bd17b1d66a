"""Tiny random mixtures of experts, made from transformers' own configuration classes."""

from __future__ import annotations

from tiny import ROTARY

EXPERTS = 4
_HEADS = {**ROTARY, "num_key_value_heads": 4}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_DEEPSEEK = {
    **_HEADS,
    **_LATENT,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_CHOSEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}

# name: (configuration class, its arguments)
MIXTURES = {
    "mixtral": ("MixtralConfig", {**ROTARY, **_LOCAL}),
    "qwen2_moe": ("Qwen2MoeConfig", {**ROTARY, **_CHOSEN, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", {**ROTARY, **_CHOSEN, "head_dim": 16}),
    "gpt_oss": ("GptOssConfig", {**ROTARY, **_LOCAL, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "olmoe": ("OlmoeConfig", {**ROTARY, **_CHOSEN, "intermediate_size": 64}),
    "granitemoe": ("GraniteMoeConfig", {**ROTARY, **_LOCAL}),
    "glm4_moe": ("Glm4MoeConfig", {**ROTARY, **_CHOSEN, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "head_dim": 16}),
    "phimoe": ("PhimoeConfig", {**ROTARY, **_LOCAL}),
    "llama4": ("Llama4TextConfig", {**ROTARY, **_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 16}),
    "jamba": ("JambaConfig", {**ROTARY, "num_experts": EXPERTS, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}),
    "jetmoe": ("JetMoeConfig", {**_HEADS, **_LOCAL, "kv_channels": 16}),
}
