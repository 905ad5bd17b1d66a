"""The learnable equivalent transformation: exact as a transform, as good as a search where one can be made, never worse than nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURES, in_memory, make_model, token_ids, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptqcli.calibration.record import BlockCall, record_calls
from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.errors import UsageError
from ptqcli.model.linears import is_linear, linear_input, linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.ranges import MinMax, SquaredError
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe_loading import load_recipe
from ptqcli.runtime import load_quantized
from ptqcli.transforms import let
from ptqcli.transforms.folded import BOUND, FoldedBlock, WeightSpec, verified
from ptqcli.transforms.folds import Fold, FoldSearch, find_folds
from ptqcli.transforms.let import LET, _Student

CPU = torch.device("cpu")
ALL = StatisticsRequest(magnitudes=True, samples=True, sums=True, hessian=True)

# Producers whose output can be shifted, with the parameter that takes it. Behind ReLU and GELU it cannot; Llama has no biases to take it
# up, Qwen 2 none behind v, and Falcon and StableLM have norms with biases and linears without.
SHIFTS = {
    "opt": {"self_attn_layer_norm": "bias", "self_attn.v_proj": "bias", "final_layer_norm": "bias"},
    "gpt2": {"ln_1": "bias", "attn.c_attn": "bias", "ln_2": "bias"},
    "gpt_neox": {"input_layernorm": "bias", "attention.query_key_value": "bias", "post_attention_layernorm": "bias"},
    "bloom": {"input_layernorm": "bias", "self_attention.query_key_value": "bias", "post_attention_layernorm": "bias"},
}


@dataclass(frozen=True)
class Case:
    """A loaded block, its folds, the call with which the model runs it, and statistics of what its linears read."""

    block: nn.Module
    found: FoldSearch
    call: BlockCall
    hidden: Tensor
    inputs: dict[str, InputStatistics]

    def run(self, block: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.call.cast(dtype).run(block, self.hidden.to(dtype, copy=True))

    def folded(self, scheme: Scheme, **changes: Any) -> FoldedBlock:
        block = copy.deepcopy(self.block)
        return FoldedBlock(
            block,
            **{
                "folds": self.found.folds,
                "specs": {name: WeightSpec(scheme, torch.float32) for name in self.inputs},
                "inputs": self.inputs,
                "stored": block.get_parameter,
                "run": self.run,
                "search": MinMax(),
                **changes,
            },
        )


def statistics_of(block: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, InputStatistics]:
    """Of the inputs of every linear, over what ``run`` runs."""
    seen: dict[str, InputStatistics] = {}
    handles = []
    for name, module in block.named_modules():
        if is_linear(module):

            def note(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = linear_input(args, kwargs)
                seen[name] = InputStatistics.empty(x.shape[-1], ALL, x.shape[:-1].numel(), CPU)
                seen[name].add(x)

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    run(block)
    for handle in handles:
        handle.remove()
    return seen


def spread_norms(model: nn.Module, outlier: float = 30.0) -> None:
    """Give norms weights that differ, one of them an outlier, and biases that move it off zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3)))
                parameter[5] += outlier


