"""Kind: values that pass a check of their type and mean something else, or nothing: an empty name, the root, a temperature out of range.

An empty name is what an unset variable of a shell leaves, and as a path it would be the working directory.
"""

from __future__ import annotations

import pytest
import torch
from commandline import Ptq, one_line

import ptqcli
from ptqcli.model.locate import demo_model

DEMO = str(demo_model())


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "", "--dry-run"),
        ("quantize", "--output", "", "--dry-run"),
        ("quantize", "--recipe", "", "--dry-run"),
        ("quantize", "--data-dir", "", "--dry-run"),
        ("eval", ""),
        ("bench", ""),
        ("inspect", ""),
        ("generate", "", "text"),
        ("eval", DEMO, "--baseline", ""),
        ("bench", DEMO, "--only", "model", "--baseline", ""),
    ],
)
def test_an_empty_name_is_not_the_working_directory(ptq: Ptq, words: tuple[str, ...]) -> None:
    answer = ptq(*words)
    assert answer.code == 2, answer
    assert "empty" in one_line(answer)


def test_the_root_is_no_output(ptq: Ptq) -> None:
    answer = ptq("quantize", "--output", "/", "--dry-run")
    assert answer.code == 2, answer
    assert "root" in one_line(answer)


@pytest.mark.parametrize("temperature", ["nan", "inf", "1e-300"])
def test_a_temperature_that_no_draw_can_have(ptq: Ptq, temperature: str) -> None:
    answer = ptq("generate", DEMO, "text", "--temperature", temperature)
    assert answer.code == 2, answer
    assert "--temperature" in one_line(answer)


@pytest.mark.parametrize("shape", [(0, 128), (4, 0)])
def test_a_matrix_without_numbers(shape: tuple[int, int]) -> None:
    with pytest.raises(ptqcli.UsageError, match="holds nothing"):
        ptqcli.solve(torch.zeros(shape), "w4a16", "rtn")
