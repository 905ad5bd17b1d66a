"""What lies between the blocks is not always [windows, tokens, features], and a block does not always run by itself.

Both used to end in an internal error in the middle of the work. They are refused in one line: the first before any text is read, the
second with the block's name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from sweep_architectures import file_class, make_model
from tiny import make_model as make_text_model
from tiny import write_text
from torch import Tensor, nn

from ptqcli.calibration.record import BlockCall
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.discovery import Probe, StopForward


def test_hidden_states_of_another_layout_are_refused_before_any_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ptq: Ptq
) -> None:
    """Stacks stand in front of windows and tokens (test_states.py); here they are said to stand behind them."""
    make_text_model(tmp_path / "model")
    shape = Probe.shape
    monkeypatch.setattr(Probe, "shape", lambda probe, block: replace(shape(probe, block), hidden=(2, 8, 4, 64)))
    arguments = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calib", "builtin"]
    answer = ptq(*arguments, "--algo", "gptq", "--dry-run")
    assert answer.code == UsageError.exit_code
    assert "model.layers.0: gives [2, 8, 4, 64] for 2 windows of 8 tokens" in one_line(answer)
    assert "--algo rtn" in one_line(answer)
    assert "--group-size" not in answer.err
    assert ptq(*arguments, "--algo", "rtn").code == 0


def test_a_model_that_does_not_run_up_to_its_blocks_is_refused_in_one_line(tmp_path: Path, ptq: Ptq) -> None:
    """Reformer's blocks return two named states, which a block that is only looked at does not."""
    make_model("reformer", file_class("reformer"), tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    arguments = ("quantize", tmp_path / "model", "--output", tmp_path / "out", "--group-size", "16", "--algo", "gptq", "--calib", text)
    answer = ptq(*arguments, "--nsamples", "2", "--seqlen", "32")
    assert answer.code == PTQError.exit_code
    assert "does not run up to its blocks (AttributeError: " in one_line(answer)
    assert not (tmp_path / "out").exists()


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyError("cache"), IndexError("list index"), AttributeError("no\nsuch"), RuntimeError("shape"), ZeroDivisionError()]
)
def test_whatever_a_block_raises_is_told_with_its_name(error: Exception) -> None:
    call = BlockCall((None,), {}, 0, "model.layers.3")
    with pytest.raises(PTQError, match=rf"^model.layers.3: does not run by itself .*\({type(error).__name__}: ") as raised:
        call.run(Failing(error), torch.zeros(1, 2, 4))
    assert "\n" not in str(raised.value)


class Returning(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 8), torch.zeros(2, 4), {"hidden": torch.zeros(1, 2, 4)}, None, ()])
def test_what_cannot_be_handed_on_is_told_with_the_blocks_name(output: Any) -> None:
    call = BlockCall((None,), {}, 0, "model.layers.3")
    with pytest.raises(PTQError, match=r"^model.layers.3: gives .* for hidden states \[1, 2, 4\], which cannot be handed on"):
        call.run(Returning(output), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("container", [lambda state: state, lambda state: (state, None), lambda state: [state]])
def test_hidden_states_alone_or_first_of_several_are_handed_on(container: Any) -> None:
    state = torch.ones(1, 2, 4)
    assert BlockCall((None,), {}, 0).run(Returning(container(state)), torch.zeros(1, 2, 4)) is state


@pytest.mark.parametrize("error", [StopForward(), PTQError("our own"), MemoryError()])
def test_what_is_not_the_blocks_fault_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        BlockCall((None,), {}, 0).run(Failing(error), torch.zeros(1, 2, 4))
    assert raised.value is error
