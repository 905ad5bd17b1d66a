"""A pass that is suspended keeps torch's modes on its side of the switch, and finds them when it goes on."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ptqcli.calibration.modes import outside_modes
from ptqcli.calibration.record import BlockCall
from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock

CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "no inference": lambda: torch.inference_mode(False),
}


class Moody(nn.Module):
    """Two linears, each run under modes of its own; notes the modes that it finds around them."""

    def __init__(self, contexts):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)
        self.contexts, self.found = contexts, []

    def forward(self, hidden):
        before = outside_modes()
        for linear, context in zip((self.first, self.second), self.contexts, strict=True):
            with context():
                inside = outside_modes()
                hidden = torch.relu(linear(hidden)) @ torch.ones(8, 8)
                self.found.append((inside == outside_modes(), hidden.dtype))
            hidden = hidden.float()
        self.found.append((before == outside_modes(), hidden.dtype))
        return hidden


def walked(contexts, budget):
    """The outputs of five batches, and the modes that the caller found at every stage."""
    block = Moody([CONTEXTS[name] for name in contexts])
    states = torch.randn(10, 3, 8, generator=torch.Generator().manual_seed(1))
    batches = [(start, start + 2) for start in range(0, 10, 2)]
    calls = [BlockCall((None,), {}, 0)] * 5
    target = torch.empty_like(states)
    walk = CalibratedBlock(block, [["first"], ["second"]], calls, batches, states, target, torch.device("cpu"), budget)
    modes = [outside_modes()]
    for _stage, _statistics in walk.sequential(StatisticsRequest(hessian=True)):
        modes.append(outside_modes())
    modes.append(outside_modes())
    return block, target, modes


@pytest.mark.parametrize("around", [nullcontext, torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
@pytest.mark.parametrize("second", CONTEXTS)
@pytest.mark.parametrize("first", CONTEXTS)
def test_modes_stay_on_their_side(first, second, around):
    with torch.no_grad(), around():
        block, suspended, modes = walked((first, second), 1 << 30)
        _, repeated, _ = walked((first, second), 0)
    assert len(set(modes)) == 1, "the caller's modes are the caller's"
    assert all(same for same, _dtype in block.found), "a pass finds its own modes again"
    assert torch.equal(suspended, repeated)


def test_autocast_reaches_the_linears_behind_a_suspension():
    with torch.no_grad():
        block, _, _ = walked(("autocast", "no autocast"), 1 << 30)
    assert {dtype for _, dtype in block.found} == {torch.bfloat16, torch.float32}


def test_an_abandoned_walk_leaves_the_modes_as_they_were():
    block = Moody([CONTEXTS["autocast"], CONTEXTS["inference"]])
    states = torch.zeros(4, 3, 8)
    calls, batches = [BlockCall((None,), {}, 0)] * 2, [(0, 2), (2, 4)]
    walk = CalibratedBlock(block, [["first"], ["second"]], calls, batches, states, states.clone(), torch.device("cpu"), 1 << 30)
    with torch.no_grad():
        before = outside_modes()
        stages = walk.sequential(StatisticsRequest(hessian=True))
        next(stages)
        stages.close()
        assert outside_modes() == before
