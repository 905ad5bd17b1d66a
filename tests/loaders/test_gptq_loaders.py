"""GPTQ files that ptq writes, loaded by GPTQModel and by transformers with it; and files of GPTQModel, loaded by ptq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel reads and writes the format")
pytest.importorskip("optimum", reason="transformers builds GPTQ layers through optimum")

import torch
from gptqmodel_loader import (
    CLOSE_IN_BFLOAT16,
    by_transformers,
    check_logits,
    check_made,
    check_no_whole_rows,
    check_signs,
    made_by_gptqmodel,
    our_weights,
    ours,
    packed_modules,
)
from loading import DEMO, logits, relative

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


def check_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Those of GPTQModel's layers are ours to the bit."""
    for name, weight in weights.items():
        assert torch.equal(packed_modules(model)[name].dequantize_weight().t(), weight), name


@pytest.mark.parametrize("kind", WRITTEN)
def test_gptqmodel_has_our_weights_and_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    check_weights(check_logits(folder, BACKEND), dict(our_weights(folder)))


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind not in ("several schemes", "4 bits, whole rows")])
def test_transformers_has_our_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    assert relative(logits(by_transformers(folder)), ours(folder)) < CLOSE_IN_BFLOAT16


def test_transformers_runs_no_whole_rows_of_4_bits_on_the_cpu(tmp_path: Path) -> None:
    check_no_whole_rows(written(tmp_path, "4 bits, whole rows"))


def test_transformers_refuses_several_schemes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        by_transformers(written(tmp_path, "several schemes"))


def test_negative_scales_are_kept(tmp_path: Path) -> None:
    check_signs(written(tmp_path, "4 bits"), BACKEND)


MADE: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 4, "group_size": 32, "sym": True},
    "with zero points": {"bits": 4, "group_size": 32, "sym": False},
    "act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "3 bits, version 2": {"bits": 3, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "several schemes": {"bits": 4, "group_size": 32, "dynamic": {r"+:.*\.0\..*down_proj": {"bits": 8}, r"-:.*\.1\..*o_proj": {}}},
}


@pytest.mark.parametrize("kind", MADE)
def test_what_gptqmodel_writes_runs_as_it_does_there(tmp_path: Path, kind: str) -> None:
    made = made_by_gptqmodel(tmp_path, MADE[kind])
    weights = dict(our_weights(made))
    check_weights(check_made(made, BACKEND), weights)
