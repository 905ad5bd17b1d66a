"""A few types of the sweep over all architectures, one for each kind of result; the sweep itself is scripts/sweep_architectures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from sweep_architectures import REQUESTS, sweep
from sweep_page import Outcome, Row, summary, table

import ptqcli

GPTQ = {"gptq": REQUESTS["gptq"]}
EXPANDED = "dequantize only" if Version(transformers.__version__) >= Version("5.23") else "refused by transformers"


@pytest.mark.parametrize(
    ("kind", "result", "reason"),
    [
        ("zamba", "right", ""),  # blocks of two classes, one of them shared
        ("rwkv", EXPANDED, "its own code looks at the weights while it loads"),  # weights that the model itself changes
        ("mixtral", "right", ""),  # experts, which transformers puts together while it reads
        ("xlm", "refused", "blocks that do not hand one state on"),
        ("t5 encoder-decoder", "refused", "an encoder with a decoder"),
    ],
)
def test_types_of_every_result(kind: str, result: str, reason: str, tmp_path: Path) -> None:
    found = summary(sweep(kind, tmp_path, GPTQ))
    assert found[0] == result
    assert found[1].startswith(reason)


def test_a_wrong_reader_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ptqcli.load_quantized

    def slightly_wrong(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[0] *= 1.1
        return model

    monkeypatch.setattr(ptqcli, "load_quantized", slightly_wrong)
    outcome = sweep("llama", tmp_path, GPTQ).outcomes["gptq"]
    assert outcome.result == "wrong"
    assert outcome.reason.startswith("ptqcli: relative error")


def test_the_table_counts_each_type_once_by_the_worst_that_happened() -> None:
    rows = {
        "one": Row("one", "OneModel", "OneModel", {"rtn": Outcome("right"), "gptq": Outcome("wrong", "by 2")}),
        "two": Row("two", "TwoModel", "TwoModel", {"rtn": Outcome("right"), "gptq": Outcome("right")}),
        "four": Row(
            "four",
            "Four",
            "Four",
            {"rtn": Outcome("right"), "gptq": Outcome("right"), "awq": Outcome("refused", "this parameter is no matrix")},
        ),
        "five": Row("five", "Five", "Five", {"rtn": Outcome("right"), "awq": Outcome("right", "awq scales nothing: a reason")}),
        "three": Row(
            "three", "Three", "", {"rtn": Outcome("refused", "layers.0.mlp.experts: 90% of"), "gptq": Outcome("refused", "fused experts")}
        ),
    }
    page = table(rows, {"transformers": "5"})
    for line in (
        "| wrong | 1 |",
        "| right | 2 |",
        "| right; awq refused | 1 |",
        "| four | Four | right; awq refused | this parameter is no matrix |",
        "| five | Five | right | awq scales nothing: a reason; not run: gptq |",
        "| refused: experts that are stored or used in another way | 1 |",
        "| all | 5 |",
        "| one | OneModel | wrong | by 2; not run: awq |",
    ):
        assert line in page.splitlines()
