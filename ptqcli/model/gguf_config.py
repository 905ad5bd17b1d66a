"""The configuration of a model as transformers has it and as a GGUF file has it, both ways.

A file names sizes and a few constants under ``ARCHITECTURE.key``; what it does not name is fixed in llama.cpp's code, and so it is checked
here that transformers' configuration says the same. Whatever one of the two sides cannot say is an error that names it.

transformers can read these keys itself. It then knows nothing of rotary embeddings that were stretched (``rope_freqs.weight`` of
Llama 3.1, ``rope.scaling.*``), takes Qwen3's heads to have 128 elements whatever they have, and reads no file of Gemma 1; each of
these gives a model that computes something else, so the configuration is made here.

Llama 3.1 divides the rotary frequency f of wavelength l = 2 pi / f by ``factor`` where l > c / low, leaves it where l < c / high, and goes
from one to the other in between, with c the context length before stretching. A file holds the divisors, one a frequency.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import values_of
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.errors import PTQError
from ptqcli.model.gguf_architectures import Architecture, architecture_named, architecture_of
from ptqcli.untrusted import foreign, shown

# Of a file -> of transformers.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all models of that kind
WINDOW_THETA = 10_000.0  # of Gemma 3's layers with a window, fixed in llama.cpp
WIDE_HEADS = {"gemma2": 46, "gemma3": 62}  # the models of 27B, by their layers, scale queries by hidden size / heads
MOST_LAYERS = 10_000


# From a file


def read_config(file: GGUFFile) -> Any:
    """The transformers configuration of a file; ``quantization_config`` tells that its tensors are quantized, where any is.

    Raises PTQError, naming the key, for a file of another architecture, without the sizes that every model has, or with something that
    transformers' models of that architecture do not compute.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if file.metadata.get("split.count", 1) not in (0, 1):
        raise PTQError(f"{file.path}: is one of several parts of a model; join them with llama.cpp's llama-gguf-split --merge")
    architecture = architecture_named(file.text("general.architecture"), str(file.path))
    values = _values(file, architecture)
    with foreign(f"{file.path}: transformers cannot make a configuration of its keys"):
        config = AutoConfig.for_model(architecture.model_types[0], **values)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.name_or_path, config.dtype = str(file.path), torch.float32
    if any(tensor.kind.quantized for tensor in file.stored.values()):
        config.quantization_config = {"quant_method": "gguf"}
    return config


