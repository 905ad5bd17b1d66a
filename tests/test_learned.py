"""Learned rounding from the request to the file: what is learned from, what is kept, where it starts, and what is refused."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import make_model, write_text
from torch import nn

from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline import pipeline, prepare
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized
from ptqcli.solvers import learned
from ptqcli.solvers.autoround import AutoRound
from ptqcli.solvers.learned import BlockLearner, split
from ptqcli.solvers.rounding import Rounding

GIVEN = {"algo": "autoround", "wbits": 2, "group_size": 32, "nsamples": 12, "seqlen": 32, "iters": 12, "learn_batch": 2}


class Watched:
    """What a run has learned: for each window its blocks and the held-out losses, the start's first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[str, ...]] = []
        self.losses: list[list[float]] = []
        self.students: list[learned.Student] = []
        begin, measure = learned._Learning.__init__, learned._Learning.held_out_loss

        def init(this, learner, work, student, batches):
            begin(this, learner, work, student, batches)
            self.windows.append(tuple(path.removeprefix("model.layers.") for path in work.paths))
            self.losses.append([])
            self.students.append(student)

        def held_out_loss(this):
            self.losses[-1].append(measure(this))
            return self.losses[-1][-1]

        monkeypatch.setattr(learned._Learning, "__init__", init)
        monkeypatch.setattr(learned._Learning, "held_out_loss", held_out_loss)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture
def run(tmp_path: Path):
    """Quantize a tiny model; the original, the folder that is written, and its report."""

    def quantized(architecture="llama", name="out", dtype=torch.float32, layers=None, resources=None, **changes):
        shape = {} if layers is None else {"num_hidden_layers": layers}
        original = make_model(tmp_path / "model", architecture, dtype=dtype, **shape)
        recipe = load_recipe(flags={**GIVEN, "calib": str(write_text(tmp_path / "text.txt")), **changes})
        pipeline.quantize(tmp_path / "model", recipe, tmp_path / name, overwrite=True, resources=resources)
        return original, tmp_path / name, json.loads((tmp_path / name / "ptq_report.json").read_text())

    return quantized


def windows_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The calibration windows of the runs to come."""
    kept: list[torch.Tensor] = []
    record = pipeline.record
    monkeypatch.setattr(pipeline, "record", lambda skeleton, windows, *rest: kept.append(windows) or record(skeleton, windows, *rest))
    return kept


def tensors(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def output_error(original: nn.Module, folder: Path) -> float:
    """Of the logits on text like the calibration's, in windows as long, relative."""
    ids = torch.tensor(list(write_text(folder.parent / "held.txt", seed=5).read_bytes()[:512])).view(16, 32)
    expected, found = (model(input_ids=ids).logits for model in (original, load_quantized(folder, kernel="reference", fuse=False)))
    return float((expected - found).norm() / expected.norm())


@pytest.mark.parametrize("version", ["1", "2"])
def test_learning_lowers_the_loss_that_was_never_learned_from(run, watched, version):
    run(autoround_version=version, iters=30)
    assert watched.windows == [("0",), ("1",)]
    for losses in watched.losses:
        assert min(losses[1:]) < 0.9 * losses[0]


def test_the_loss_that_is_kept_is_that_of_the_file(run, watched, monkeypatch):
    """On the two windows held out of twelve, as transformers' hidden states behind the first block have it."""
    kept = windows_of(monkeypatch)
    original, folder, _ = run()
    first, found = (
        model(input_ids=kept[0][10:], output_hidden_states=True, use_cache=False).hidden_states[1].detach()
        for model in (original, load_quantized(folder, kernel="reference", fuse=False))
    )
    assert float((first - found).square().sum(dim=-1).mean()) == pytest.approx(min(watched.losses[0]), rel=1e-4)
    assert min(watched.losses[0]) < 0.95 * watched.losses[0][0]


