"""The built-in text and the demo model trained on it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptqcli
from ptqcli.calibration import builtin
from ptqcli.calibration.builtin import C_MODULES, Document, documents, part_of, read_corpus
from ptqcli.errors import PTQError

DEMO = Path(ptqcli.__file__).parent / "demo"
HELD_OUT_TOKENS = 4096


def test_both_parts_have_text_and_about_the_promised_share() -> None:
    calibration, evaluation = (sum(map(len, documents(part))) for part in ("calibration", "evaluation"))
    assert calibration > 5_000_000
    assert 0.02 < evaluation / (calibration + evaluation) < 0.12


def test_no_text_stands_in_both_parts() -> None:
    assert not set(documents("calibration")) & set(documents("evaluation"))


def test_every_file_of_a_module_stands_in_one_part() -> None:
    """Seen from the texts, not from the rule."""
    owner = dict.fromkeys(documents("evaluation"), "evaluation") | dict.fromkeys(documents("calibration"), "calibration")
    for package in ("asyncio", "concurrent", "email", "importlib", "json", "urllib"):
        parts = {owner[one.text] for one in read_corpus() if one.name.startswith(f"{package}/")}
        assert len(parts) == 1


def test_a_module_and_its_twin_share_a_part() -> None:
    assert len({one.module for one in read_corpus() if one.name in ("decimal.py", "_pydecimal.py")}) == 1
    assert len({one.module for one in read_corpus() if one.name in ("weakref.py", "docstrings _weakref")}) == 1


def test_the_split_depends_on_names_alone() -> None:
    """Pinned: a change of the rule would let text that the demo model has seen into the evaluation part."""
    held_out = {"glob", "pathlib", "queue", "secrets", "shutil", "tempfile", "threading", "topic typesseq", "traceback", "weakref"}
    trained_on = {"asyncio", "builtins", "decimal", "json", "os", "random", "topic with", "turtle", "typing"}
    assert {part_of(name) for name in held_out} == {"evaluation"}
    assert {part_of(name) for name in trained_on} == {"calibration"}


def test_order_is_the_same_each_time_and_mixes_the_sources() -> None:
    first = read_corpus()
    read_corpus.cache_clear()
    assert read_corpus() == first
    kinds = Counter(one.name.split()[0] for one in first[:100])
    assert {"topic", "docstrings"} <= set(kinds)


def test_names_are_unique() -> None:
    assert max(Counter(one.name for one in read_corpus()).values()) == 1


def test_excluded_folders_are_absent() -> None:
    for one in read_corpus():
        assert builtin.EXCLUDED.isdisjoint(one.name.split("/")), one.name


def test_c_docstrings_are_there_and_show_no_address() -> None:
    found = {one.name: one.text for one in read_corpus() if one.name.startswith("docstrings ")}
    assert set(found) == {f"docstrings {name}" for name in C_MODULES if name in sys.builtin_module_names}
    assert "dict.setdefault" in found["docstrings builtins"]
    assert not any(" at 0x" in text for text in found.values())


def test_a_python_without_library_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "read_corpus", lambda: (Document("json", "json/__init__.py", "import re\n"),))
    with pytest.raises(PTQError, match="--calib PATH"):
        documents("calibration")


def test_text_of_the_other_part_is_dropped_from_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    filler = "x" * builtin.SMALLEST_CORPUS
    corpus = [Document("json", "a", filler), Document("glob", "b", filler), Document("glob", "c", "own")]
    monkeypatch.setattr(builtin, "read_corpus", lambda: tuple(corpus))
    assert documents("evaluation") == ["own"]


def test_demo_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in DEMO.iterdir() if file.is_file()}
    needed = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed <= set(files)
    assert sum(files.values()) <= 12 * 1024 * 1024


def test_demo_tokenizer_gives_any_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "def größe(x):\n\treturn x ** 2  # 漢字 🙂\r\n"
    assert len(tokenizer) == 4096
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]


def test_demo_model_has_the_promised_shape() -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    assert not any(loading.values())
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.vocab_size, config.intermediate_size % 128) == (256, 4096, 0)
    assert config.num_hidden_layers >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_demo_model_has_learned_the_held_out_text() -> None:
    """Against a unigram model fitted on the very tokens that it is measured on, so with every advantage."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokens = tokenizer("\n\n".join(documents("evaluation"))[: 6 * HELD_OUT_TOKENS], return_tensors="pt").input_ids[0]
    windows = tokens[: min(len(tokens), HELD_OUT_TOKENS) // 256 * 256].view(-1, 256)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    counts = torch.bincount(windows.flatten(), minlength=4096).double()
    share = counts[counts > 0] / counts.sum()
    unigram = -(share * share.log()).sum().item()
    assert math.exp(loss) < 0.15 * math.exp(unigram)


def test_model_card_says_what_was_measured() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for word in ("held-out perplexity", "tokens", "steps", "Apache-2.0", "scripts/train_demo_model.py"):
        assert word in card
