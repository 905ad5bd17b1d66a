"""The tokenizer that the metadata of a GGUF file describes, built with the tokenizers library.

    gpt2     byte-level BPE with the merges of the file, cutting a text as ``tokenizer.ggml.pre`` says
    llama    BPE over characters: two neighbours merge if that is a token, the one of the highest score first; bytes are the fallback

transformers has a reader of its own; up to which version it puts special tokens around a text, keeps added ones whole, and knows how a text
is cut differs, and it falls back to GPT-2's cuts without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.errors import PTQError
from ptqcli.model.gguf_pre_tokenizers import IGNORING_MERGES, SAME, pre_tokenizer
from ptqcli.untrusted import foreign, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ``tokenizer.ggml.token_type``
SPACE = "\u2581"
SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
BEGINNING = {*IGNORING_MERGES, *SAME["llama-bpe"][:4]}  # names with which llama.cpp puts the first token in front unasked
TAKING_WORDS = {*IGNORING_MERGES, *(name for name in SAME["llama-bpe"] if name not in ("dbrx", "smaug-bpe", "chatglm-bpe"))}


def build_tokenizer(file: GGUFFile) -> Any:
    """The tokenizer of ``file``. Raises PTQError, naming it, when there is none, it is damaged, or of a kind that is not known."""
    from transformers import PreTrainedTokenizerFast

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise PTQError(f"{file.path}: tokenizer.ggml.model is {shown(kind)}, which is not read; what is read: gpt2, llama")
    tokens, types = file.array("tokenizer.ggml.tokens", str), file.array("tokenizer.ggml.token_type", int)
    types = types or [NORMAL] * len(tokens)
    special = {name: _token(file, key, tokens) for name, key in SPECIAL.items() if key in file.metadata}
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise PTQError(f"{file.path}: tokenizer.ggml.tokens and token_type do not go together; the file is damaged")
    with foreign(f"{file.path}: no tokenizer can be made of its metadata"):
        backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, special.get("unk_token"))
        _add_special(backend, tokens, types)
        _surround(backend, file, kind, special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(file.path), **special)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _token(file: GGUFFile, key: str, tokens: Sequence[str]) -> str:
    number = file.metadata[key]
    if type(number) is not int or not 0 <= number < len(tokens):
        raise PTQError(f"{file.path}: {key} is {shown(number)}, not a token; the file is damaged")
    return tokens[number]


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    name = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    cuts = pre_tokenizer(name) if isinstance(name, str) else None
    if cuts is None:
        raise PTQError(f"{file.path}: tokenizer.ggml.pre is {shown(name)}, which is not known here; use the original model")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.array("tokenizer.ggml.merges", str)]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in TAKING_WORDS))
    backend.pre_tokenizer, backend.decoder = cuts, decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.array("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise PTQError(f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; the file is damaged")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, _merges(tokens, scores, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend, prefix = Tokenizer(model), file.metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    before = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return backend


def _merges(tokens: Sequence[str], scores: Sequence[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token when joined, that of the highest score first."""
    order = sorted(range(len(tokens)), key=lambda number: (-scores[number], number))
    words = (tokens[number] for number in order)
    splits = ((word[:cut], word[cut:]) for word in words for cut in range(1, len(word)))
    return [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]


def _add_special(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    marked = list(zip(tokens, types, strict=True))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in marked if kind in (CONTROL, UNKNOWN)]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == USER_DEFINED])


def _surround(backend: Any, file: GGUFFile, kind: str, special: dict[str, str]) -> None:
    """Put first and last token around every text, where the file or llama.cpp says so."""
    from tokenizers import processors

    usual = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in BEGINNING
    first = special.get("bos_token") if file.metadata.get("tokenizer.ggml.add_bos_token", usual) is True else None
    last = special.get("eos_token") if file.metadata.get("tokenizer.ggml.add_eos_token", False) is True else None
    around = [*([first] if first else []), "$A", *([last] if last else [])]
    named = {token: backend.token_to_id(token) for token in (first, last) if token}
    if named:
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=list(named.items()))
