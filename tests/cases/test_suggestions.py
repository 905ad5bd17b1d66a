"""An unknown word is answered with the known one that it was probably meant to be, or with nothing."""

from __future__ import annotations

import pytest

from ptqcli.suggest import did_you_mean


@pytest.mark.parametrize(
    "word, words, answer",
    [
        ("wikitxt2", ["builtin", "wikitext2", "c4"], "; did you mean 'wikitext2'?"),
        ("GPTQ", ["rtn", "gptq"], "; did you mean 'gptq'?"),
        ("llm-int8", ["LLM-Int8"], "; did you mean 'LLM-Int8'?"),
        ("pile of papers", ["builtin", "c4"], ""),
        ("", ["rtn"], ""),
        ("gtpq", [], ""),
        ("x" * 1_000_000, ["x" * 60, "rtn"], "; did you mean '" + "x" * 60 + "'?"),
    ],
)
def test_the_closest_word_is_named_and_nothing_far(word: str, words: list[str], answer: str) -> None:
    assert did_you_mean(word, words) == answer
