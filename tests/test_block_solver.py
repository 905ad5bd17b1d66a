"""The seam for solvers that learn: a window of blocks, batches with gradients, two streams of hidden states."""

import copy
import json
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from tiny import make_model, write_text
from torch import nn
from transformers import AutoModelForCausalLM

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.errors import PTQError
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.pipeline import pipeline
from ptqcli.recipe import Recipe
from ptqcli.runtime import load_quantized
from ptqcli.solvers import BlockSolver, Solution, SolveNotes

LAYERS = 5
SEEN = []  # what the solvers below saw of each window


@dataclass
class Seen:
    """A window as a solver saw it. losses: mean squared difference from the targets, of rounding and after learning."""

    paths: tuple
    inputs: torch.Tensor
    targets: torch.Tensor
    losses: list = field(default_factory=list)


class Learned(nn.Module):
    """A linear of fixed codes whose scales are learned."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.change = nn.Parameter(torch.zeros_like(weight.scale, dtype=torch.float32))

    def quantized(self):
        return replace(self.weight, scale=(self.weight.scale * (1 + self.change.detach())).to(self.weight.scale.dtype))

    def forward(self, inputs):
        groups = self.weight.codes.shape[1] // self.change.shape[1]
        change = (1 + self.change).repeat_interleave(groups, dim=1)
        return nn.functional.linear(inputs, self.weight.dequantize(torch.float32) * change, self.bias)


@dataclass(frozen=True)
class LearnScales(BlockSolver):
    """Rounds to nearest, then learns all scales and norms of two blocks at once."""

    name: ClassVar[str] = "learn-scales"
    summary: ClassVar[str] = "scales learned over two blocks"
    needs: ClassVar[StatisticsRequest] = StatisticsRequest(original=True)
    window: ClassVar[int] = 2
    steps: int = 25

    def workspace_bytes(self, out_features, in_features, scheme=None):
        return 8 * out_features * in_features

    def moves_groups(self, scheme):
        return False

    def solve(self, work):
        student, layers = copy.deepcopy(work.module), {}
        for name, task in work.linears.items():
            place, local = next((place, name[len(path) + 1 :]) for place, path in enumerate(work.paths) if name.startswith(path + "."))
            rounded = round_to_nearest(task.weight, task.scheme, task.scale_dtype, MinMax())
            layers[name] = Learned(rounded, student[place].get_submodule(local).bias)
            student[place].set_submodule(local, layers[name])
        norms = {
            f"{path}.{name}": parameter
            for path, block in zip(work.paths, student, strict=True)
            for name, parameter in block.named_parameters()
            if "norm" in name
        }
        seen = Seen(tuple(work.paths), *(torch.cat(parts) for parts in zip(*((b.inputs, b.targets) for b in work.batches()), strict=True)))
        SEEN.append(seen)
        with torch.enable_grad():
            self._learn(work, student, [*(layer.change for layer in layers.values()), *norms.values()], seen)
        for name, layer in layers.items():
            work.place(name, Solution(layer.quantized(), SolveNotes()))
        for name, value in norms.items():
            work.replace(name, value)

    def _learn(self, work, student, trained, seen):
        optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in trained], lr=3e-2)
        for _ in range(self.steps):
            losses = [nn.functional.mse_loss(batch.run(student), batch.targets) for batch in work.batches()]
            seen.losses.append(float(sum(losses).detach()) / len(losses))
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()


@dataclass(frozen=True)
class Forgetful(LearnScales):
    """Places nothing."""

    name: ClassVar[str] = "forgetful"

    def solve(self, work):
        list(work.batches())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Quantize a model of five blocks with a solver of this file; the original model and the output folder."""

    def quantized(solver, **changes):
        SEEN.clear()
        original = make_model(tmp_path / "model", num_hidden_layers=LAYERS)
        monkeypatch.setattr(Recipe, "solver", lambda self: solver)
        text = write_text(tmp_path / "text.txt")
        given = {"algo": "gptq", "wbits": 3, "group_size": 32, "nsamples": 6, "seqlen": 48, "calib": str(text)}
        pipeline.quantize(tmp_path / "model", Recipe(**{**given, **changes}), tmp_path / "out", overwrite=True)
        return original, tmp_path / "out"

    return quantized


@torch.no_grad()
def hidden_states(model, windows):
    return model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states


