"""A solver, a transform and a format of a package of its own, built and installed by pip, beside one that is broken.

One process of its own has the package on its path and runs all command lines; what it wrote is compared with computations of this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from commandline import Answer, one_line
from safetensors import safe_open
from tiny import make_model, write_text
from torch import Tensor
from transformers import AutoTokenizer

import ptqcli
from ptqcli.calibration.text import calibration_windows, documents

SOLVER = '''"""Round to nearest in a shrunk range, then descend, column by column, to codes of less squared output error."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ptqcli.errors import UsageError
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import Clipped
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.options import option
from ptqcli.solvers import MatrixSolver, Solution, SolveNotes, ignore_progress


@dataclass(frozen=True)
class Descent(MatrixSolver):
    name: ClassVar[str] = "descent"
    summary: ClassVar[str] = "coordinate descent on the output error"
    needs_hessian: ClassVar[bool] = True
    shrink: float = option(1.0, "share of the largest weight that the grid reaches")
    sweeps: int = option(1, "passes over the columns")

    def __post_init__(self):
        if not 0 < self.shrink <= 1:
            raise UsageError(f"shrink {self.shrink} is out of range; give more than 0 and at most 1")

    def solve(self, weight, hessian, scheme, scale_dtype, ranges=None, progress=ignore_progress):
        columns = weight.shape[1]
        largest = weight.unflatten(1, (scheme.group_count(columns), -1)).abs().amax(2)  # [out, groups]
        start = round_to_nearest(weight, scheme, scale_dtype, ranges or Clipped(largest * self.shrink))
        codes, missing = start.codes.float(), weight - start.dequantize(torch.float32)
        for column in list(range(columns)) * self.sweeps:
            group = column * start.scale.shape[1] // columns
            grid = Grid(scheme.element, start.scale[:, group].float(), start.zero[:, group].float())
            pull = missing @ hessian.matrix[:, column] / hessian.matrix[column, column].clamp(min=1e-12)
            codes[:, column] = grid.nearest(grid.decode(codes[:, column]) + pull)
            missing[:, column] = weight[:, column] - grid.decode(codes[:, column])
        return Solution(replace(start, codes=codes.to(torch.uint8)), SolveNotes())
'''
TRANSFORM = """from dataclasses import dataclass
from typing import ClassVar

import torch

from ptqcli.options import option
from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldNote


@dataclass(frozen=True)
class Evenly(BlockTransform):
    name: ClassVar[str] = "evenly"
    summary: ClassVar[str] = "the same scale for all channels"
    evenly_by: float = option(2.0, "the scale")

    def apply(self, block):
        folds = [fold for fold in block.folds if block.readers(fold)]
        for fold in folds:
            block.scale(fold, torch.full((fold.width,), self.evenly_by))
        return [FoldNote(producer=fold.producer, readers=fold.readers, choice=f"by {self.evenly_by:g}") for fold in folds]
"""
FORMAT = '''"""Signed codes, a byte each, and scales: ``m.signed`` int8 [out, in], ``m.steps`` [out, groups]."""

import torch

from ptqcli.formats import Format
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight


class SignedBytes(Format):
    name = "signed-bytes"

    def refusal(self, spec):
        held = spec.scheme.symmetric and spec.scheme.activations is None and not spec.moving_groups
        return None if held else f"signed-bytes holds symmetric weights alone, not {spec.scheme}"

    def stored_bytes(self, spec):
        return spec.out_features * (spec.in_features + spec.scheme.group_count(spec.in_features) * spec.scale_dtype.itemsize)

    def tensor_names(self, name, scheme):
        return f"{name}.signed", f"{name}.steps"

    def pack(self, name, weight):
        signed = (weight.codes.short() - weight.scheme.middle).to(torch.int8)
        return {f"{name}.signed": signed, f"{name}.steps": weight.scale}

    def unpack(self, name, read, scheme):
        steps = read(f"{name}.steps")
        codes = (read(f"{name}.signed").short() + scheme.middle).to(torch.uint8)
        zero = torch.full_like(steps, scheme.middle, dtype=torch.uint8)
        return QuantizedWeight(codes=codes, scale=steps, zero=zero, scheme=scheme)

    def describe(self, specs, untouched):
        linears = {spec.name: str(spec.scheme) for spec in specs}
        return {"config.json": {"quantization_config": {"quant_method": self.name, "linears": linears}}}

    def schemes(self, config, tensors, linears):
        return {name: Scheme.parse(config["linears"][name]) for name in linears if name in config["linears"]}

    def stored_linears(self, names):
        return [name.removesuffix(".signed") for name in names if name.endswith(".signed")]