def test_what_is_placed_is_the_best_on_the_windows_held_out(run, watched, monkeypatch):
    """With a rate at which learning does harm, the start stays, to the last bit."""
    _, folder, _ = run(iters=1, lr=1e-12)
    kept = tensors(folder)
    monkeypatch.setattr(AutoRound, "decay", lambda self, share: -share)  # uphill
    _, folder, _ = run(iters=10, lr=0.5)
    assert all(losses[0] == min(losses) for losses in watched.losses)
    assert tensors(folder) == kept


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run):
    first, second, third = (tensors(run(name=name, learn_seed=seed)[1]) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == second
    assert first != third


def test_windows_overlap_and_each_block_is_placed_once(run, watched):
    original, folder, report = run(layers=4, learn_window=2, start="gptq", wbits=4)
    assert watched.windows == [("0", "1"), ("1", "2"), ("2", "3")]
    assert [layer["name"].split(".")[2] for layer in report["layers"]] == [str(block) for block in range(4) for _ in range(7)]
    for earlier, later in zip(watched.students, watched.students[1:], strict=False):
        again = [name for name in later.layers if name in earlier.layers]
        assert len(again) == 7
        assert all(later.layers[name][1] is earlier.layers[name][1] for name in again), "it goes on from where it stands"
    assert output_error(original, folder) < 1


def test_an_overlapping_window_sees_what_the_quantized_model_gives(run, watched, monkeypatch):
    kept, inputs = windows_of(monkeypatch), []
    solve = BlockLearner.solve

    def looking(self, work):
        inputs.append((torch.cat([batch.inputs for batch in work.batches()]), torch.cat([batch.targets for batch in work.batches()])))
        solve(self, work)

    monkeypatch.setattr(AutoRound, "solve", looking)
    original, folder, _ = run(layers=4, learn_window=2, wbits=3)
    states = [
        model(input_ids=kept[0], output_hidden_states=True, use_cache=False).hidden_states
        for model in (load_quantized(folder, kernel="reference", fuse=False), original)
    ]
    for first, (before, targets) in enumerate(inputs):
        torch.testing.assert_close(before, states[0][first].detach(), rtol=1e-4, atol=1e-4)
        if first + 2 < 4:  # behind the last block transformers gives what the norm makes of it
            torch.testing.assert_close(targets, states[1][first + 2].detach(), rtol=1e-4, atol=1e-4)
    assert (inputs[1][0] - states[1][1]).abs().max() > 1e-3, "the streams must differ for this to prove anything"


@pytest.mark.parametrize("algorithm", ["autoround", "flexround", "omniquant", "awq+autoround"])
def test_every_method_learns_and_is_read_back(run, watched, algorithm):
    original, folder, _ = run(algo=algorithm, wbits=3, iters=8, lr=0.3 if algorithm == "omniquant" else None)
    assert output_error(original, folder) < 1
    assert all(len(losses) > 1 for losses in watched.losses)
    assert any(min(losses) < losses[0] for losses in watched.losses)


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "qwen2", "bloom")), "gemma3"]
)
def test_other_architectures(run, watched, architecture):
    """Transposed matrices, biases, masks that hold for one batch size only, blocks that are not called alike."""
    original, folder, _ = run(architecture, wbits=4, iters=6, start="gptq")
    assert output_error(original, folder) < 1


@pytest.mark.parametrize("changes", [{"abits": 8}, {"abits": 8, "act_scales": "static"}, {"symmetric": False}], ids=str)
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_other_schemes(run, watched, changes, start):
    bits = {"wbits": 8, "group_size": -1} if "abits" in changes else {"wbits": 4}
    original, folder, _ = run(**bits, **changes, start=start)
    assert output_error(original, folder) < 0.7


def test_hidden_states_in_bfloat16(run, watched):
    original, folder, _ = run(dtype=torch.bfloat16, iters=20, wbits=4)
    for losses in watched.losses:
        assert min(losses[1:]) < 0.95 * losses[0]
    assert output_error(original, folder) < 0.5


