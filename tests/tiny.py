"""Tiny random models of many architectures, made from transformers' own configuration classes, with a byte tokenizer and text."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ptqcli.calibration.walk import CalibratedBlock

VOCABULARY = 257
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
POSITIONS = 128

ROTARY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
OLDER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}

TWO_KINDS = ["sliding_attention", "full_attention"]

# name: (configuration class, its arguments). Gemma 3 and Mistral get a window that the test text is longer than.
ARCHITECTURES = {
    "llama": ("LlamaConfig", ROTARY),
    "mistral": ("MistralConfig", {**ROTARY, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", ROTARY),
    "qwen3": ("Qwen3Config", {**ROTARY, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**ROTARY, "head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**ROTARY, "head_dim": 16, "sliding_window": 16, "layer_types": TWO_KINDS}),
    "phi3": ("Phi3Config", ROTARY),
    "opt": ("OPTConfig", {**OLDER, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    "gpt_neox": ("GPTNeoXConfig", {**OLDER, "intermediate_size": 128}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", OLDER),
    "stablelm": ("StableLmConfig", ROTARY),
    "olmo2": ("Olmo2Config", ROTARY),
}


def make_model(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """Save a random model of ``architecture`` with a tokenizer into ``folder`` and return it.

    The weights are drawn wider than transformers draws them, so that the logits depend on every layer.
    """
    kind, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**{**arguments, **TOKENS, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "emb" in name or "wte" in name else 1.5 / parameter.shape[1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{symbol: index for index, symbol in enumerate(alphabet)}, "<|end|>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def write_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """A text of common words in random order."""
    source = random.Random(seed)
    vocabulary = ["the", "of", "model", "weight", "scale", "zero", "group", "error", "row", "sum", "1", "2", ",", ".", "(", ")"]
    path.write_text(" ".join(source.choice(vocabulary) for _ in range(words)), encoding="utf-8")
    return path


def token_ids(count: int = 48, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random tokens, int64 [batch, count]."""
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


def in_memory(shape, dtype):
    """A buffer for ``record_calls``."""
    return torch.empty(shape, dtype=dtype)


def advance(skeleton, recording, index, block):
    """Replace the recorded hidden states by those behind block ``index``."""
    stages, calls, states = skeleton.shapes[index].stages, recording.calls[index], recording.hidden
    CalibratedBlock(block, stages, calls, recording.batches, states, states, torch.device("cpu"), 1 << 30).advance()
