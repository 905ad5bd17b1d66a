"""Tuning scales end to end: its gradients beside finite differences, and what the checkpoints that come out are."""

from __future__ import annotations

import copy
import filecmp
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from packed import by_transformers
from tiny import VOCABULARY, make_model, token_ids, write_text
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.cli import tune_scales as command
from ptqcli.errors import UsageError
from ptqcli.finishing.estimate import tuning_work
from ptqcli.finishing.student import Student
from ptqcli.finishing.teacher import Teacher
from ptqcli.finishing.tune_scales import TuneScales, Tuning
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.linears import linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.card import write_measured
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.tuning import LONGEST_WINDOW
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"nsamples": 8, "seqlen": 32, "steps": 6, "lr": 1e-2}


def recipe(folder: Path, **changes: Any) -> Recipe:
    given = {"algo": "rtn", "scheme": "w3a16-g32", "calib": str(folder / "text.txt"), "nsamples": 8, "seqlen": 32, **changes}
    return load_recipe(flags={key: value for key, value in given.items() if value is not None})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checkpoint of it, and a tuned one."""
    folder = tmp_path_factory.mktemp("made")
    write_text(folder / "text.txt")
    make_model(folder / "model", attention_bias=True)
    quantize(folder / "model", recipe(folder), folder / "out")
    ptqcli.tune_scales(folder / "out", output=folder / "tuned", calib=str(folder / "text.txt"), **SHORT)
    return folder


def tuning_of(made: Path, **options: Any) -> Tuning:
    skeleton = Skeleton(ModelFolder(made / "model"))
    teacher = Teacher(skeleton, token_ids(16, 4), torch.float32, Resources(), made)
    student = Student(made / "out", CPU, torch.float32, skeleton.blocks_name, vectors=True)
    return Tuning(student, teacher, TuneScales(**options), batch=2, seed=0)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "ptq_report.json").read_text())
    return report


def changed(one: Path, other: Path) -> set[str]:
    """Tensors that two checkpoints of the same names do not have in common."""
    ours, theirs = SafetensorsFolder(one), SafetensorsFolder(other)
    assert ours.names == theirs.names
    return {name for name in ours.names if not torch.equal(ours.read(name), theirs.read(name))}


# The original's logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "falcon", "gpt_neox"])
def test_the_teacher_gives_the_originals_logits(name: str, tmp_path: Path) -> None:
    """Gemma 2 caps its logits, GPT-2 ties its head, Falcon's blocks return tuples."""
    model, ids = make_model(tmp_path, name), token_ids(16, 5)
    teacher = Teacher(Skeleton(ModelFolder(tmp_path)), ids, torch.float32, Resources(batch_size=2, activation_budget=0), tmp_path)
    chosen = torch.tensor([3, 0, 4])
    torch.testing.assert_close(teacher.logits(chosen), model(input_ids=ids[chosen]).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(teacher.logits(chosen), teacher.logits(chosen.flip(0)), atol=1e-2)


# Gradients


class Exact:
    """The loss in float64, of the original with decoded weights in the place of its own: nothing of the code that is tested.

    For OPT: the norms of models such as Llama compute in float32 whatever they are given, and small differences are lost there.
    """

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self.windows, self.packed = windows, open_checkpoint(folder / "out")
        self.original = AutoModelForCausalLM.from_pretrained(folder / "model").double()
        self.model = copy.deepcopy(self.original)

    @torch.no_grad()
    def loss(self, moved: str, index: tuple[int, ...], by: float) -> float:
        """With one scale changed relatively, or one element of a vector by a share of its root mean square."""
        for name in self.packed.schemes:
            weight = self.packed.weight(name)
            scale = weight.scale.double()
            if name == moved:
                scale[index] *= 1 + by
            groups = scale.shape[1]
            steps = (weight.codes.double() - weight.zero.double().repeat_interleave(weight.codes.shape[1] // groups, 1)).unflatten(
                1, (groups, -1)
            )
            linear_weight(self.model.get_submodule(name)).copy_((steps * scale[..., None]).flatten(1))
        parameters = dict(self.model.named_parameters())
        if moved in parameters:
            before = parameters[moved][index].clone()
            parameters[moved][index] += by * parameters[moved].square().mean().sqrt()
        log_p, log_q = (each(input_ids=self.windows).logits.log_softmax(-1) for each in (self.original, self.model))
        if moved in parameters:
            parameters[moved][index] = before
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    def slope(self, moved: str, index: tuple[int, ...]) -> float:
        return (self.loss(moved, index, 1e-5) - self.loss(moved, index, -1e-5)) / 2e-5


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opt")
    make_model(folder / "model", "opt")
    quantize(folder / "model", load_recipe(flags={"algo": "rtn", "scheme": "w3a16-g32"}), folder / "out")
    return folder


def test_gradients_are_those_of_finite_differences(opt: Path) -> None:
    tuning = tuning_of(opt)
    tuning.add_gradients(torch.arange(4))
    exact, student = Exact(opt, tuning.teacher.windows), tuning.student
    places = [(name, tuned, (1, 1)) for name, tuned in student.scales.items()]
    places += [(name, tuned, (3,)) for name, tuned in student.vectors.items()]
    names = {name.removeprefix("model.decoder.") for name in student.vectors}
    assert {"final_layer_norm.weight", "layers.0.self_attn.q_proj.bias", "layers.1.fc1.bias"} <= names
    slopes = torch.tensor([exact.slope(name, index) for name, _, index in places])
    found = torch.stack([tuned.change.grad[index] for _, tuned, index in places])  # type: ignore[index]
    torch.testing.assert_close(found.double(), slopes.double(), rtol=2e-3, atol=1e-6)
    twin = [exact.slope(name, (0,) * len(index)) for name, _, index in places]  # of the neighbours
    assert (found - torch.tensor(twin)).norm() > 0.1 * slopes.norm()


def test_the_loss_is_that_of_the_whole_vocabulary(opt: Path) -> None:
    tuning = tuning_of(opt)
    expected = Exact(opt, tuning.teacher.windows[tuning.held_out]).loss("", (), 0.0)
    assert tuning.held_out_loss() == pytest.approx(expected, rel=1e-4)


def test_windows_run_one_by_one_or_together(made: Path) -> None:
    together, alone = tuning_of(made), tuning_of(made)
    together.batch, alone.batch = 4, 1
    for tuning in (together, alone):
        tuning.add_gradients(torch.arange(4))
    for one, other in zip(together.student.tuned, alone.student.tuned, strict=True):
        assert one.change.grad is not None
        assert other.change.grad is not None
        torch.testing.assert_close(one.change.grad, other.change.grad, rtol=1e-3, atol=1e-6)


# What comes out


def test_the_work_that_the_plan_tells_is_that_of_the_products(made: Path) -> None:
    tuning = tuning_of(made, steps=12)
    with FlopCounterMode(display=False) as counted:
        tuning.run(lambda step, steps, loss: None)
    windows, seqlen = tuning.teacher.windows.shape
    told = tuning_work(TuneScales(steps=12), Skeleton(ModelFolder(made / "model")), windows, seqlen)
    assert 0.7 * told < counted.get_total_flops() < 1.3 * told


def test_codes_stay_and_scales_gains_and_biases_change(made: Path) -> None:
    found = changed(made / "out", made / "tuned")
    assert {name.rpartition(".")[2] for name in found} == {"weight_scale", "weight", "bias"}
    assert all("norm" in name for name in found if name.endswith(".weight"))
    assert len([name for name in found if name.endswith("weight_scale")]) == len(report_of(made / "out")["layers"])


def test_the_result_is_better_where_it_was_not_trained(made: Path) -> None:
    tuning = report_of(made / "tuned")["tuning"]
    assert tuning["kl_after"] < 0.95 * tuning["kl_before"]
    assert tuning["best_step"] > 0
    assert (tuning["held_out"], tuning["nsamples"]) == (4, 8)
    assert f"{tuning['kl_before']:.5f} before, {tuning['kl_after']:.5f} after" in (made / "tuned" / "README.md").read_text()


def test_the_loss_that_is_told_is_that_of_the_file(made: Path) -> None:
    """A tuning of the tuned checkpoint begins where the first one ended: nothing is lost in rounding and writing."""
    again = ptqcli.tune_scales(made / "tuned", output=made / "again", calib=str(made / "text.txt"), **{**SHORT, "steps": 1})
    assert again.tuning.kl_before == pytest.approx(report_of(made / "tuned")["tuning"]["kl_after"], rel=1e-6)


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16-g32", "w4a16-g32-asym", "w8a8", "w8a8-tensor"])
def test_every_scheme_is_tuned_and_read_by_transformers(made: Path, tmp_path: Path, scheme: str) -> None:
    quantize(made / "model", recipe(made, scheme=scheme), tmp_path / "out")
    result = ptqcli.tune_scales(tmp_path / "out", output=tmp_path / "tuned", calib=str(made / "text.txt"), **{**SHORT, "lr": 3e-3})
    if result.tuning.best_step:
        assert any("scale" in name for name in changed(tmp_path / "out", tmp_path / "tuned"))
    assert result.tuning.kl_after <= result.tuning.kl_before
    assert {name for name in changed(tmp_path / "out", tmp_path / "tuned") if "packed" in name or "zero" in name} == set()
    if scheme.endswith("asym"):
        return  # transformers reads those only with a switch; test_runtime.py compares the two
    with torch.no_grad():
        ours, theirs = (load(tmp_path / "tuned")(input_ids=token_ids()).logits for load in (load_quantized, by_transformers))
    # An input on the edge between two codes falls to either side.
    assert float((ours - theirs).norm() / theirs.norm()) < (2e-2 if "a8" in scheme else 1e-3)


def test_a_rate_at_which_it_diverges_leaves_every_byte(made: Path, tmp_path: Path) -> None:
    result = ptqcli.tune_scales(made / "out", output=tmp_path / "same", calib=str(made / "text.txt"), **{**SHORT, "lr": 100.0})
    assert (result.tuning.best_step, result.tuning.kl_after) == (0, result.tuning.kl_before)
    assert filecmp.cmp(made / "out" / "model.safetensors", tmp_path / "same" / "model.safetensors", shallow=False)
    assert "brought nothing" in (tmp_path / "same" / "README.md").read_text()


def test_the_same_work_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    ptqcli.tune_scales(made / "out", output=tmp_path / "tuned", calib=str(made / "text.txt"), **SHORT)
    for file in (tmp_path / "tuned").iterdir():
        assert filecmp.cmp(file, made / "tuned" / file.name, shallow=False), file.name
    ptqcli.tune_scales(made / "out", output=tmp_path / "other", calib=str(made / "text.txt"), seed=1, **SHORT)
    assert changed(tmp_path / "tuned", tmp_path / "other")


def test_without_norms_only_scales_change(made: Path, tmp_path: Path) -> None:
    ptqcli.tune_scales(made / "out", output=tmp_path / "tuned", calib=str(made / "text.txt"), norms=False, **SHORT)
    assert {name.rpartition(".")[2] for name in changed(made / "out", tmp_path / "tuned")} == {"weight_scale"}


def test_finish_kl_is_the_same_as_tuning_afterwards(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same windows: both give the same tensors."""
    options = TuneScales(steps=SHORT["steps"], lr=SHORT["lr"])
    monkeypatch.setattr("ptqcli.pipeline.pipeline.TuneScales", lambda: options)
    quantize(made / "model", recipe(made, finish="kl"), tmp_path / "at once")
    ptqcli.tune_scales(made / "out", output=tmp_path / "then", calib=str(made / "text.txt"), **SHORT)
    assert changed(tmp_path / "at once", tmp_path / "then") == set()
    assert changed(made / "out", tmp_path / "then")
    assert report_of(tmp_path / "at once")["tuning"] == report_of(tmp_path / "then")["tuning"]
    assert "tuned end to end" in (tmp_path / "at once" / "README.md").read_text()


def test_an_interruption_leaves_nothing(made: Path, tmp_path: Path) -> None:
    class Interrupting(NoProgress):
        def step(self, done: int, total: int, text: str) -> None:
            if done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptqcli.tune_scales(made / "out", output=tmp_path / "new" / "tuned", calib=str(made / "text.txt"), progress=Interrupting(), **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_tuned_checkpoint_is_ours_to_replace_and_the_checkpoint_itself_is_not(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tuned", tmp_path / "tuned")
    text = str(made / "text.txt")
    with pytest.raises(UsageError, match="already exists"):
        ptqcli.tune_scales(made / "out", output=tmp_path / "tuned", calib=text, **SHORT)
    ptqcli.tune_scales(made / "out", output=tmp_path / "tuned", calib=text, overwrite=True, **{**SHORT, "steps": 1})
    assert report_of(tmp_path / "tuned")["tuning"]["steps"] == 1
    for place in (made / "out", made / "model"):
        with pytest.raises(UsageError, match=r"which this run reads|is the model itself"):
            ptqcli.tune_scales(made / "out", output=place, calib=text, overwrite=True, **SHORT)


def test_what_was_measured_goes_where_scales_have_changed(made: Path, tmp_path: Path) -> None:
    quantize(made / "model", recipe(made, adapter_rank=2), tmp_path / "out")
    result = {"bos": False, "seqlen": 32, "stride": 32, "text": "text.txt", "tokens": 64, "perplexity": 77.125}
    for adapter in (False, True):
        write_measured(tmp_path / "out", [result], adapter)
    for name, rate in (("tuned", SHORT["lr"]), ("untouched", 1e6)):  # the latter diverges
        ptqcli.tune_scales(tmp_path / "out", output=tmp_path / name, calib=str(made / "text.txt"), **{**SHORT, "lr": rate})
    titles = {
        name: re.findall("^## .*", (tmp_path / name / "README.md").read_text(), re.MULTILINE) for name in ("out", "tuned", "untouched")
    }
    adapted = ["## Its adapter", "## Measured", "## Measured, with its adapter"]
    rest = [title for title in titles["out"] if title not in adapted]
    assert titles["out"] == [rest[0], *adapted, *rest[1:]]
    assert titles["tuned"] == rest
    assert titles["untouched"] == [rest[0], "## Measured", *rest[1:]]


def test_an_adapter_does_not_go_along(made: Path, tmp_path: Path) -> None:
    quantize(made / "model", recipe(made, adapter_rank=2), tmp_path / "out")
    ptqcli.tune_scales(tmp_path / "out", output=tmp_path / "tuned", calib=str(made / "text.txt"), **{**SHORT, "steps": 1})
    assert (tmp_path / "out" / "adapter").is_dir()
    assert not (tmp_path / "tuned" / "adapter").exists()
    with pytest.raises(UsageError, match="leave one of the two out"):
        recipe(made, adapter_rank=2, finish="kl")


# The command


def test_the_command_says_what_it_does_and_what_came_out(ptq: Ptq, made: Path, tmp_path: Path) -> None:
    flags = ("--calib", made / "text.txt", "--nsamples", "8", "--seqlen", "32", "--steps", "6", "--lr", "0.01")
    answer = ptq("tune-scales", made / "out", "--output", tmp_path / "tuned", *flags)
    assert answer.code == 0, answer.err
    for said in ("in 6 steps", "8 windows of 32 tokens", "memory needed", "before tuning", f"ptq eval {tmp_path / 'tuned'}"):
        assert said in answer.out
    assert "held-out KL" in answer.err
    as_json = json.loads(ptq("tune-scales", made / "out", "--output", tmp_path / "other", "--json", *flags).out)
    assert as_json["tuning"] == report_of(made / "tuned")["tuning"]


REFUSED = {
    "no steps": (("--steps", "0"), "steps 0 is not valid"),
    "a rate below 0": (("--lr", "-1"), "lr -1.0 is not valid"),
    "one window": (("--nsamples", "1"), "half of which are held out"),
    "a window of one token": (("--seqlen", "1"), "seqlen 1 is not valid"),
    "windows that are too long": (("--seqlen", "4096"), "longer than the model's 128 positions"),
    "no such text": (("--calib", "nonsense"), "no text is called 'nonsense'"),
    "no such model": (("--model", "/nowhere/model"), "/nowhere/model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_refused_before_the_work(ptq: Ptq, made: Path, tmp_path: Path, kind: str) -> None:
    flags, said = REFUSED[kind]
    answer = ptq("tune-scales", made / "out", "--output", tmp_path / "tuned", *flags)
    assert answer.code == 2
    assert said in one_line(answer)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(ptq: Ptq, made: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "gpt2", "gpt2")
    for name, changes in (("wide", {"vocab_size": 300}), ("short", {"num_hidden_layers": 1})):
        make_model(tmp_path / name, **changes)
    for name in ("gpt2", "wide", "short"):
        answer = ptq("tune-scales", made / "out", "--model", tmp_path / name, "--output", tmp_path / "tuned")
        assert "so it is not what" in one_line(answer)
    shutil.copytree(made / "out", tmp_path / "orphan")
    (tmp_path / "orphan" / "ptq_report.json").unlink()
    assert "name it with --model" in one_line(ptq("tune-scales", tmp_path / "orphan", "--output", tmp_path / "tuned"))


def test_what_cannot_be_tuned_is_told_before_the_original_is_asked_for(ptq: Ptq, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    quantize(made / "model", recipe(made, scheme="nf4-g32-double", format="bitsandbytes"), tmp_path / "nf4")
    demo = Path(ptqcli.__file__).parent / "demo"
    ptqcli.convert(demo, "gguf", output=tmp_path / "model.gguf", gguf_type="q8_0")
    for folder in (made / "model", tmp_path / "nf4"):
        shutil.copytree(folder, tmp_path / "orphans" / folder.name, ignore=shutil.ignore_patterns("ptq_report.json"))
    for line, said in {
        (tmp_path / "model.gguf",): "scales in a GGUF file are not tuned; tune those of the checkpoint",
        (tmp_path / "orphans" / "model",): "is not quantized; run ptq quantize on it first",
        (tmp_path / "orphans" / "nf4", "--no-norms"): "doubly quantized scales do not move one by one; leave --no-norms out",
    }.items():
        assert said in one_line(ptq("tune-scales", *line, "--output", tmp_path / "tuned"))


def test_shown_defaults_are_those_of_the_method() -> None:
    assert (TuneScales.steps, TuneScales.lr) == (command.STEPS, command.LR)
    assert LONGEST_WINDOW == command.LONGEST_WINDOW
    assert asdict(TuneScales())["norms"] is True


@pytest.mark.slow
def test_the_demo_model_comes_closer_to_its_original(tmp_path: Path) -> None:
    demo = Path(ptqcli.__file__).parent / "demo"
    quantize(demo, load_recipe(flags={"algo": "rtn", "scheme": "w2a16-g64"}), tmp_path / "out")
    result = ptqcli.tune_scales(tmp_path / "out", output=tmp_path / "tuned", nsamples=32, seqlen=128, steps=20, dtype=torch.float32)
    assert result.tuning.kl_after < 0.75 * result.tuning.kl_before


MEMORY = """
import json, sys
from pathlib import Path
from ptqcli.finishing.tune_scales import TuneScales
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.tuning import tune_scales
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources, process_bytes

folder, told = Path(sys.argv[1]), []
request = load_recipe(flags={"algo": "rtn", "calib": str(folder / "text.txt"), "nsamples": 16, "seqlen": 128})
result = tune_scales(
    folder / "out", folder / "tuned", TuneScales(steps=2), request, resources=Resources(), progress=NoProgress(),
    on_plan=lambda plan: told.append((process_bytes(), plan.memory_bytes)),
)
print(json.dumps([*told[0], result.peak_memory_bytes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is that of /proc")
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 32_000])
def test_the_memory_that_is_told_is_the_peak_of_the_process(tmp_path: Path, vocabulary: int) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": vocabulary}
    make_model(tmp_path / "model", dtype=torch.bfloat16, **sizes)
    write_text(tmp_path / "text.txt", 3000)
    quantize(tmp_path / "model", load_recipe(flags={"algo": "rtn"}), tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    before, told, peak = json.loads(done.stdout)
    assert peak - before > 0.25 * peak, "otherwise libraries alone would do for the number"
    assert 0.85 * peak < told < 1.5 * peak, (before, told, peak)


def test_memory_that_does_not_do_is_told_before_the_work(made: Path, ptq: Ptq) -> None:
    answer = ptq("tune-scales", made / "out", "--memory", "1MiB", "--output", made / "never", "--calib", made / "text.txt")
    assert "allowed by --memory; give fewer or shorter windows" in one_line(answer)
    assert answer.code == 1
    assert not (made / "never").exists()


def test_scales_keep_their_signs(made: Path) -> None:
    tuning = tuning_of(made, lr=0.5, steps=3)
    before = {name: tuned.rounded() for name, tuned in tuning.student.scales.items()}
    for _ in range(3):
        tuning.add_gradients(torch.arange(2))
        for tuned in tuning.student.tuned:
            with torch.no_grad():
                tuned.change.add_(-10.0 * torch.sign(tuned.change.grad)).clamp_(-0.5, 0.5)  # type: ignore[arg-type]
    for name, tuned in tuning.student.scales.items():
        assert torch.equal(tuned.rounded().sign(), before[name].sign())
