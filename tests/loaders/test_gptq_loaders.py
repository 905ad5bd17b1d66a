"""GPTQ files that ptq writes, loaded by GPTQModel and by transformers with it; and files of GPTQModel, loaded by ptq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel reads and writes the format")
pytest.importorskip("optimum", reason="transformers builds GPTQ layers through optimum")

import torch
from gptqmodel_loader import (
    CLOSE,
    CLOSE_IN_BFLOAT16,
    DEMO,
    by_gptqmodel,
    by_transformers,
    logits,
    made_by_gptqmodel,
    our_weights,
    ours,
    packed_modules,
    relative,
    share_of_negative_scales,
    without_signs,
)

import ptqcli

BACKEND = "gptq_torch"  # multiplies codes by scales in plain torch
MOVING = {"algo": "gptq", "static_groups": False, "calib": "builtin", "nsamples": 4, "seqlen": 128}
SKIPPED = {"overrides": [{"pattern": "layers.1.*down_proj", "skip": True}]}
MIXED = {"overrides": [{"pattern": r"\.0\.", "bits": 8}, {"pattern": r"\.2\..*(q|k|v)_proj", "skip": True}]}
WRITTEN: dict[str, dict[str, Any]] = {
    "4 bits": {"format": "gptq"},
    "4 bits, whole rows": {"format": "gptq", "group_size": -1},
    "8 bits, whole rows": {"format": "gptq", "wbits": 8, "group_size": -1},
    "2 bits, version 2": {"format": "gptq_v2", "wbits": 2},
    "3 bits with zero points": {"format": "gptq_v2", "wbits": 3, "symmetric": False},
    "act-order": {"format": "gptq", "group_size": 128, **MOVING},
    "something skipped": {"format": "gptq", **SKIPPED},
    "several schemes": {"format": "gptq", **MIXED},
}


def written(folder: Path, kind: str) -> Path:
    ptqcli.quantize(DEMO, output=folder / "out", **{"algo": "rtn", "wbits": 4, "group_size": 64, **WRITTEN[kind]})
    return folder / "out"


@pytest.mark.parametrize("kind", WRITTEN)
def test_gptqmodel_has_our_weights_and_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    model, weights = by_gptqmodel(folder, BACKEND), dict(our_weights(folder))
    found = packed_modules(model)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name].dequantize_weight().t(), weight), name
    assert relative(logits(model), ours(folder)) < CLOSE


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind not in ("several schemes", "4 bits, whole rows")])
def test_transformers_has_our_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    assert relative(logits(by_transformers(folder)), ours(folder)) < CLOSE_IN_BFLOAT16


def test_transformers_runs_no_whole_rows_of_4_bits_on_the_cpu(tmp_path: Path) -> None:
    model = by_transformers(written(tmp_path, "4 bits, whole rows"))
    with pytest.raises(RuntimeError, match="qGroupSize"):
        logits(model)


def test_transformers_refuses_several_schemes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        by_transformers(written(tmp_path, "several schemes"))


def test_negative_scales_are_kept(tmp_path: Path) -> None:
    """And the twin: without the signs, both have other logits."""
    folder = written(tmp_path, "4 bits")
    expected = ours(folder)
    assert 0.4 < share_of_negative_scales(folder) < 0.6
    assert relative(logits(by_gptqmodel(folder, BACKEND)), expected) < CLOSE
    without_signs(folder)
    assert relative(logits(by_gptqmodel(folder, BACKEND)), expected) > 0.5
    assert relative(logits(by_transformers(folder)), expected) > 0.5


MADE: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 4, "group_size": 32, "sym": True},
    "with zero points": {"bits": 4, "group_size": 32, "sym": False},
    "act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "3 bits, version 2": {"bits": 3, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "several schemes": {"bits": 4, "group_size": 32, "dynamic": {r"+:.*\.0\..*down_proj": {"bits": 8}, r"-:.*\.1\..*o_proj": {}}},
}


@pytest.mark.parametrize("kind", MADE)
def test_what_gptqmodel_writes_runs_as_it_does_there(tmp_path: Path, kind: str) -> None:
    with made_by_gptqmodel(tmp_path, MADE[kind]) as folder:
        model = by_gptqmodel(folder, BACKEND)
        found = packed_modules(model)
        weights = dict(our_weights(folder))
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(found[name].dequantize_weight().t(), weight), name
        assert relative(ours(folder), logits(model)) < CLOSE
