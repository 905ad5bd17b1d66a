"""llama.cpp itself, from the package llama-cpp-python: it reads what is written here, and what it writes is what the fast tests say."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CASES, IDS, make_case, sentencepiece_tokenizer, trained_tokenizer
from loading import ROOT, TEXT, WINDOW, our_perplexity
from torch import Tensor

from ptqcli.api import quantize
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.formats.gguf_export import export_checkpoint, export_model
from ptqcli.formats.gguf_mix import MIXES, tensor_types
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.gguf import load_tokenizer
from ptqcli.model.gguf_pre_tokenizers import PRE_TOKENIZERS, PROBE, pre_tokenizer
from ptqcli.model.locate import demo_model
from ptqcli.model.source import ModelFolder
from ptqcli.runtime.models import load_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.loaders

HELD_OUT = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
SCHEMES = ("w4a16-g32", "w4a16-g64-asym", "w3a16-g32-asym", "w8a16-g32", "w4a16-row")


@contextmanager
def opened(path: Path, tokens: int = WINDOW, only_words: bool = False) -> Iterator[Any]:
    """A file in llama.cpp."""
    model = llama_cpp.Llama(str(path), n_ctx=tokens, n_batch=tokens, logits_all=True, n_threads=1, verbose=False, vocab_only=only_words)
    try:
        yield model
    finally:
        model.close()


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """float64 [tokens, vocabulary]."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy()).double()


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_computes_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp keeps keys and values in fp16, hence the tolerance."""
    model = make_case(tmp_path / "model", case, monkeypatch)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[0].double()
    export_model(ModelFolder(tmp_path / "model"), tmp_path / "model.gguf", "f32")
    with opened(tmp_path / "model.gguf", 64) as other:
        found = logits_of(other, IDS[0].tolist())
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert (found.roll(1, 0) - expected).abs().max() > 0.1 * expected.abs().max()


def perplexities(path: Path, most: int = 1_536) -> tuple[float, float, bool]:
    """llama.cpp's, this package's on the same windows, and whether both cut the text into the same tokens."""
    ids, model = load_tokenizer(GGUFFile(path))(HELD_OUT)["input_ids"], load_model(path)
    losses = torch.zeros(2, dtype=torch.float64)
    with opened(path) as other:
        theirs = other.tokenize(HELD_OUT.encode(), add_bos=True, special=False)
        windows = [ids[start : start + WINDOW] for start in range(0, min(len(ids), most) - WINDOW + 1, WINDOW)]
        for window in windows:
            with torch.no_grad():
                ours = model(input_ids=torch.tensor([window])).logits[0].double()
            for index, logits in enumerate((logits_of(other, window), ours)):
                losses[index] += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum")
    first, second = (losses / (len(windows) * (WINDOW - 1))).tolist()
    return math.exp(first), math.exp(second), ids == theirs


@pytest.mark.parametrize("mix", ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q4_k_m", "q4_0", "q3_k_m", "q2_k"])
def test_the_demo_model_is_as_good_in_llama_cpp(mix: str, tmp_path: Path) -> None:
    export_model(ModelFolder(demo_model()), tmp_path / "demo.gguf", mix)
    theirs, ours, same_tokens = perplexities(tmp_path / "demo.gguf")
    assert same_tokens
    assert abs(theirs / ours - 1) < 0.01


@pytest.mark.parametrize("mix", ["q5_k_m", "q4_k_m", "q4_1", "q4_0", "q3_k_m", "q2_k"])
def test_codes_with_error_feedback_are_as_good_in_llama_cpp(mix: str, tmp_path: Path) -> None:
    quantize(demo_model(), output=tmp_path / "out", format="gguf", gguf_type=mix, nsamples=16, seqlen=256)
    theirs, ours, same_tokens = perplexities(next((tmp_path / "out").glob("*.gguf")))
    assert same_tokens
    assert abs(theirs / ours - 1) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_as_good_in_llama_cpp(scheme: str, tmp_path: Path) -> None:
    quantize(demo_model(), output=tmp_path / "out", algo="rtn", scheme=scheme)
    export_checkpoint(open_checkpoint(tmp_path / "out"), tmp_path / "out.gguf")
    theirs, ours, same_tokens = perplexities(tmp_path / "out.gguf")
    assert same_tokens
    assert abs(theirs / ours - 1) < 0.01


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_cut_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained_tokenizer(pre_tokenizer(name), HELD_OUT)
    check_tokens(tokenizer, tmp_path, monkeypatch)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_cut_alike(prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokens(sentencepiece_tokenizer(HELD_OUT, prefix=prefix), tmp_path, monkeypatch)


def check_tokens(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_case(folder / "model", "llama", monkeypatch, vocab_size=len(tokenizer) + 2)
    tokenizer.save_pretrained(folder / "model")
    export_model(ModelFolder(folder / "model"), folder / "model.gguf", "f16")
    other_text = (ROOT / "README.md").read_text(encoding="utf-8")
    with opened(folder / "model.gguf", 64, only_words=True) as model:
        for text in (HELD_OUT, other_text, PROBE):
            ours = tokenizer(text)["input_ids"]
            assert model.tokenize(text.encode(), add_bos=True, special=True) == ours
            assert model.tokenize(text.encode(), add_bos=True, special=True) != tokenizer(text + "!")["input_ids"]


def quantized_by_llama(source: Path, target: Path, file_type: str) -> Path:
    """What llama.cpp's own quantizer makes of a file of plain numbers. file_type: its name for the mix."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, file_type), 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) == 0
    return target


