"""Experts one by one: how stacks become linears, which tokens they are calibrated on, and what is told of those that few reach."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import chain

import pytest
import tiny
import torch
from mixtures import EXPERTS, MIXTURES
from test_mixtures import quantized, recipe_for, truth
from tiny import make_model, token_ids, write_text
from torch import nn

from ptqcli import estimate
from ptqcli.calibration.record import record_calls
from ptqcli.calibration.routed import Pool
from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.calibration.text import evaluation_ids
from ptqcli.calibration.together import BlockTogether, Together, steps_of
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.mixtures import find_mixtures, with_all_experts
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder, ModelInMemory
from ptqcli.model.stacks import Linears, Watched
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Override
from ptqcli.resources import Resources
from ptqcli.solvers.gptq import GPTQ

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _known_mixtures(monkeypatch):
    for name, entry in MIXTURES.items():
        monkeypatch.setitem(tiny.ARCHITECTURES, name, entry)


def separated(stack: torch.Tensor, turned: bool) -> Linears:
    """The matrices of a stack as linears of two parts, below a module of their own."""
    owner = nn.Module()
    for index, matrix in enumerate(stack):
        rows = matrix.t() if turned else matrix
        expert = nn.Module()
        for name, part in zip("ab", rows.chunk(2), strict=True):
            linear = nn.Linear(rows.shape[1], len(part), bias=False)
            linear.weight = nn.Parameter(part.clone())
            expert.add_module(name, linear)
        owner.add_module(str(index), expert)
    return Linears(owner, "stack", stack.shape, ("a", "b"), turned)


@torch.no_grad()
@pytest.mark.parametrize("turned", [False, True])
def test_products_with_matrices_are_those_with_the_stack(turned):
    stack, x = torch.randn(3, 4, 6), torch.randn(5, 4 if turned else 6)
    matrices = separated(stack, turned)
    for index in (1, -1, torch.tensor(2)):
        if turned:
            expected = x @ stack[index]
            found = [x @ matrices[index], torch.matmul(x, matrices[index]), nn.functional.linear(x, matrices[index].t())]
        else:
            expected = nn.functional.linear(x, stack[index])
            found = [nn.functional.linear(x, matrices[index]), x @ matrices[index].T, x @ matrices[index].transpose(0, 1)]
        for product in found:
            torch.testing.assert_close(product, expected)
        assert matrices[index].shape == stack[index].shape
    if turned:
        batches = torch.randn(3, 5, 4)
        torch.testing.assert_close(torch.bmm(batches, matrices), torch.bmm(batches, stack))
        bias = torch.randn(6)
        torch.testing.assert_close(nn.functional.linear(x, matrices[0].t(), bias), x @ stack[0] + bias)


def test_other_uses_are_refused_by_name_and_seen_beforehand():
    matrices, watched = separated(torch.randn(3, 4, 6), False), Watched(torch.randn(3, 4, 6))
    for stack in (matrices, watched):
        uses = [lambda stack=stack: torch.sum(stack), lambda stack=stack: stack[torch.tensor([0, 1])], lambda stack=stack: stack[0] * 2]
        for use in uses[:2]:
            if stack is matrices:
                with pytest.raises(PTQError, match=r"^stack: "):
                    use()
            else:
                use()
    assert len(watched.others) == 2
    assert watched.turned is None
    clean = Watched(torch.randn(3, 4, 6))
    assert nn.functional.linear(torch.ones(2, 6), clean[1]).shape == (2, 4)
    assert clean.turned is False


def test_a_copy_runs_the_linears_of_the_copy():
    matrices = separated(torch.randn(2, 4, 6), False)
    matrices.owner.__dict__["weights"] = matrices
    twin = copy.deepcopy(matrices.owner)
    with torch.no_grad():
        twin.get_submodule("0.a").weight.zero_()
        x = torch.ones(1, 6)
        assert not nn.functional.linear(x, twin.weights[0])[0, :2].any()
        assert nn.functional.linear(x, matrices[0])[0, :2].all()


class OfLists(nn.Module):
    """A block in the older style: a list of MLPs, a router and a shared MLP beside it."""

    def __init__(self) -> None:
        super().__init__()

        def mlp() -> nn.ModuleDict:
            return nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})

        self.moe = nn.ModuleDict({"gate": nn.Linear(8, 3), "shared": mlp(), "weigh": nn.Linear(8, 1)})
        self.moe["experts"] = nn.ModuleList(mlp() for _ in range(3))


def test_experts_of_a_list_that_did_not_run_take_the_places_of_those_that_did():
    ran = (("moe.gate",), ("moe.experts.1.up",), ("moe.experts.1.down",), ("moe.shared.up",), ("moe.shared.down",))
    found = find_mixtures(OfLists(), [local for stage in ran for local in stage])
    assert [(mixture.path, mixture.count, set(mixture.routers)) for mixture in found] == [("moe.experts", 3, {"moe.gate", "moe.weigh"})]
    stages = with_all_experts(ran, found)
    assert stages[0] == ("moe.gate",)
    assert stages[1:7] == tuple((f"moe.experts.{number}.{part}",) for number in range(3) for part in ("up", "down"))
    assert stages[7:] == ran[3:]
    every = [f"moe.experts.{number}.{part}" for number in range(3) for part in ("up", "down")]
    assert find_mixtures(OfLists(), every) == []  # a list of which all entries run is not routed to


def test_a_model_in_memory_has_the_linears_of_its_files(tmp_path):
    model = make_model(tmp_path, "qwen3_moe")
    files, memory = Skeleton(ModelFolder(tmp_path)), Skeleton(ModelInMemory(model))
    assert [site.name for site in memory.linears] == [site.name for site in files.linears]
    for site in files.linears:
        assert torch.equal(files.read(f"{site.name}.weight"), memory.read(f"{site.name}.weight"))


def walk_of(folder, kind: str, fed: bool = False):
    """The first block of a tiny model, its mixture, and the walk through it on some tokens."""
    make_model(folder, kind)
    skeleton = Skeleton(ModelFolder(folder))
    recording = record_calls(skeleton, token_ids(batch=4), 2, CPU, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    block, shape = skeleton.load_block(0, CPU, torch.float32), skeleton.shapes[0]
    target = torch.empty_like(recording.hidden)
    counts = {mixture.path: mixture.count for mixture in shape.mixtures} if fed else {}
    walk = CalibratedBlock(block, shape.stages, recording.calls[0], recording.batches, recording.hidden, target, CPU, 1 << 30, counts)
    return walk, shape.mixtures


@torch.no_grad()
def test_pooled_statistics_are_the_sums_over_all_experts(tmp_path):
    walk, mixtures = walk_of(tmp_path, "mixtral")
    needs = StatisticsRequest(hessian=True)
    alone = walk.observe(needs)
    pool = Pool(walk, mixtures, needs, least=10**6)
    ups = [number for number, stage in enumerate(walk.stages) if stage[0].endswith("w1")]
    assert len(ups) == EXPERTS
    assert pool.experts == {*ups, *(number + 1 for number in ups)}
    tokens = walk.source.shape[0] * walk.source.shape[1]
    assert sum(alone[number].tokens for number in ups) == 2 * tokens  # two experts a token
    for first in (0, 1):
        pooled = pool.in_place_of(ups[0] + first, alone[ups[0] + first])
        expected = sum(alone[number + first].hessian.matrix for number in ups)
        torch.testing.assert_close(pooled.hessian.matrix, expected)
        assert not torch.allclose(alone[ups[0] + first].hessian.matrix, expected)
    few = Pool(walk, mixtures, needs, least=alone[ups[0]].tokens)
    assert few.in_place_of(ups[0], alone[ups[0]]) is None
    assert Pool(walk, mixtures, needs, least=0).in_place_of(ups[0], alone[ups[0]]) is None


@torch.no_grad()
@pytest.mark.parametrize("fits", [True, False])
def test_fed_experts_see_every_token_and_the_outputs_stay_routed(fits, tmp_path):
    walk, mixtures = walk_of(tmp_path / "fed", "mixtral", fed=True)
    routed, _ = walk_of(tmp_path / "routed", "mixtral")
    walk.suspended_fits = fits
    seen = []
    handle = routed.block.mlp.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    routed.advance()
    handle.remove()
    x = torch.cat(seen).double()
    needs = StatisticsRequest(hessian=True)
    walked = chain.from_iterable(BlockTogether(walk, steps_of(walk.block, walk.stages, mixtures, lambda _stage: 3)).sequential(needs))
    for statistics in (dict(walked), dict(enumerate(walk.observe(needs)))):
        for number, stage in enumerate(walk.stages):
            if stage[0].endswith("w1"):
                torch.testing.assert_close(statistics[number].hessian.matrix.double(), x.t() @ x, rtol=1e-4, atol=1e-3)
                expert = walk.block.get_submodule(stage[0].rpartition(".")[0])
                inner = nn.functional.silu(expert.w1(x.float())) * expert.w3(x.float())
                hessian = (inner.t() @ inner).double()
                bound = 1e-4 * float(hessian.abs().max())
                torch.testing.assert_close(statistics[number + 1].hessian.matrix.double(), hessian, rtol=1e-4, atol=bound)
    torch.testing.assert_close(walk.target, routed.target)


def replaced(walk: CalibratedBlock, number: int) -> None:
    """Other weights for a stage, as quantizing makes them; the same ones each time."""
    generator = torch.Generator().manual_seed(number)
    for local in walk.stages[number]:
        weight = walk.block.get_submodule(local).weight
        weight.data = weight + 0.1 * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_experts_seen_together_are_seen_as_one_after_the_other(kind, fits, most, tmp_path):
    """Each reads what its own earlier linears make of the tokens, with the weights that these have got."""
    needs = StatisticsRequest(hessian=True)
    walks = []
    for name in ("alone", "together"):
        walk, mixtures = walk_of(tmp_path / name, kind)
        steps = steps_of(walk.block, walk.stages, mixtures, lambda _stage: most)
        walks.append((walk, BlockTogether(walk, steps), steps))
    (alone, _, _), (walk, together, steps) = walks
    walk.suspended_fits = fits
    groups = [step for step in steps if isinstance(step, Together)]
    assert {len(step.stages) for step in groups} == ({EXPERTS} if most > EXPERTS else {most, EXPERTS % most or most})
    assert sorted(stage for step in groups for stage in step.stages) == sorted(set(range(len(walk.stages))) - {*steps})
    expected, found = {}, {}
    for number, statistics in alone.sequential(needs):
        expected[number] = statistics.hessian.matrix
        replaced(alone, number)
    for step in together.sequential(needs):
        for number, statistics in step:
            found[number] = statistics.hessian.matrix
            replaced(walk, number)
    assert found.keys() == expected.keys()
    for number, matrix in expected.items():
        torch.testing.assert_close(found[number], matrix, rtol=1e-5, atol=1e-5 * float(matrix.abs().max()))
    torch.testing.assert_close(walk.target, alone.target)


@pytest.mark.parametrize("algo", ["gptq", *(pytest.param(algo, marks=pytest.mark.slow) for algo in ("awq+gptq", "obq", "rtn"))])
def test_solving_together_is_solving_one_by_one(algo, tmp_path, monkeypatch):
    """However many experts are solved at a time, the file is the same."""
    calls = []
    solve_alike = GPTQ.solve_alike
    monkeypatch.setattr(GPTQ, "solve_alike", lambda *given: calls.append(len(given[1])) or solve_alike(*given))
    files = []
    for most in (1, 3, 8):
        calls.clear()
        monkeypatch.setattr(estimate, "MOST_EXPERTS", most)
        quantized(tmp_path / str(most), "mixtral", algo)
        files.append((tmp_path / str(most) / "out" / "model.safetensors").read_bytes())
        if "gptq" in algo:
            assert max(calls) == min(most, EXPERTS)
    assert files[0] == files[1] == files[2]


def test_experts_that_few_tokens_reach_are_told_and_counted(tmp_path):
    few = {"nsamples": 1, "seqlen": 4}
    report = quantized(tmp_path, "mixtral", "gptq", min_expert_tokens=0, **few)
    experts = {layer.name: layer for layer in report.layers if layer.tokens is not None}
    assert len(experts) == 2 * EXPERTS * 3
    firsts = [layer for name, layer in experts.items() if name.endswith(".w1")]
    assert sum(layer.tokens for layer in firsts) == 2 * 2 * 4  # layers, experts a token, tokens
    unreached = [layer for layer in experts.values() if layer.tokens == 0]
    assert unreached
    assert all(layer.inputs_all_zero and not layer.pooled for layer in unreached)
    again = quantize(tmp_path / "model", recipe_for(tmp_path, "gptq", **few), tmp_path / "pooled", resources=Resources(batch_size=4))
    pooled = [layer for layer in again.layers if layer.pooled]
    assert {layer.name for layer in pooled} == set(experts)
    assert not any(layer.inputs_all_zero for layer in again.layers)


@torch.no_grad()
def test_gptq_on_routed_tokens_beats_rounding(tmp_path):
    errors = {}
    for algo in ("rtn", "gptq"):
        folder = tmp_path / algo
        model = make_model(folder / "model", "mixtral")
        quantize(folder / "model", recipe_for(folder, algo, wbits=3, nsamples=64), folder / "out")
        held_out = write_text(folder / "held.txt", 300, seed=9)
        ids = evaluation_ids(str(held_out), load_tokenizer(folder / "out"))[:192].view(4, 48)
        calls = []
        handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _module, args, calls=calls: calls.append(args))
        model(input_ids=ids, use_cache=False)
        handle.remove()
        expected = model.model.layers[0].mlp.experts(*calls[0])
        found = truth(folder, "mixtral").model.layers[0].mlp.experts(*calls[0])
        errors[algo] = float((found - expected).norm() / expected.norm())
    assert errors["gptq"] < 0.8 * errors["rtn"], errors


def test_routers_stay_as_they_are_unless_they_are_asked_for(tmp_path):
    gates = [f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)]
    report = quantized(tmp_path, "qwen2_moe", "rtn")
    assert [name for name, reason in report.skipped if reason == "routes tokens to experts"] == gates
    assert not any(layer.name in gates for layer in report.layers)
    asked = recipe_for(tmp_path, "rtn", overrides=(Override(pattern="shared_expert_gate", bits=8),))
    again = quantize(tmp_path / "model", asked, tmp_path / "asked")
    assert [layer.name for layer in again.layers if layer.scheme.startswith("w8")] == gates


def test_what_cannot_be_done_with_experts_is_refused_by_name(tmp_path):
    make_model(tmp_path / "model", "mixtral")
    recipe = recipe_for(tmp_path, "gptq", options={"gptq": {"target": "original"}})
    with pytest.raises(UsageError, match=r"experts\.0\.w1: .*use --target quantized"):
        quantize(tmp_path / "model", recipe, tmp_path / "out")
    make_model(tmp_path / "llama4", "llama4")
    with pytest.raises(PTQError, match=r"experts: is not told .*use --expert-calibration routed"):
        quantize(tmp_path / "llama4", recipe_for(tmp_path, "gptq", expert_calibration="all"), tmp_path / "out")
    for changes in ({"expert_calibration": "some"}, {"min_expert_tokens": -1}):
        with pytest.raises(UsageError, match="expert"):
            recipe_for(tmp_path, "gptq", **changes)


MEASURE = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from test_mixtures import recipe_for
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.memory import peak_memory
from ptqcli.pipeline.pipeline import quantize
from ptqcli.resources import Resources
torch.set_num_threads(1)
folder = Path(sys.argv[1])
quantize(folder / "small", recipe_for(folder, "gptq"), folder / "warm", resources=Resources(batch_size=2))
quantize(folder / "model", recipe_for(folder, "gptq"), folder / "out", resources=Resources(batch_size=2))
skeleton = Skeleton(ModelFolder(folder / "model"))
written = (folder / "out" / "model.safetensors").stat().st_size // len(skeleton.blocks)
print(peak_memory(torch.device("cpu")), max(skeleton.unit_bytes(unit) for unit in skeleton.units), written)
"""


@pytest.mark.slow
def test_memory_grows_by_the_experts_of_one_layer_alone(tmp_path):
    """A layer at work is there twice, as it is stored and with what its codes stand for, and packed beside what is being written.

    A second layer would be 20 % of the rest.
    """
    rest = []
    for count in (8, 64):
        folder = tmp_path / str(count)
        make_model(folder / "small", "mixtral")
        make_model(folder / "model", "mixtral", hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_local_experts=count)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
        peak, layer, written = map(int, done.stdout.split())
        rest.append(peak - 2 * (layer + written))
    assert abs(rest[1] / rest[0] - 1) < 0.1, rest