def _values(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    prefix = architecture.name
    values: dict[str, Any] = {
        ours: file.number(f"{prefix}.{theirs}", int) for theirs, ours in SIZES.items() if theirs != "attention.head_count_kv"
    }
    layers = values["num_hidden_layers"]
    if layers > min(MOST_LAYERS, len(file.stored)):
        raise PTQError(f"{file.path}: {prefix}.block_count is {layers}, more layers than its {len(file.stored)} tensors can fill")
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = file.number(f"{prefix}.attention.head_count_kv", int, heads)
    head_dim = values["hidden_size"] // heads
    if f"{prefix}.attention.key_length" in file.metadata:
        head_dim = file.number(f"{prefix}.attention.key_length", int)
    if file.metadata.get(f"{prefix}.attention.value_length", head_dim) != head_dim:
        raise PTQError(f"{file.path}: {prefix}.attention.value_length differs from key_length, which is not supported")
    if file.metadata.get(f"{prefix}.rope.dimension_count", head_dim) != head_dim:
        raise PTQError(f"{file.path}: {prefix}.rope.dimension_count is not the size of a head; partial rotation is not supported")
    values |= {
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(file.number(f"{prefix}.attention.layer_norm_rms_epsilon", float)),
        "vocab_size": _embedding(file).shape[0],
        "tie_word_embeddings": "output.weight" not in file.stored,
        "rope_parameters": _rope(file, architecture, head_dim),
        **{ours: _token(file, f"tokenizer.ggml.{theirs}") for theirs, ours in SPECIAL.items()},
    }
    return values | _particular(file, architecture, layers, head_dim, values)


def _particular(file: GGUFFile, architecture: Architecture, layers: int, head_dim: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What only some architectures have."""
    biased = {"attention_bias": "blk.0.attn_q.bias" in file.stored, "mlp_bias": "blk.0.ffn_up.bias" in file.stored}
    if architecture.name == "llama":
        return biased
    if not architecture.window_every:
        return {}
    wide = layers == WIDE_HEADS[architecture.name]
    found = {
        "query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"] if wide else head_dim,
        "sliding_window": file.number(f"{architecture.name}.attention.sliding_window", int),
        "layer_types": layer_types(architecture, layers),
    }
    for theirs, ours in SOFTCAPS.items():
        key = f"{architecture.name}.{theirs}"
        found[ours] = _shortest(file.number(key, float)) if key in file.metadata else None
    return found


def layer_types(architecture: Architecture, layers: int) -> list[str]:
    """What each layer looks at, as transformers calls it."""
    every = architecture.window_every
    return ["sliding_attention" if every and (index + 1) % every else "full_attention" for index in range(layers)]


def _embedding(file: GGUFFile) -> Any:
    if "token_embd.weight" not in file.stored or len(file.stored["token_embd.weight"].shape) != 2:
        raise PTQError(f"{file.path}: holds no tensor token_embd.weight; it is no whole language model")
    return file.stored["token_embd.weight"]


def _token(file: GGUFFile, key: str) -> int | None:
    value = file.metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise PTQError(f"{file.path}: {key} is {shown(value)}, not a token; the file is damaged")
    return value


def _rope(file: GGUFFile, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    prefix = f"{architecture.name}.rope"
    theta = _shortest(file.number(f"{prefix}.freq_base", float, 10_000.0))
    scaling = file.metadata.get(f"{prefix}.scaling.type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FREQS in file.stored:
        found = _llama3(file, theta, head_dim)
    elif scaling == "linear":
        found = {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(file.number(f"{prefix}.scaling.factor", float))}
    elif scaling != "none":
        raise PTQError(f"{file.path}: {prefix}.scaling.type is {shown(scaling)}, which is not read; what is read: none, linear")
    if architecture.name != "gemma3":
        return found
    window = {"rope_type": "default", "rope_theta": _shortest(file.number(f"{prefix}.freq_base_swa", float, WINDOW_THETA))}
    return {"full_attention": found, "sliding_attention": window}


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Rotation as ``rope_freqs.weight`` says. Raises PTQError if that is not of the kind of Llama 3.1."""
    tensor = file.stored[ROPE_FREQS]
    divisors = values_of(tensor.kind, file.read(ROPE_FREQS)).float().flatten() if tensor.kind.name == "F32" else torch.empty(0)
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": divisors.max().item() if len(divisors) else 0.0, **LLAMA3}
    if len(divisors) != head_dim // 2 or not torch.allclose(divisors, llama3_divisors(rope, head_dim), rtol=1e-4):
        raise PTQError(f"{file.path}: {ROPE_FREQS} stretches the rotation in a way that transformers' llama does not know")
    return rope


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What each rotary frequency is divided by, float32 [head_dim / 2], see the module."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # c / wavelength
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).float()


def _shortest(value: float) -> float:
    """The shortest number that float32 rounds to ``value``: a file has 9.99999974e-06 where 1e-05 was meant."""
    for digits in range(1, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


# To a file


def metadata_of(config: Any) -> dict[str, Any]:
    """The keys of a file for a transformers configuration: strings, ints and floats by their whole names.

    Raises PTQError, naming the key of config.json, for what no file can say.
    """
    architecture = architecture_of(config)
    _refuse_unsayable(config, architecture)
    head_dim, prefix = head_size(config), architecture.name
    values: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    values |= {
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        **_rope_keys(config, architecture),
    }
    if architecture.window_every:
        values["attention.sliding_window"] = config.sliding_window
        values |= {theirs: float(cap) for theirs, ours in SOFTCAPS.items() if (cap := getattr(config, ours, None)) is not None}
    return {"general.architecture": prefix, **{f"{prefix}.{key}": value for key, value in values.items()}}


def head_size(config: Any) -> int:
    """Elements of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def full_rope(config: Any) -> dict[str, Any]:
    """The rotation of layers that look at everything."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _rope_keys(config: Any, architecture: Architecture) -> dict[str, Any]:
    rope = full_rope(config)
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return keys


def _refuse_unsayable(config: Any, architecture: Architecture) -> None:
    where, rope = config.name_or_path or "the model in memory", full_rope(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    stretched = {"default", "linear", *(["llama3"] if architecture.name == "llama" else [])}
    wrong = {
        f"hidden_act {activation}": activation != architecture.activation,
        f"rope_type {rope['rope_type']}": rope["rope_type"] not in stretched,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "an untied output head": architecture.name in ("gemma", "gemma2") and not config.tie_word_embeddings,
        "attention_bias": bool(getattr(config, "attention_bias", False)) and architecture.name != "llama",
        "use_bidirectional_attention": bool(getattr(config, "use_bidirectional_attention", None)),
        "layer_types": _other_layers(config, architecture),
        **_gemma_refusals(config, architecture),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise PTQError(f"{where}: llama.cpp's {architecture.name} models have no {what}, so a GGUF file would compute something else")


def _other_layers(config: Any, architecture: Architecture) -> bool:
    layers = getattr(config, "layer_types", None)
    return layers is not None and list(layers) != layer_types(architecture, config.num_hidden_layers)


def _gemma_refusals(config: Any, architecture: Architecture) -> dict[str, bool]:
    if not architecture.window_every:
        return {}
    wide = config.num_hidden_layers == WIDE_HEADS[architecture.name]
    scalar = config.hidden_size // config.num_attention_heads if wide else head_size(config)
    window = config.rope_parameters.get("sliding_attention", full_rope(config))
    fixed = {"rope_theta": WINDOW_THETA, "rope_type": "default"} if architecture.name == "gemma3" else full_rope(config)
    return {
        f"query_pre_attn_scalar {config.query_pre_attn_scalar}": config.query_pre_attn_scalar != scalar,
        "attn_logit_softcapping": architecture.name == "gemma3" and config.attn_logit_softcapping is not None,
        "rotation like that of the layers with a window": {key: window[key] for key in fixed} != fixed,
    }


def notes_of(config: Any) -> list[str]:
    """What a user should know of a file of this configuration, one sentence each."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window is not None and window < config.max_position_embeddings:
        return [f"llama.cpp ignores the sliding window of {window} tokens; beyond that the two compute different things"]
    return []
