"""A tiny configuration of any model type of transformers, without a table of types.

The configuration's own default is taken and every size that it names is set to a small one, by the meaning of the field's name (SIZES). A
field that the configuration computes from others is found by trying: it moves by itself when the main sizes are set, and is then left
alone. Lists with an entry a layer are cut to as many layers as show every kind of layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY, POSITIONS = 64, 128, 4, 2, 16, 320, 128
FEWEST_LAYERS, MOST_LAYERS = 2, 12

# What all other sizes hang on; they are set first.
MAIN = {
    r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim": WIDTH,
    r"num_attention_heads|n_heads?|num_heads": HEADS,
    r"num_key_value_heads|num_kv_heads|n_head_kv": KV_HEADS,
}
SIZES = {
    r".*head_dim|dim_head|d_head|d_kv|kv_channels|attention_head_size|mamba_d_head|mamba_headdim|rotary_dim": HEAD,
    r"(ffn|mlp|moe|ff|shared|dense|expert).*(size|dim|inner)(_mlp)?": INNER,
    r".*intermediate_size(_mlp)?|.*ffn_dim|n_inner|dff|d_ff|dim_ff|d_inner": INNER,
    r".*(hidden_size|hidden_size_global|hidden_dim|embed_dim|embedding_size|hidden_dimension|lru_width)": WIDTH,
    r".*(proj_dim|output_dim|input_dim|out_dim|codebook_dim|ngram_vocab_size_base)|out_hidden_size": WIDTH,
    r"hidden_size_per_layer_input|.*_rank|d_rel|.*state_size|.*d_state": HEAD,
    r".*vocab(_size)?(_per_layer_input)?": VOCABULARY,
    r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length)": POSITIONS,
    r".*(target_positions|source_positions)": POSITIONS,
    r".*(sliding_window|window_size|chunk_size|attention_window_len|local_attention|floor_scale|chunk_length)": 16,
    r".*attention_heads|linear_num_value_heads|linear_num_heads|mamba_n_heads|mamba_num_heads|num_query_groups": HEADS,
    r"index_n_heads": HEADS,
    r".*key_value_heads|linear_num_key_heads|mamba_n_groups|n_groups": KV_HEADS,
    r"(n_|num_|moe_num_|n_routed_|num_local_).*experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k|topk_group|n_group|num_expert_group|n_shared_experts": 2,
    r".*(num_layers|n_layers?|decoder_layers|encoder_layers|hidden_layers)": FEWEST_LAYERS,
    r".*(depth|num_blocks|num_global_layers|layers_per_stack)": FEWEST_LAYERS,
    r".*period|split_ngram_parts": 2,
    r".*offset|first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_end_index": 1,
    r"num_kv_shared_layers|num_nextn_predict_layers": 0,
    r"index_topk|index_topk_blocks": 8,
    r"base_channels|num_filters|image_size": 32,
}
KINDS = ("full_attention", "sliding_attention")
LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks")


# Relations between sizes that a default with other values shows, tried in this order until one gives a model that runs.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS, "num_experts_per_tok": 1, "num_experts_per_token": 1},  # every head has its keys; one expert a group
    {"num_key_value_heads": HEADS, "n_group": 1, "topk_group": 1, "num_expert_group": 1},  # one group of experts
    {"pad_token_id": 1},  # positions are counted from it
    {"num_key_value_heads": HEADS, "head_dim": HEAD},
)
# What no rule finds: relations that a model type checks by itself.
EXTRA: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in KINDS}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 300, "<image>": 301, **{f"<|visual token {n:06}|>": 260 + n for n in range(32)}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 2 * HEAD},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    "gemma3n_audio": {"vocab_offset": VOCABULARY + 128},
    "gemma3n_vision": {"architecture": "test_efficientnet", "vocab_offset": VOCABULARY},  # of the package timm, and not run on text
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 32},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
}


def tiny_configs(kind: type, **tokens: Any) -> Iterator[Any]:
    """Small configurations of class ``kind`` (transformers'), one for each of VARIANTS that it accepts.

    tokens: what they are to say of special tokens. Raises what ``kind`` raised last, if it accepts none.
    """
    last: Exception | None = None
    accepted = False
    for variant in VARIANTS:
        try:
            yield kind(**_sizes(kind, {**tokens, **variant}))
            accepted = True
        except Exception as error:  # noqa: BLE001  a configuration raises whatever it likes
            last = error
    if last is not None and not accepted:
        raise last


def _sizes(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for ``kind``. given: values for fields of these names, which count before any other."""
    default = kind()
    fields = default.to_dict()
    chosen: dict[str, Any] = {key: given[key] for key in given if key in fields}
    chosen |= EXTRA.get(fields.get("model_type", ""), {})
    layers = _cut_layers(fields, chosen)
    _set(chosen, fields, MAIN)
    moved = kind(**chosen).to_dict()
    _set(chosen, {key: moved[key] for key, value in fields.items() if key in moved and _stayed(value, moved[key])}, SIZES)
    for key, value in fields.items():
        if re.fullmatch(r".*token_(id|index)", key) and isinstance(value, int) and value >= VOCABULARY:
            chosen[key] = VOCABULARY - 1 - sum(name.endswith(("_token_id", "_token_index")) for name in chosen)
        if isinstance(value, list) and len(value) == layers and moved.get(key) == value and key not in chosen:
            chosen[key] = value[: _layer_count(chosen, layers)]
        nested = default.sub_configs.get(key) if isinstance(value, dict) else None
        if nested is not None:
            inner = getattr(default, key)
            chosen[key] = _sizes(type(inner), given if "text" in key or "decoder" in key else {})
    return chosen


def _stayed(before: Any, after: Any) -> bool:
    """Whether a field has not moved; of a list with an entry a layer the entries count, not how many there are."""
    lists = isinstance(before, list) and isinstance(after, list) and before and all(type(entry) is int for entry in before)
    return bool(before == after or (lists and set(after) == set(before)))


def _set(chosen: dict[str, Any], fields: dict[str, Any], sizes: dict[str, int]) -> None:
    for key, value in fields.items():
        size = next((size for pattern, size in sizes.items() if re.fullmatch(pattern, key)), None)
        if size is None or key in chosen:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            chosen[key] = size
        elif isinstance(value, list) and value and all(type(entry) is int and entry > size for entry in value):
            chosen[key] = [size] * len(value)


def _cut_layers(fields: dict[str, Any], chosen: dict[str, Any]) -> int | None:
    """Choose how many layers, so that each kind of them is there; return how many there were."""
    name = next((key for key, value in fields.items() if LAYERS.fullmatch(key) and isinstance(value, int)), None)
    if name is None or name in chosen:
        return None
    layers: int = fields[name]
    wanted = FEWEST_LAYERS
    for value in fields.values():
        if isinstance(value, (list, str)) and len(value) == layers and all(isinstance(entry, str) for entry in value):
            wanted = max(wanted, *(value.index(kind) + 1 for kind in set(value)))
    chosen[name] = min(wanted, MOST_LAYERS, layers)
    return layers


def _layer_count(chosen: dict[str, Any], layers: int | None) -> int | None:
    return next((value for key, value in chosen.items() if LAYERS.fullmatch(key)), layers)
