"""A quantized model whose parts are in several places gives the numbers of one that is whole."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import pytest
import torch
from commandline import Ptq
from tiny import make_model, token_ids, write_text

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.runtime import spread

FLAGS = {"algo": "rtn", "scheme": "w4a16-g32"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    make_model(folder / "model", num_hidden_layers=4)
    write_text(folder / "text.txt")
    ptqcli.quantize(folder / "model", output=folder / "small", **FLAGS)
    return folder / "small"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


BESIDE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_parts_on_the_disk_give_the_same_logits(checkpoint: Path, temporary: Path, kernel: str) -> None:
    whole = ptqcli.load_quantized(checkpoint, kernel=kernel, fuse=False)
    places = {**BESIDE, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.layers.3": "disk"}
    model = ptqcli.load_quantized(checkpoint, kernel=kernel, device_map=places)
    assert all(tensor.is_meta for tensor in [*model.model.layers[1].parameters(), *model.model.layers[1].buffers()])
    assert torch.equal(logits(model), logits(whole))
    assert all(tensor.is_meta for tensor in model.model.layers[3].buffers()), "what is on the disk leaves memory behind its turn"
    told = [each.generate(token_ids()[:1, :8], max_new_tokens=6, do_sample=False) for each in (model, whole)]
    assert torch.equal(*told)
    assert list(temporary.iterdir())
    del model
    gc.collect()
    assert not list(temporary.iterdir()), "the files go with the model"


def room_for(checkpoint: Path, blocks: float) -> int:
    """Bytes free, such that what is beside the blocks, one of them, and so many more fit."""
    sizes = spread._sizes(open_checkpoint(checkpoint))
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    beside = sum(size for name, size in sizes.items() if not name.startswith("model.layers."))
    return int((beside + (1 + blocks) * block) / spread.SHARE_OF_FREE) + 8


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_auto_fills_memory_and_leaves_the_rest_on_the_disk(
    checkpoint: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    whole = logits(ptqcli.load_quantized(checkpoint, fuse=False))
    free = room_for(checkpoint, blocks)
    monkeypatch.setattr(spread, "free_bytes", lambda device: free)
    model = ptqcli.load_quantized(checkpoint, device_map="auto", fuse=False)
    on_disk = [all(tensor.is_meta for tensor in layer.buffers()) for layer in model.model.layers]
    assert on_disk == [False] * blocks + [True] * (4 - blocks)
    assert torch.equal(logits(model), whole)


def test_a_model_that_fits_stays_whole(checkpoint: Path, temporary: Path) -> None:
    model = ptqcli.load_quantized(checkpoint, device_map="auto")
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not list(temporary.iterdir())


def test_a_machine_that_cannot_hold_one_block_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "free_bytes", lambda device: 1000)
    with pytest.raises(PTQError, match="what is beside its blocks, and one of them, take more than is free on cpu"):
        ptqcli.load_quantized(checkpoint, device_map="auto")


@pytest.mark.parametrize(
    "places, message",
    [
        ("balanced", "device_map 'balanced' is not valid; give 'auto', or a place for each module"),
        ({}, "is not valid"),
        ({**BESIDE, "model.layer": "cpu"}, r"names 'model.layer', which is no module of the model; did you mean 'model.layers'\?"),
        ({"model": "cpu"}, "device_map has no place for lm_head.weight; give one for the module that holds it"),
        ({"": "floppy"}, "device 'floppy' is unknown"),
        ({"": 7}, "device 'cuda:7' is not on this machine"),
    ],
)
def test_places_that_are_none_are_refused(checkpoint: Path, places: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ptqcli.load_quantized(checkpoint, device_map=places)  # type: ignore[arg-type]


def test_commands_run_what_memory_does_not_hold(ptq: Ptq, checkpoint: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(temporary / "short.txt", 300)
    measure = ("eval", checkpoint, "--ppl", temporary / "short.txt", "--seqlen", "64", "--no-baseline", "--json")
    whole = ptq(*measure)
    assert whole.code == 0, whole.err
    free = room_for(checkpoint, 1)
    monkeypatch.setattr(spread, "free_bytes", lambda device: free)
    answer = ptq(*measure)
    assert answer.code == 0, answer.err
    perplexity = [json.loads(each.out)["results"] for each in (whole, answer)]
    assert perplexity[0] == perplexity[1]
    spoken = ptq("generate", checkpoint, "the model", "--max-new-tokens", "4")
    assert spoken.code == 0, spoken.err
    gc.collect()
    assert not list(temporary.glob("ptqcli-temporary-*"))