FILE_TYPES = {name: f"LLAMA_FTYPE_{mix.file_type}" for name, mix in MIXES.items() if name not in ("f32", "f16", "bf16")}
SHAPES = {
    "untied": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "num_attention_heads": 8, "num_key_value_heads": 8},
    "tied": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "narrow": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_those_that_llama_cpp_chooses(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SHAPES[shape]
    make_case(tmp_path / "model", "llama", monkeypatch, head_dim=32, **sizes)
    export_model(ModelFolder(tmp_path / "model"), tmp_path / "model.gguf", "f32")
    shapes = {name: tensor.shape for name, tensor in GGUFFile(tmp_path / "model.gguf").stored.items()}
    for mix, file_type in FILE_TYPES.items():
        target = quantized_by_llama(tmp_path / "model.gguf", tmp_path / "quantized.gguf", file_type)
        chosen = {name: tensor.kind.name for name, tensor in GGUFFile(target).stored.items()}
        assert tensor_types(mix, shapes, sizes["num_attention_heads"] // sizes["num_key_value_heads"]) == chosen, mix


def exchange(path: Path, first: str, second: str) -> None:
    """Give each of two tensors of one shape and type the other's content."""
    content = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    kept = content[first].copy()
    content[first][:], content[second][:] = content[second], kept


@pytest.mark.parametrize("mix", ["q4_k_m", "q3_k_m", "q2_k", "q6_k", "q5_0", "q4_1"])
def test_what_its_quantizer_writes_is_as_good_here(mix: str, tmp_path: Path) -> None:
    """`ptq eval` and llama.cpp agree on a file of llama.cpp's. The twin: with two matrices exchanged, they do not."""
    export_model(ModelFolder(demo_model()), tmp_path / "f16.gguf", "f16")
    file = quantized_by_llama(tmp_path / "f16.gguf", tmp_path / "made.gguf", FILE_TYPES[mix])
    theirs = llama_perplexity(file)
    assert abs(our_perplexity(file) / theirs - 1) < 0.01
    exchange(file, "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight")
    assert abs(our_perplexity(file) / theirs - 1) > 0.01


def llama_perplexity(path: Path) -> float:
    """llama.cpp's, over windows of TEXT that follow each other, in its own tokens."""
    with opened(path) as model:
        ids = torch.tensor(model.tokenize(TEXT.encode(), add_bos=False, special=False))
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        losses = [torch.nn.functional.cross_entropy(logits_of(model, window.tolist())[:-1], window[1:]) for window in windows]
    return math.exp(float(torch.stack(losses).mean()))
