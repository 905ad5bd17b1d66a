"""How byte-level tokenizers cut a text before they merge, under the names that GGUF files have for it (``tokenizer.ggml.pre``).

llama.cpp knows regular expressions for each name: a text is cut into their matches and what lies between, by one expression after the
other. Which name a tokenizer has is found by what its own pre-tokenizer does to a text in which they all differ, not by a list of models.
"""

from __future__ import annotations

from typing import Any

from ptqcli.untrusted import foreign

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
NO_LETTER = r"[^\r\n\p{L}\p{N}]?"


def _letters(digits: str, ending: str = r"[\r\n]*", letters: str = r"\p{L}", other: str = r"\p{L}\p{N}") -> str:
    """The expression that began with GPT-4: words with what stands before them, digits, signs, white space."""
    return rf"{ENDINGS}|{NO_LETTER}{letters}+|{digits}| ?[^\s{other}]+{ending}|{SPACES}"


def _cased(digits: str, endings: str) -> str:
    """The same with words cut where small letters meet capitals."""
    upper, lower = CASED
    return rf"{NO_LETTER}{upper}*{lower}+{endings}|{NO_LETTER}{upper}+{lower}*{endings}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


# The first of those that cut alike is what a tokenizer is called.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (WORDS,),
    "llama-bpe": (_letters(r"\p{N}{1,3}"),),
    "qwen2": (_letters(r"\p{N}"),),
    "smollm": (r"\p{N}", WORDS),
    "tekken": (_cased(r"\p{N}", ""),),
    "gpt-4o": (_cased(r"\p{N}{1,3}", rf"{ENDINGS}?"),),
    "qwen35": (_letters(r"\p{N}", letters=r"[\p{L}\p{M}]", other=r"\p{L}\p{M}\p{N}"),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", WORDS, "[0-9][0-9][0-9]"),
}
# Other names of the same.
SAME = {
    "gpt-2": ("mpt", "olmo", "jais", "phi-2", "gigachat", "granite-docling", "exaone4", "roberta-bpe"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe", "chatglm-bpe", "lfm2", "midm-2.0"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-4o": ("llama4", "kanana2"),
    "deepseek-v3": ("hunyuan-dense",),
}
# Those with which llama.cpp takes a word that is in the vocabulary as it is, without merging; and one that cuts alike and merges.
IGNORING_MERGES = ("llama-bpe", "tekken")
MERGING = {"llama-bpe": "dbrx"}

PROBE = (
    "It's I'M we'LL they're 'twas don't\nfooBar HTTPServer iPhone camelCaseXY ÀÉî ßtraße "
    "Привет мир こんにちは世界 ไทย 안녕 हिन्दी नमस्ते e\u0301a\u0300 "
    "1 12 123 1234 12345678 ٣٤٥٦ ½ x86 3.14 1,000,000 v2.0\r\n\r\n  two  spaces\t\ttabs \n \n  \n\n"
    "a/b//c /\n/ path/to\\file $x+=<y>^~|`z` @#%&*(){}[] !!\n?? --flag _under_score_ 'quoted' \"double\" «gänse» "
    "… — “smart” ’s ‘t 😀👍🏽 \u200d\u00a0nb"
    "\u3000ideographic end of line   \nlast word "
)


def pre_tokenizer(name: str) -> Any:
    """What cuts as ``name`` says, of the tokenizers library; None for a name that is not known."""
    from tokenizers import Regex, pre_tokenizers

    known = next((first for first in PRE_TOKENIZERS if name == first or name in SAME.get(first, ())), None)
    if known is None:
        return None
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in PRE_TOKENIZERS[known]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def name_of(cuts: Any) -> str | None:
    """The name for what the pre-tokenizer ``cuts`` does to a text, None for one that has no name here."""
    with foreign("the tokenizer cannot cut a text"):
        wanted = cuts.pre_tokenize_str(PROBE)
    return next((name for name in PRE_TOKENIZERS if pre_tokenizer(name).pre_tokenize_str(PROBE) == wanted), None)