def windows_of(monkeypatch):
    """The calibration windows of the runs to come."""
    kept = []
    record = pipeline.record
    monkeypatch.setattr(pipeline, "record", lambda skeleton, windows, *rest: kept.append(windows) or record(skeleton, windows, *rest))
    return kept


def test_a_solver_learns_over_windows_of_two_blocks(run, monkeypatch):
    kept = windows_of(monkeypatch)
    original, out = run(LearnScales())
    numbers = [[path.removeprefix("model.layers.") for path in seen.paths] for seen in SEEN]
    assert numbers == [["0", "1"], ["2", "3"], ["4"]]
    for seen in SEEN:
        assert seen.losses[-1] < 0.85 * seen.losses[0], "learning must do something that rounding alone has not done"

    truth = hidden_states(original, kept[0])
    reloaded = hidden_states(load_quantized(out, kernel="reference", fuse=False), kept[0])
    assert torch.equal(SEEN[0].inputs, truth[0])
    for index, seen in enumerate(SEEN[:2]):
        torch.testing.assert_close(seen.targets, truth[2 * index + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(SEEN[index + 1].inputs, reloaded[2 * index + 2], rtol=1e-4, atol=1e-4)
        assert (SEEN[index + 1].inputs - seen.targets).abs().max() > 1e-2, "the two streams must differ for this to prove anything"


def test_the_learned_norms_are_stored(run):
    original, out = run(LearnScales())
    stored = load_quantized(out)
    for name, parameter in original.named_parameters():
        if "layernorm" in name:
            assert not torch.equal(parameter, stored.get_parameter(name)), name
    assert torch.equal(original.model.norm.weight, stored.model.norm.weight)


def test_transforms_work_in_front_of_a_solver_that_learns(run):
    run(LearnScales(steps=2), algo="awq+gptq")
    scaled = SEEN[0].losses[0]
    run(LearnScales(steps=2), algo="gptq")
    assert scaled != SEEN[0].losses[0]


def test_a_linear_that_is_not_placed_is_an_error(run, tmp_path):
    with pytest.raises(PTQError, match=r"model\.layers\.0\.\S+: the solver has not placed it"):
        run(Forgetful())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "act, message",
    [
        (
            lambda work: work.place("lm_head", None),
            "lm_head: a solver has placed it, but it is no linear of model.layers.0",
        ),
        (lambda work: work.replace("model.norm.weight", torch.ones(64)), "model.norm.weight: a solver has replaced it"),
    ],
)
def test_what_a_solver_must_not_do_is_an_error(run, monkeypatch, tmp_path, act, message):
    monkeypatch.setattr(Forgetful, "solve", lambda self, work: (LearnScales(steps=1).solve(work), act(work)))
    with pytest.raises(PTQError, match=message):
        run(Forgetful())
    assert not (tmp_path / "out").exists()


def test_a_window_can_be_repeated(run, monkeypatch):
    """The hidden states before a window are what they were, whatever ran behind them, and the last codes placed are those that count."""
    inputs = []

    @dataclass(frozen=True)
    class Twice(LearnScales):
        def solve(self, work):
            super().solve(work)
            inputs.append(torch.cat([batch.inputs for batch in work.batches()]))
            super().solve(work)

    _, out = run(Twice(steps=1))
    for before, seen in zip(inputs, SEEN[::2], strict=True):
        assert torch.equal(before, seen.inputs)
    layers = json.loads((out / "ptq_report.json").read_text())["layers"]
    assert len({layer["name"] for layer in layers}) == len(layers) == LAYERS * 7


def test_parameters_are_replaced_and_the_stored_ones_stay(run):
    """A solver that trains the loaded parameters themselves would change what is read of the file; they do not require gradients."""
    checked = []

    @dataclass(frozen=True)
    class Looking(LearnScales):
        def solve(self, work):
            checked.extend(parameter.requires_grad for parameter in work.module.parameters())
            super().solve(work)

    run(Looking(steps=1))
    assert checked
    assert not any(checked)


def test_the_original_is_what_transformers_loads(run, tmp_path, monkeypatch):
    kept = windows_of(monkeypatch)
    run(LearnScales(steps=1))
    truth = hidden_states(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), kept[0])
    torch.testing.assert_close(SEEN[1].targets, truth[4], rtol=1e-5, atol=1e-5)