def test_inputs_that_are_never_activated_and_groups_of_zeros_are_counted(run, tmp_path, monkeypatch):
    make = make_model

    def dead(*args, **kwargs):
        model = make(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[:32] = 0
            model.model.layers[1].mlp.up_proj.weight[:, :32] = 0
        model.save_pretrained(tmp_path / "model")
        return model

    monkeypatch.setitem(globals(), "make_model", dead)
    layers = {layer["name"]: layer for layer in run(start="rtn")[2]["layers"]}
    assert layers["model.layers.0.self_attn.q_proj"]["never_activated"] == 32
    assert layers["model.layers.1.mlp.up_proj"]["zero_groups"] == 128
    assert layers["model.layers.1.mlp.gate_proj"]["zero_groups"] == 0


def test_a_linear_that_nothing_reads_keeps_its_start(run, monkeypatch):
    """Its output gets no gradient: neither an error nor a change."""
    original = AutoRound.rounding
    seen: dict[str, Rounding] = {}

    def remember(self, start):
        seen[start.task.name] = original(self, start)
        return seen[start.task.name]

    forward = nn.Module.__call__

    def without_values(module, *args, **kwargs):
        out = forward(module, *args, **kwargs)
        return out.detach() if getattr(module, "unread", False) else out

    monkeypatch.setattr(AutoRound, "rounding", remember)
    monkeypatch.setattr(nn.Module, "__call__", without_values)
    student = learned.Student.__init__

    def init(self, work, roundings):
        student(self, work, roundings)
        self.layers[next(name for name in self.layers if name.endswith("k_proj"))][0].unread = True

    monkeypatch.setattr(learned.Student, "__init__", init)
    run(iters=4)
    moved = {name: bool(rounding.offset.detach().any()) for name, rounding in seen.items()}
    assert [name.split(".")[-1] for name, has in moved.items() if not has] == ["k_proj", "k_proj"]


def test_a_block_that_stays_as_it_is_is_passed_by(run, watched):
    _, _, report = run(layers=3, ignore=(r"layers\.1\.",))
    assert watched.windows == [("0",), ("2",)]
    assert {layer["name"].split(".")[2] for layer in report["layers"]} == {"0", "2"}


def test_a_loss_that_is_not_finite_is_refused_by_name(run, monkeypatch, tmp_path):
    loss = AutoRound.loss
    monkeypatch.setattr(AutoRound, "loss", lambda self, output, target, bits: loss(self, output, target, bits) * float("nan"))
    with pytest.raises(PTQError, match=r"model\.layers\.0: the output is not finite while autoround learns; lower --lr"):
        run()
    assert not (tmp_path / "out").exists()


def test_outlier_columns_are_refused_by_name():
    recipe = Recipe(algo="llm-int8+autoround")
    assert "outlier columns" in recipe.solver().refusal(recipe.default_scheme)


def test_the_plan_refuses_what_the_solver_refuses(run):
    with pytest.raises(UsageError, match=r"model\.layers\.0\S+: autoround does not learn beside outlier columns; give --outliers none"):
        run(algo="llm-int8+autoround", wbits=None, group_size=None)


def test_one_window_is_learned_from_without_a_choice_and_that_is_said(run, watched, tmp_path):
    run(nsamples=1, iters=5)
    assert AutoRound().notes(1) == ["with one calibration window autoround can hold none out, and keeps its last iteration, good or bad"]
    assert AutoRound().notes(2) == []


class Batches:
    """What ``split`` looks at."""

    def __init__(self, sizes: list[int], mixes: bool) -> None:
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        self.windows = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.mixes = mixes


def drawn(steps: Iterator[list[list[int]]], count: int) -> list[list[int]]:
    return [[window for windows in step for window in windows] for step in islice(steps, count)]


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("sizes, size", [([8] * 16, 8), ([2] * 64, 8), ([4, 4, 4, 3], 4), ([1] * 5, 8), ([2, 1], 2)])
def test_held_out_windows_are_never_drawn_and_all_others_are(sizes, size, mixes):
    batches = Batches(sizes, mixes)
    held, steps = split(batches, 0, size)
    kept = {window for windows in held for window in windows}
    assert kept
    assert len(kept) <= max(16, max(sizes))
    found = drawn(steps, 200)
    assert {window for step in found for window in step} == set(range(sum(sizes))) - kept
    assert {len(step) for step in found} == {sizes[0] * max(1, size // sizes[0])}
    assert drawn(split(batches, 0, size)[1], 50) == found[:50]
    if len(sizes) > 3:
        assert drawn(split(batches, 1, size)[1], 50) != found[:50]
    if not mixes:
        assert all(
            tuple(part) in {tuple(windows) for windows in batches.windows}
            for step in islice(split(batches, 0, size)[1], 9)
            for part in step
        )


def test_of_one_batch_nothing_is_held_out():
    held, steps = split(Batches([6], True), 0, 8)
    assert held == []
    assert sorted(drawn(steps, 1)[0]) == list(range(6))


def test_the_plan_counts_what_learning_holds(tmp_path):
    """Twice the window holds twice as much, and more than a solver that does not learn."""
    learner = AutoRound(learn_window=2)
    assert learner.window_bytes(1000, 10, 7) == 5 * 1000 * 4 + 2 * 10 * 7 * 4
    make_model(tmp_path / "model", num_hidden_layers=3)
    found = {}
    for name, changes in {"gptq": {"algo": "gptq", "iters": None, "learn_batch": None}, "one": {}, "two": {"learn_window": 2}}.items():
        flags = {key: value for key, value in {**GIVEN, "calib": "builtin", **changes}.items() if value is not None}
        found[name] = prepare.plan_run(tmp_path / "model", load_recipe(flags=flags), Resources(batch_size=2))[1].memory_bytes
    assert found["gptq"] < found["one"] < found["two"]
