"""The keys of a GGUF file that hold a tokenizer, made of a fast tokenizer of transformers.

    gpt2     byte-level BPE: tokens in the byte alphabet, merges, and the name of how a text is cut (``model.gguf_pre_tokenizers``)
    llama    BPE over characters as SentencePiece makes it: a token's score stands for the place of its merge, and bytes are the fallback

Whatever llama.cpp would do otherwise is told, or, where every text would show it, refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptqcli.errors import PTQError
from ptqcli.model.gguf_pre_tokenizers import IGNORING_MERGES, MERGING, name_of
from ptqcli.model.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from ptqcli.untrusted import shown

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
}
UNREACHED = -1e6  # score of a token that no merge makes


@dataclass
class TokenizerKeys:
    """values: of the file. notes: what a user should know, one sentence each."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def tokenizer_keys(tokenizer: Any, rows: int) -> TokenizerKeys:
    """The keys for ``tokenizer``. rows: of the embedding; those beyond the tokens get names that no text has.

    Raises PTQError, saying what, for a tokenizer that llama.cpp has no counterpart of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PTQError(f"{tokenizer.name_or_path}: the tokenizer is none of the tokenizers library, which is all that a GGUF file can hold")
    parts = json.loads(backend.to_str())
    if parts["model"]["type"] != "BPE":
        raise PTQError(f"{tokenizer.name_or_path}: a tokenizer of type {parts['model']['type']} cannot be written to a GGUF file; BPE can")
    made = _byte_level(tokenizer, parts) if _is_byte_level(parts) else _sentencepiece(tokenizer, parts)
    tokens, types = _tokens(tokenizer, parts, rows)
    made.values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, **_special_keys(tokenizer)}
    if made.values["tokenizer.ggml.model"] == "llama":
        made.values["tokenizer.ggml.scores"] = _scores(tokens, parts["model"])
    template = _chat_template(tokenizer)
    return TokenizerKeys(made.values | ({} if template is None else {"tokenizer.chat_template": template}), made.notes)


def _is_byte_level(parts: Mapping[str, Any]) -> bool:
    cuts = parts["pre_tokenizer"] or {}
    return any(step["type"] == "ByteLevel" for step in cuts.get("pretokenizers", [cuts] if cuts else []))


def _byte_level(tokenizer: Any, parts: Mapping[str, Any]) -> TokenizerKeys:
    name, where = name_of(tokenizer.backend_tokenizer.pre_tokenizer), tokenizer.name_or_path
    if name is None:
        raise PTQError(f"{where}: the tokenizer cuts a text in a way that llama.cpp has no name for here, so its tokens would be others")
    model, notes = parts["model"], []
    if name in IGNORING_MERGES and not model.get("ignore_merges"):
        if name in MERGING:
            name = MERGING[name]
        else:
            notes.append(f"llama.cpp takes words of the vocabulary whole with '{name}', the tokenizer merges them: some tokens may differ")
    elif model.get("ignore_merges") and name not in IGNORING_MERGES:
        notes.append(f"the tokenizer takes words of its vocabulary whole, llama.cpp merges them with '{name}': some tokens may differ")
    kinds = _normalizers(parts)
    if kinds - {"NFC", "NFKC"}:
        raise PTQError(f"{where}: the tokenizer's normalizer {shown(sorted(kinds))} cannot be written to a GGUF file")
    if kinds:
        notes.append(f"llama.cpp does not normalize a text ({', '.join(sorted(kinds))}): characters in several parts may give other tokens")
    if not model["merges"]:
        raise PTQError(f"{where}: the tokenizer has no merges, and llama.cpp reads no byte-level tokenizer without them")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    return TokenizerKeys(values, notes)


def _normalizers(parts: Mapping[str, Any]) -> set[str]:
    found = parts["normalizer"]
    return set() if found is None else {step["type"] for step in found.get("normalizers", [found])}


def _sentencepiece(tokenizer: Any, parts: Mapping[str, Any]) -> TokenizerKeys:
    backend, where = tokenizer.backend_tokenizer, tokenizer.name_or_path
    if not parts["model"].get("byte_fallback"):
        raise PTQError(f"{where}: the tokenizer is neither byte-level nor falls back to bytes, so it cannot be written to a GGUF file")
    text = "a b"
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    pieces = (
        [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)] if backend.pre_tokenizer is not None else [normalized]
    )
    joined = "".join(pieces)
    if joined not in (f"{SPACE}a{SPACE}b", f"a{SPACE}b"):
        raise PTQError(f"{where}: the tokenizer makes {joined!r} of {text!r}, as no SentencePiece model does; it cannot be written")
    notes = (
        []
        if _merges_are_complete(parts["model"])
        else ["the tokenizer merges fewer pairs than its vocabulary allows, which is what llama.cpp goes by: some tokens may differ"]
    )
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": joined.startswith(SPACE),
    }
    return TokenizerKeys(values, notes)


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]


def _merges_are_complete(model: Mapping[str, Any]) -> bool:
    """Whether every pair of tokens that makes a token which some merge makes is a merge."""
    pairs, vocabulary = set(_pairs(model)), model["vocab"]
    made = {left + right for left, right in pairs}
    splits = ((token[:place], token[place:]) for token in made for place in range(1, len(token)))
    return all(split in pairs for split in splits if split[0] in vocabulary and split[1] in vocabulary)


def _scores(tokens: Sequence[str], model: Mapping[str, Any]) -> list[float]:
    """The earlier a token's first merge, the higher its score."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(_pairs(model)):
        places.setdefault(left + right, place)
    return [-float(places[token]) if token in places else UNREACHED for token in tokens]


def _tokens(tokenizer: Any, parts: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embedding."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    if vocabulary and max(vocabulary) >= rows:
        raise PTQError(f"{tokenizer.name_or_path}: the tokenizer has {max(vocabulary) + 1} tokens, but the embedding {rows} rows")
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    sentencepiece, unknown = not _is_byte_level(parts), tokenizer.unk_token_id
    tokens, types = [], []
    for number in range(rows):
        token, kind = vocabulary.get(number, f"[PAD{number}]"), NORMAL
        if number not in vocabulary:
            kind = UNUSED
        elif sentencepiece and number == unknown:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
            token = added[number]["content"]
        elif sentencepiece and BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _special_keys(tokenizer: Any) -> dict[str, Any]:
    """Special tokens, and which of them stand around every text, found by what the tokenizer does."""
    numbers = {ours: getattr(tokenizer, ours) for ours in SPECIAL}
    keys: dict[str, Any] = {f"tokenizer.ggml.{theirs}": numbers[ours] for ours, theirs in SPECIAL.items() if numbers[ours] is not None}
    bare, whole = (tokenizer("a", add_special_tokens=around)["input_ids"] for around in (False, True))
    before = whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else whole[:1]
    keys["tokenizer.ggml.add_bos_token"] = before[:1] == [numbers["bos_token_id"]]
    keys["tokenizer.ggml.add_eos_token"] = len(whole) > len(bare) and whole[-1] == numbers["eos_token_id"] != bare[-1]
    return keys


def _chat_template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
