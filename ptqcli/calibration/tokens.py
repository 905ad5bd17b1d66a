"""Texts to tokens, by a tokenizer that may be broken: patterns in its file are programs that can fail, and do so only on some texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptqcli.untrusted import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokens(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **how: Any) -> Any:
    """What ``tokenizer`` makes of a text or several. how: its options. Raises PTQError where it fails on them."""
    with foreign(f"{tokenizer.name_or_path or 'the model in memory'}: the tokenizer fails on the text", "; mend its tokenizer.json"):
        return tokenizer(text, **how)
