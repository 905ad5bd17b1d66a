"""AWQ files that ptq writes, loaded by GPTQModel and by transformers with it; and files of GPTQModel, loaded by ptq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel reads and writes the format")

from gptqmodel_loader import (
    CLOSE,
    CLOSE_IN_BFLOAT16,
    DEMO,
    by_gptqmodel,
    by_transformers,
    logits,
    made_by_gptqmodel,
    ours,
    packed_modules,
    relative,
    share_of_negative_scales,
    without_signs,
)

import ptqcli
from ptqcli.formats.packed_checkpoint import open_checkpoint

BACKEND = "awq_torch"  # multiplies codes by scales in plain torch
WRITTEN: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "with zero points": {"symmetric": False},
    "whole rows": {"group_size": -1},
    "something skipped": {"overrides": [{"pattern": "layers.1.*down_proj", "skip": True}]},
}


def written(folder: Path, kind: str) -> Path:
    ptqcli.quantize(DEMO, output=folder / "out", **{"algo": "rtn", "format": "awq", "wbits": 4, "group_size": 64, **WRITTEN[kind]})
    return folder / "out"


@pytest.mark.parametrize("kind", WRITTEN)
def test_gptqmodel_has_our_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    model = by_gptqmodel(folder, BACKEND)
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), ours(folder)) < CLOSE


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "whole rows"])
def test_transformers_has_our_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    model = by_transformers(folder)
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), ours(folder)) < CLOSE_IN_BFLOAT16


def test_transformers_runs_no_whole_rows_on_the_cpu(tmp_path: Path) -> None:
    model = by_transformers(written(tmp_path, "whole rows"))
    with pytest.raises(RuntimeError, match="qGroupSize"):
        logits(model)


def test_negative_scales_are_kept(tmp_path: Path) -> None:
    """And the twin: without the signs, both have other logits."""
    folder = written(tmp_path, "symmetric")
    expected = ours(folder)
    assert 0.4 < share_of_negative_scales(folder) < 0.6
    assert relative(logits(by_gptqmodel(folder, BACKEND)), expected) < CLOSE
    without_signs(folder)
    assert relative(logits(by_gptqmodel(folder, BACKEND)), expected) > 0.5
    assert relative(logits(by_transformers(folder)), expected) > 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_gptqmodel_writes_runs_as_it_does_there(tmp_path: Path, symmetric: bool) -> None:
    settings = {"bits": 4, "group_size": 32, "sym": symmetric, "method": "awq", "format": "gemm"}
    with made_by_gptqmodel(tmp_path, settings) as folder:
        model = by_gptqmodel(folder, BACKEND)
        assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
        assert relative(ours(folder), logits(model)) < CLOSE
