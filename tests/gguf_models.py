"""Tiny models of every architecture that GGUF files are written for, with tokenizers that such a file can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WINDOWS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
GEMMA3 = {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "layer_types": WINDOWS}

# name: (architecture of ``tiny``, what differs)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16_384}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"vocab_size": 259}),
    "qwen3": ("qwen3", {}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "num_hidden_layers": 4, "layer_types": WINDOWS[4:6] * 2}),
    "gemma3": ("gemma3", GEMMA3),
    "gemma3-untied": ("gemma3", {**GEMMA3, "tie_word_embeddings": False}),
}
IDS = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(3))


def make_case(folder: Path, name: str, monkeypatch: Any, **changes: Any) -> PreTrainedModel:
    """Save the model ``name``, whose norms are no ones, into ``folder``, and return it."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "gemma", ("GemmaConfig", {**tiny.ROTARY, "head_dim": 16}))
    monkeypatch.setattr(tiny, "byte_tokenizer", merging_tokenizer)
    architecture, own = CASES[name]
    model = tiny.make_model(folder, architecture, **{"vocab_size": 258, **own, **changes})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    model.save_pretrained(folder)
    return model


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, one for the end of a text, and one merge, without which llama.cpp reads no such tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{symbol: index for index, symbol in enumerate(alphabet)}, "<|end|>": 256, "th": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def trained_tokenizer(cuts: Any, text: str, words: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that learned ``text``, cutting it by ``cuts``, which ends in bytes. It puts <s> in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cuts, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer(text: str, words: int = 600, prefix: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer over characters that falls back to bytes, as converted SentencePiece models have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=first, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer = Tokenizer.from_str(_only_control(tokenizer.to_str()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _only_control(text: str) -> str:
    """Bytes are tokens like all others; the trainer makes special ones of them. Every split of a token is a merge."""
    parts = json.loads(text)
    parts["added_tokens"] = [entry for entry in parts["added_tokens"] if entry["id"] < 3]
    vocabulary = parts["model"]["vocab"]
    ranks = {"".join(pair): place for place, pair in reversed(list(enumerate(parts["model"]["merges"])))}
    pairs = [
        (ranks[token], cut, [token[:cut], token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    parts["model"]["merges"] = [pair for _, _, pair in sorted(pairs)]
    return json.dumps(parts)
