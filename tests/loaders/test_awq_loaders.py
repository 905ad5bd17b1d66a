"""AWQ files that ptq writes, loaded by GPTQModel and by transformers with it; and files of GPTQModel, loaded by ptq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel reads and writes the format")

from gptqmodel_loader import (
    CLOSE_IN_BFLOAT16,
    by_transformers,
    check_logits,
    check_made,
    check_no_whole_rows,
    check_signs,
    made_by_gptqmodel,
    ours,
    packed_modules,
)
from loading import DEMO, logits, relative

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
    check_logits(written(tmp_path, kind), BACKEND)


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "whole rows"])
def test_transformers_has_our_logits(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path, kind)
    model = by_transformers(folder)
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), ours(folder)) < CLOSE_IN_BFLOAT16


def test_transformers_runs_no_whole_rows_on_the_cpu(tmp_path: Path) -> None:
    check_no_whole_rows(written(tmp_path, "whole rows"))


def test_negative_scales_are_kept(tmp_path: Path) -> None:
    check_signs(written(tmp_path, "symmetric"), BACKEND)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_gptqmodel_writes_runs_as_it_does_there(tmp_path: Path, symmetric: bool) -> None:
    settings = {"bits": 4, "group_size": 32, "sym": symmetric, "method": "awq", "format": "gemm"}
    check_made(made_by_gptqmodel(tmp_path, settings), BACKEND)