@torch.no_grad()
def make_case(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Case:
    model = make_model(folder, architecture, dtype)
    spread_norms(model)
    model.save_pretrained(folder)
    skeleton = Skeleton(ModelFolder(folder))
    recording = record_calls(skeleton, token_ids(24, 2), 2, CPU, torch.float32, in_memory)
    call, hidden = recording.calls[0][0], recording.hidden.clone()

    def run(block: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.cast(dtype).run(block, hidden.to(dtype, copy=True))

    block = skeleton.load_block(0, CPU, torch.float32)
    return Case(block, verified(block, find_folds(block, run), run), call, hidden, statistics_of(block, run))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make_case(tmp_path_factory.mktemp(name), name) for name in ("llama", "opt", "gpt2")}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


W4, W8A8 = Scheme.parse("w4a16-g32"), Scheme.parse("w8a8")


# Shifts


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_known_shifts_are_found(architecture: str, tmp_path: Path) -> None:
    found = make_case(tmp_path, architecture).found
    assert {fold.producer: fold.shift for fold in found.folds if fold.shift is not None} == SHIFTS.get(architecture, {})
    assert len(found.folds) > 1


def by_hand(block: nn.Module, fold: Fold, s: Tensor, delta: Tensor) -> nn.Module:
    """Equation 3 in float64, one column at a time; delta is in units of what the producer gave."""
    block = copy.deepcopy(block).double()
    producer, read = block.get_submodule(fold.producer), fold.folded()
    delta, s = torch.where(read, delta, 0).double(), torch.where(read, s, 1).double()
    if fold.shift is not None:
        producer.get_parameter(fold.shift).sub_(delta)
        for reader in fold.readers:
            linear = block.get_submodule(reader)
            for column, channel in enumerate(fold.channel.tolist()):
                if channel >= 0:
                    linear.bias.add_(linear_weight(linear)[:, column] * delta[channel])
    for parameter in producer.parameters():
        parameter.div_(s.unsqueeze(1) if is_linear(producer) and parameter.dim() == 2 and linear_weight(producer) is parameter else s)
    for reader in fold.readers:
        for column, channel in enumerate(fold.channel.tolist()):
            if channel >= 0:
                linear_weight(block.get_submodule(reader))[:, column] *= s[channel]
    return block


def random_of(fold: Fold, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(2 * torch.rand(fold.width, generator=generator) - 1), torch.randn(fold.width, generator=generator)


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
@torch.no_grad()
def test_a_scaled_and_shifted_block_computes_what_it_computed(architecture: str, cases: dict[str, Case]) -> None:
    """All folds, one after the other, each scaled before it is shifted, and shifted again; in float64 with the values for the file."""
    case = cases[architecture]
    folded = case.folded(W8A8)
    for fold in case.found.folds:
        s, delta = random_of(fold, 1)
        if fold.shift is not None:
            folded.shift(fold, delta)
        folded.scale(fold, s)
        if fold.shift is not None:
            folded.shift(fold, delta.flip(0))
    stored = in_the_file(case, folded)
    expected = case.run(copy.deepcopy(case.block).double(), torch.float64)
    assert relative(case.run(stored, torch.float64), expected) < 1e-6
    folded.release()
    assert relative(case.run(folded.block), expected) < BOUND
    for fold in case.found.folds:  # the twin: a reader that has not taken up what its inputs lost
        if fold.shift is not None:
            twin = copy.deepcopy(stored)
            twin.get_submodule(fold.readers[0]).bias.copy_(case.block.get_submodule(fold.readers[0]).bias)
            assert relative(case.run(twin, torch.float64), expected) > 1e-4


def in_the_file(case: Case, folded: FoldedBlock) -> nn.Module:
    """The block in float64 with what is stored, and the weights that wait for their codes."""
    block = copy.deepcopy(case.block).double()
    for name, value in folded.rewritten().items():
        block.get_parameter(name).copy_(value)
    for local in folded.specs:
        linear_weight(block.get_submodule(local)).copy_(folded.weight(local))
    return block


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
@torch.no_grad()
def test_a_shift_is_equation_3(architecture: str, cases: dict[str, Case]) -> None:
    case = cases[architecture]
    for fold in (fold for fold in case.found.folds if fold.shift is not None):
        s, delta = random_of(fold, 2)
        folded = case.folded(W8A8)
        folded.shift(fold, delta)
        folded.scale(fold, s)
        expected = dict(by_hand(case.block, fold, s, delta).named_parameters())
        found = in_the_file(case, folded)
        for name, parameter in found.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-5)
        assert relative(found.get_parameter(f"{fold.readers[0]}.bias"), case.block.get_parameter(f"{fold.readers[0]}.bias")) > 1e-2


@torch.no_grad()
def test_statistics_follow_a_shift(cases: dict[str, Case]) -> None:
    """Against those of the shifted block; before the scale and after it."""
    case = cases["opt"]
    for fold in (fold for fold in case.found.folds if fold.shift is not None):
        s, delta = random_of(fold, 3)
        folded = case.folded(W8A8)
        folded.shift(fold, delta)
        folded.scale(fold, s)
        expected = statistics_of(by_hand(case.block, fold, s, delta).float(), case.run)
        for reader in fold.readers:
            found, truth = folded.inputs(reader), expected[reader]
            for what in ("largest", "summed", "sums"):
                torch.testing.assert_close(getattr(found, what), getattr(truth, what), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found.sampled(), truth.sampled(), rtol=1e-3, atol=1e-3)
            assert relative(found.hessian.matrix, truth.hessian.matrix) < 1e-4
            assert relative(case.inputs[reader].hessian.matrix, truth.hessian.matrix) > 1e-2
            assert found.tokens == truth.tokens


@torch.no_grad()
def test_biases_of_a_16_bit_file_take_up_how_the_producers_bias_was_rounded(cases: dict[str, Case]) -> None:
    """The norm's bias in bfloat16 is off by up to 2^-9 of itself, and its readers make up for it in float32."""
    case = cases["opt"]
    narrow = {f"{fold.producer}.{leaf}" for fold in case.found.folds if fold.offsets for leaf in ("weight", "bias")}
    block = copy.deepcopy(case.block)
    for name in narrow:
        block.get_parameter(name).copy_(block.get_parameter(name).bfloat16())

    def stored(name: str) -> Tensor:
        return block.get_parameter(name).bfloat16() if name in narrow else block.get_parameter(name)

    folded = FoldedBlock(copy.deepcopy(block), case.found.folds, {}, {}, stored, case.run, MinMax())
    for fold in (fold for fold in case.found.folds if fold.offsets):
        folded.shift(fold, random_of(fold, 4)[1])
    expected, found = copy.deepcopy(block).double(), copy.deepcopy(block).double()
    for name, value in folded.rewritten().items():
        assert value.dtype == (torch.bfloat16 if name in narrow else torch.float32)
        found.get_parameter(name).copy_(value)
    assert relative(case.run(found, torch.float64), case.run(expected, torch.float64)) < 1e-6
    exact = copy.deepcopy(block).double()
    for fold in (fold for fold in case.found.folds if fold.offsets):
        exact = by_hand(exact, fold, torch.ones(fold.width), random_of(fold, 4)[1])
        exact.get_parameter(f"{fold.producer}.bias").copy_(exact.get_parameter(f"{fold.producer}.bias").bfloat16())
    assert relative(case.run(exact, torch.float64), case.run(expected, torch.float64)) > 1e-5


# What is learned from


SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w8a8", "w8a8-tensor", "w8a8-act-tensor", "w8a8-static", "w8a8-outliers3-static"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
@torch.no_grad()
def test_the_loss_is_the_error_of_the_scaled_block(architecture: str, scheme: str, cases: dict[str, Case]) -> None:
    """Without clipping, what is learned from is what the block is off by when s and delta are applied and all is rounded to nearest."""
    case = cases[architecture]
    block, other = case.folded(Scheme.parse(scheme)), case.folded(Scheme.parse(scheme))
    folds = case.found.folds
    shifted = [let._shifts(block, fold) for fold in folds]
    assert any(shifted) == (architecture == "opt" and scheme in ("w8a8", "w8a8-tensor", "w8a8-act-tensor"))
    student = _Student(block, folds, shifted)
    for each in student.channels:
        s, delta = random_of(each.fold, 5)
        each.log_s.add_(s.log())
        each.delta.add_(delta * torch.tensor(each.shifts))
        other.scale(each.fold, each.s())
        if each.shifts:
            other.shift(each.fold, each.delta / each.s())
    for reader in student.readers.values():
        reader.clipping.l.fill_(30.0)
        reader.clipping.u.fill_(30.0)
    features = case.hidden.shape[-1]
    loss = float(student.loss(block.target())) / features
    assert loss == pytest.approx(other.error(MinMax()), rel=0.05)
    assert abs(loss / block.error(MinMax()) - 1) > 0.1, "scales have to matter, or the comparison means nothing"


# What is found


class Pair(nn.Module):
    """A norm and a linear, of two channels of which only the ratio of the scales matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight[3] = 200.0
            self.linear.weight[:, 3] /= 50

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def pair(scheme: Scheme, shift: str | None = None) -> FoldedBlock:
    block, inputs = Pair(), torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(1))
    fold = Fold(
        producer="norm",
        readers=("linear",),
        channel=torch.arange(8),
        width=8,
        offsets=(("weight", 0.0), ("bias", 0.0)),
        shift=shift,
    )

    def run(twin: nn.Module) -> Tensor:
        return twin(inputs)

    specs = {"linear": WeightSpec(scheme, torch.float32)}
    with torch.no_grad():
        return FoldedBlock(block, [fold], specs, statistics_of(block, run), block.get_parameter, run, MinMax())


@torch.no_grad()
def error_with(block: FoldedBlock, s: Tensor) -> float:
    before = block.state()
    block.scale(block.folds[0], s)
    error = block.error(MinMax())
    block.undo(before)
    return error


@torch.no_grad()
def test_it_comes_as_close_as_the_best_scale_of_a_grid() -> None:
    """The scale of the one channel that stands out, all others 1, by brute force."""
    block = pair(W8A8)
    tried = [error_with(block, torch.where(torch.arange(8) == 3, 2.0 ** (power / 8), 1.0)) for power in range(-16, 88)]
    plain, measured = block.error(MinMax()), block.error(SquaredError())
    assert min(tried) < 0.2 * plain, "a scale has to help"
    (note,) = LET(iters=1000).apply(block)
    assert block.error(MinMax()) <= 1.05 * min(tried)
    assert note.error == pytest.approx(block.error(SquaredError()) / measured)
    assert note.choice == "scales"


@torch.no_grad()
def test_learning_is_what_brings_it_there() -> None:
    """The twin: a start that is off by 16 is worse than the grid, and descent makes up for most of it."""
    start, errors = let.smoothing_scales, []
    for iters in (1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(let, "smoothing_scales", lambda *given: start(*given) * torch.where(torch.arange(8) == 3, 1 / 8, 1.0))
            block = pair(W8A8)
            LET(iters=iters).apply(block)
            errors.append(block.error(MinMax()))
    assert errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_a_channel_off_zero_is_shifted() -> None:
    errors = []
    for shift in (None, "bias"):
        block = pair(W8A8, shift)
        block.block.norm.bias[3] = 2000.0
        block = FoldedBlock(
            block.block,
            block.folds,
            block.specs,
            statistics_of(block.block, block._replay._run),
            block.block.get_parameter,
            block._replay._run,
            MinMax(),
        )
        (note,) = LET(iters=50).apply(block)
        errors.append(block.error(MinMax()))
        assert note.choice == ("scales" if shift is None else "scales and shifts")
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bad", [True, False])
@torch.no_grad()
def test_it_is_never_worse_than_nothing(bad: bool, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned is left out when it is bad, to the last bit, and with it the shifts; else it is kept."""
    case = cases["opt"]
    folded = case.folded(W8A8)
    before = {local: folded.weight(local).clone() for local in folded.specs}
    without = folded.error(SquaredError())
    if bad:
        worst = [(torch.logspace(-3, 3, fold.width), torch.zeros(fold.width)) for fold in case.found.folds]
        monkeypatch.setattr(let, "_learned", lambda *_: worst)
    notes = LET(iters=3).apply(folded)
    same = all(torch.equal(folded.weight(local), before[local]) for local in before)
    assert same == bad
    assert {note.choice for note in notes} == ({"nothing, which is no worse for the block"} if bad else {"scales", "scales and shifts"})
    assert (folded.error(SquaredError()) == without) if bad else (folded.error(SquaredError()) < without)
    assert all((note.error == 1) if bad else (note.error < 1) for note in notes)
    assert bool(folded.rewritten()) != bad


@torch.no_grad()
def test_it_stands_on_what_was_scaled_before(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, it leaves the scales of the transform before it."""
    case = cases["opt"]
    folded = case.folded(W8A8)
    fold = case.found.folds[0]
    folded.scale(fold, random_of(fold, 6)[0])
    before = folded.weight(fold.readers[0]).clone()
    worst = [(torch.logspace(-3, 3, fold.width), torch.zeros(fold.width)) for fold in case.found.folds]
    monkeypatch.setattr(let, "_learned", lambda *_: worst)
    LET(iters=1).apply(folded)
    assert torch.equal(folded.weight(fold.readers[0]), before)
    assert not torch.equal(before, case.folded(W8A8).weight(fold.readers[0]))


@torch.no_grad()
def test_channels_without_weights_or_inputs_keep_the_scale_1(cases: dict[str, Case]) -> None:
    case = cases["llama"]
    block = copy.deepcopy(case.block)
    for local in ("q_proj", "k_proj", "v_proj"):
        block.get_submodule(f"self_attn.{local}").weight[:, 9] = 0
    block.get_submodule("input_layernorm").weight[11] = 0
    inputs = statistics_of(block, case.run)
    specs = {local: WeightSpec(W8A8, torch.float32) for local in inputs}
    folded = FoldedBlock(block, case.found.folds, specs, inputs, block.get_parameter, case.run, MinMax())
    LET(iters=10).apply(folded)
    columns = folded._columns["self_attn.q_proj"]
    assert columns[[9, 11]].tolist() == [1, 1]
    assert (columns != 1).sum() == len(columns) - 2


def test_the_steps_are_checked() -> None:
    with pytest.raises(UsageError, match="let iters 0 is not valid"):
        LET(iters=0)


# From the request to logits


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=token_ids()).logits
    return found.float()


@pytest.mark.parametrize(
    "architecture, recipe",
    [
        ("opt", {"algo": "let+omniquant", "wbits": 8, "abits": 8, "iters": 4}),
        ("opt", {"algo": "let", "wbits": 8, "abits": 8, "sequential": False}),
        pytest.param("gpt2", {"algo": "let+gptq", "wbits": 8, "abits": 8, "sequential": False}, marks=pytest.mark.slow),
        ("llama", {"algo": "let+gptq", "wbits": 4, "group_size": 32}),
        pytest.param("llama", {"algo": "let+awq", "wbits": 8, "abits": 8, "act_scales": "static"}, marks=pytest.mark.slow),
        ("llama", {"algo": "let+llm-int8", "outliers": "static", "outlier_threshold": 4.0}),
    ],
    ids=lambda value: value["algo"] if isinstance(value, dict) else value,
)
@torch.no_grad()
def test_it_composes(architecture: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Deterministic, said of every fold, near to the model; and what transformers reads computes the same."""
    model = make_model(tmp_path / "model", architecture)
    spread_norms(model, 4.0)
    model.save_pretrained(tmp_path / "model")
    given = {"calib": str(write_text(tmp_path / "text.txt")), "nsamples": 6, "seqlen": 48, "let_iters": 5, **recipe}
    report = quantize(tmp_path / "model", load_recipe(flags=given), tmp_path / "out")
    quantize(tmp_path / "model", load_recipe(flags=given), tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    used = [fold for fold in report.folds if fold.left_alone is None]
    assert used
    assert all(fold.choices[0][0] == "let" and fold.choices[0][2] <= 1 for fold in used)
    if recipe.get("abits") == 8:  # else five steps are few, and what llm-int8 has split off is no trouble any more
        assert any(fold.choices[0][1].startswith("scales") for fold in used)
    found, expected = logits(load_quantized(tmp_path / "out")), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert relative(found, expected) < (0.5 if recipe.get("wbits") == 4 or "act_scales" in recipe else 0.1)
    if architecture != "gpt2" and "llm-int8" not in recipe["algo"]:  # transformers reads neither
        theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
        assert {key: list(value) for key, value in info.items() if value} == {}
        assert relative(logits(theirs), found) < 3e-2  # inputs at the border of two codes go either way
        for module, other in zip(theirs.modules(), model.modules(), strict=False):
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(other.bias)
        assert architecture != "opt" or relative(logits(theirs), found) > 0.1


@pytest.mark.parametrize("algo", ["let", "smoothquant"])
def test_shifts_are_in_the_file(algo: str, tmp_path: Path) -> None:
    """The bias of a linear whose inputs were shifted is another; of one that is only scaled it is as it was."""
    model = make_model(tmp_path / "model", "opt")
    spread_norms(model, 4.0)
    model.save_pretrained(tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    flags = {"algo": algo, "wbits": 8, "abits": 8, "calib": text, "nsamples": 6, "seqlen": 48}
    quantize(tmp_path / "model", load_recipe(flags={**flags, **({"let_iters": 5} if algo == "let" else {})}), tmp_path / "out")
    name = "model.decoder.layers.0.self_attn.q_proj.bias"
    before, after = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("model", "out"))
    assert torch.equal(before, after) == (algo == "smoothquant")