SIGNED_BYTES = SignedBytes()
'''
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""
ENTRIES = """
[project.entry-points."ptqcli.solvers"]
descent = "descending.solver:Descent"

[project.entry-points."ptqcli.transforms"]
evenly = "descending.transform:Evenly"

[project.entry-points."ptqcli.formats"]
signed-bytes = "descending.format:SIGNED_BYTES"
"""
BROKEN_ENTRIES = """
[project.entry-points."ptqcli.solvers"]
torn = "torn_apart.solver:Torn"

[project.entry-points."ptqcli.formats"]
torn-bytes = "torn_apart.format:TORN"
"""
# Runs the command lines that stand on stdin and prints what each answered.
DRIVER = """
import contextlib, io, json, sys
from ptqcli.cli import run

answers = []
for line in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(line)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
WINDOWS, SEQLEN, GROUP = 4, 48, 32
RUN = ["--wbits", "4", "--group-size", str(GROUP), "--nsamples", str(WINDOWS), "--seqlen", str(SEQLEN), "--calib", "text.txt", "--json"]
RECIPE = {"algo": "descent", "format": "signed-bytes", "descent": {"shrink": 0.8, "sweeps": 0}}
LINES = {
    "algorithms": "algorithms --json",
    "algorithms as a table": "algorithms",
    "help": "quantize --help",
    "plain": "quantize model --algo descent --shrink 0.5 --set descent.sweeps=0 --output plain",
    "from YAML": "quantize model --recipe recipe.yaml --output written",
    "swept": "quantize model --algo descent --format signed-bytes --output swept",
    "transformed": "quantize model --algo evenly+descent --evenly-by 4 --format signed-bytes --output transformed",
    "both": "quantize model --algo descent --shrink 0.5 --set descent.shrink=0.5",
    "of another": "quantize model --algo rtn --shrink 0.5",
    "unknown": "quantize model --algo descent --set descent.shrnk=0.5",
    "of another type": "quantize model --algo descent --set descent.sweeps=many",
    "out of range": "quantize model --algo descent --shrink 1.5",
    "not held": "quantize model --algo rtn --asym --format signed-bytes --output never",
    "unknown format": "quantize model --algo rtn --format zip --output never",
    "torn": "quantize model --algo torn",
    "torn format": "quantize model --algo rtn --format torn-bytes --output never",
    "inspect": "inspect written --json",
    "eval": "eval written --ppl text.txt --seqlen 64 --json",
    "generate": "generate written the --max-new-tokens 3",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Bench(NamedTuple):
    folder: Path
    model: Any
    answers: dict[str, Answer]


def write_package(folder: Path, name: str, module: str, entries: str, **files: str) -> Path:
    (folder / name / module).mkdir(parents=True)
    (folder / name / "pyproject.toml").write_text(PROJECT.format(name=name, module=module) + entries)
    for file, text in {"__init__": "", **files}.items():
        (folder / name / module / f"{file}.py").write_text(text)
    return folder / name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Both packages installed, a model, and what every command line answered."""
    folder = tmp_path_factory.mktemp("plugins")
    files = {"solver": SOLVER, "transform": TRANSFORM, "format": FORMAT}
    packages = [
        write_package(folder, "gradual-descent", "descending", ENTRIES, **files),
        write_package(folder, "torn-package", "torn_apart", BROKEN_ENTRIES, solver="import no_such_module", format="1 / 0"),
    ]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(folder / "site"), *map(str, packages)], capture_output=True, timeout=300, check=True)
    model = make_model(folder / "model")
    write_text(folder / "text.txt", words=600)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    lines = [line.split() + (RUN if line.startswith("quantize model") else []) for line in LINES.values()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(lines),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "site"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]
    return Bench(folder, model, dict(zip(LINES, answers, strict=True)))


def stored(folder: Path, *names: str) -> list[Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in names]


def shrunk(weight: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Signed 4-bit codes [out, in] and scales [out, groups] of rounding to nearest in a range ``shrink`` as wide as the weights', whose
    lowest code has the sign of the largest.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = -shrink * groups.gather(2, groups.abs().argmax(2, keepdim=True)) / 8
    return (groups / scale).round().clamp(-8, 7).reshape(weight.shape).to(torch.int8), scale.squeeze(2)


# Solver


def test_the_solver_is_short() -> None:
    assert len(SOLVER.splitlines()) <= 40


def test_parts_are_listed_with_their_package_and_options(bench: Bench) -> None:
    found = {part["name"]: part for part in json.loads(bench.answers["algorithms"].out)["parts"]}
    for name, kind in (("descent", "solver"), ("evenly", "transform")):
        assert (found[name]["from"], found[name]["kind"], found[name]["error"]) == ("gradual-descent", kind, None)
    shown = {option["name"]: (option["flag"], option["default"]) for option in found["descent"]["options"]}
    assert shown == {"shrink": ("--shrink", 1.0), "sweeps": ("--sweeps", 1)}
    text = " ".join(bench.answers["help"].out.split())
    assert "options of descent: --shrink X Share of the largest weight that the grid reaches." in text
    assert re.search("options of evenly: .* The scale", text)
    assert "signed-bytes" in text


@pytest.mark.parametrize("line, shrink", [("plain", 0.5), ("from YAML", 0.8)])
def test_options_reach_the_codes(bench: Bench, line: str, shrink: float) -> None:
    """By flag and ``--set``, stored in the format that is the default, and by a section of a recipe."""
    answer = bench.answers[line]
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["recipe"]["options"] == {"descent": {"shrink": shrink, "sweeps": 0}}
    opened = ptqcli.open_checkpoint(bench.folder / "plain") if line == "plain" else None
    for name, module in bench.model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        path = f"model.layers.{name}"
        codes, scale = shrunk(module.weight.data, shrink)
        if opened is None:
            found, steps = stored(bench.folder / "written", f"{path}.signed", f"{path}.steps")
        else:
            found, steps = (opened.weight(path).codes.short() - 8).to(torch.int8), opened.weight(path).scale
        assert torch.equal(found, codes)
        assert torch.allclose(steps, scale, rtol=1e-6)


def test_the_descent_is_that_of_trying_every_code(bench: Bench) -> None:
    """With the inputs that transformers shows: for each column, of all sixteen codes the one of the least squared output error."""
    assert bench.answers["swept"].code == 0, bench.answers["swept"].err
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    windows = calibration_windows(documents(str(bench.folder / "text.txt"), "calibration", None), tokenizer, WINDOWS, SEQLEN, 0)
    seen: list[Tensor] = []
    hook = bench.model.get_submodule(Q_PROJ).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        bench.model(torch.as_tensor(windows))
    hook.remove()
    inputs = torch.cat(seen).flatten(0, 1).double()  # [tokens, in]
    weight = bench.model.get_submodule(Q_PROJ).weight.data
    codes, scale = (part.double() for part in shrunk(weight, 1.0))
    rounded = codes.clone()
    scale = scale.repeat_interleave(GROUP, dim=1)
    for column in range(weight.shape[1]):
        rest = (weight.double() - codes * scale).index_fill(1, torch.tensor([column]), 0) @ inputs.T  # [out, tokens]
        tried = weight[:, column].double() - torch.arange(-8.0, 8)[:, None] * scale[:, column]  # [codes, out]
        errors = (rest + tried[..., None] * inputs[:, column]).square().sum(2)  # [codes, out]
        codes[:, column] = errors.argmin(0) - 8.0
    [found] = stored(bench.folder / "swept", f"{Q_PROJ}.signed")
    assert torch.equal(found.double(), codes)
    assert (codes != rounded).sum() > 50


def test_a_transform_of_another_package_works_in_front_of_it(bench: Bench) -> None:
    """It divides the norms and multiplies the weights by powers of two, so that the codes stay and the steps do not."""
    answer = bench.answers["transformed"]
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["recipe"]["options"]["evenly"] == {"evenly_by": 4.0}
    assert ["evenly", "by 4", None] in [choice for fold in json.loads(answer.out)["folds"] for choice in fold["choices"]]
    names = [f"{Q_PROJ}.signed", f"{Q_PROJ}.steps", "model.layers.0.input_layernorm.weight"]
    codes, steps, norm = stored(bench.folder / "swept", *names)
    transformed_codes, transformed_steps, transformed_norm = stored(bench.folder / "transformed", *names)
    assert torch.equal(transformed_codes, codes)
    assert torch.equal(transformed_steps, steps * 4)
    assert torch.equal(transformed_norm, norm / 4)


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("both", 2, "descent.shrink is given twice"),
        ("of another", 2, "shrink belongs to descent, not to rtn; leave it out"),
        ("unknown", 2, "descent has no option 'shrnk'; its options are shrink, sweeps"),
        ("of another type", 2, "sweeps must be int, not 'many'"),
        ("out of range", 2, "shrink 1.5 is out of range"),
        ("not held", 2, "signed-bytes holds symmetric weights alone, not w4a16-g32-asym"),
        (
            "unknown format",
            2,
            "format 'zip' is unknown; use compressed-tensors, gptq, gptq_v2, awq, awq_gemv, bitsandbytes, gguf, signed-bytes, torn-bytes",
        ),
        ("torn", 1, "torn of the package torn-package cannot be used: ModuleNotFoundError: No module named 'no_such_module'"),
        ("torn format", 1, "format 'torn-bytes' of the package torn-package cannot be loaded: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_refused_by_name(bench: Bench, line: str, code: int, says: str) -> None:
    assert bench.answers[line].code == code
    assert says in one_line(bench.answers[line])


def test_a_broken_package_is_shown_and_stops_nothing(bench: Bench) -> None:
    found = {part["name"]: part for part in json.loads(bench.answers["algorithms"].out)["parts"]}
    assert found["torn"]["from"] == "torn-package"
    assert "No module named 'no_such_module'" in found["torn"]["error"]
    assert all(part["error"] is None for name, part in found.items() if name != "torn")
    assert "No module named 'no_such_module'" in " ".join(bench.answers["algorithms as a table"].out.split())


# Format


def test_the_format_is_inspected_evaluated_and_run(bench: Bench) -> None:
    inspected = json.loads(bench.answers["inspect"].out)
    assert {layer["scheme"] for layer in inspected["layers"]} == {"w4a16-g32"}
    assert len(inspected["layers"]) == 14
    assert inspected["layers"][0]["bytes"] == 64 * (64 + 2 * 4)
    assert bench.answers["generate"].code == 0, bench.answers["generate"].err
    [result] = json.loads(bench.answers["eval"].out)["results"]
    assert result["mean_kl"] > 0


def test_a_checkpoint_of_the_format_is_a_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits and its perplexity are those of the original with its weights rounded by hand."""
    monkeypatch.syspath_prepend(bench.folder / "site")
    model = ptqcli.load_quantized(bench.folder / "written")
    by_hand = make_model(bench.folder / "by hand")
    with torch.no_grad():
        for module in by_hand.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                codes, scale = shrunk(module.weight, 0.8)
                module.weight.copy_(codes * scale.repeat_interleave(GROUP, dim=1))
        ids = torch.arange(40)[None]
        assert torch.allclose(model(ids).logits, by_hand(ids).logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model(ids).logits, bench.model(ids).logits, rtol=1e-3, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    text = str(bench.folder / "text.txt")
    [expected] = ptqcli.evaluate(by_hand, text, tokenizer=tokenizer, seqlen=64)
    found = json.loads(bench.answers["eval"].out)["results"][0]
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
