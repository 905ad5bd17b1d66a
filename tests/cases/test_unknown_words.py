"""Kind: a typing error is answered with a list at best. Wherever a command takes one of several words, an unknown one that is close to a
known one is answered with that one, and one that is close to none with none."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Ptq, one_line

# command line with a typing error -> what was meant
MISTYPED = {
    "quantise": "quantize",
    "inspct": "inspect",
    "quantize --algo gtpq": "gptq",
    "quantize --algo awq+gtpq": "gptq",
    "quantize --algo smothquant": "smoothquant",
    "quantize --scheme w4a16g128": "w4a16-g128",
    "quantize --format compresed-tensors": "compressed-tensors",
    "quantize --recipe w4a16-aqw": "w4a16-awq",
    "quantize --recipe mine.yam": "mine.yaml",
    "quantize --set gtpq.damp=1": "gptq",
    "quantize --set gptq.dmap=1": "damp",
    "quantize --algoo gptq": "--algo",
    "quantize modle": "model",
    "eval ./modle": "model",
    "bench --shapes llama3-8bb": "llama3-8b",
    "completion bahs": "bash",
}
NOTHING_LIKE_IT = ("frobnicate", "quantize --algo magic", "quantize xyz", "quantize --recipe zzz", "quantize absent/xyz")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.yaml").write_text("algo: rtn\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("line", "meant"), MISTYPED.items())
def test_the_word_that_was_meant_is_named(ptq: Ptq, line: str, meant: str) -> None:
    answer = ptq(*line.split())
    assert f"did you mean '{meant}'?" in one_line(answer).replace("Did", "did")
    assert answer.code == 2


@pytest.mark.parametrize("line", NOTHING_LIKE_IT)
def test_what_resembles_nothing_is_not_guessed(ptq: Ptq, line: str) -> None:
    assert "did you mean" not in one_line(ptq(*line.split())).lower()
