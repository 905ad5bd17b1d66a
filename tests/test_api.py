"""What ``import ptqcli`` offers: the functions against the parts that they are made of, a model in memory against its folder."""

from __future__ import annotations

import filecmp
import gc
import inspect
import json
import pydoc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from commandline import Ptq
from tiny import byte_tokenizer, make_model, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ptqcli
from ptqcli import PTQError, Recipe, Report, Scheme, UsageError
from ptqcli.api import _recipe
from ptqcli.calibration.statistics import Hessian
from ptqcli.model.config import build_on_meta, load_config
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.recipe import Override
from ptqcli.recipe_loading import load_recipe
from ptqcli.runtime import models
from ptqcli.shipped import shipped_recipes
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.rtn import RTN

PACKAGE = Path(ptqcli.__file__).parent
SHORT = {"nsamples": 4, "seqlen": 48}
CLASSES = {"PTQError", "UsageError", "Recipe", "Report", "Scheme"}
PUBLIC = CLASSES | {"convert", "evaluate", "load_quantized", "measure_sensitivity", "open_checkpoint", "quantize", "solve", "tune_scales"}


@dataclass
class Workshop:
    """A model in its folder and in memory, a text, and the checkpoint that ``quantize`` made of the folder."""

    folder: Path
    model: PreTrainedModel
    report: Report

    @property
    def source(self) -> Path:
        return self.folder / "model"

    @property
    def done(self) -> Path:
        return self.folder / "done"

    @property
    def text(self) -> str:
        return str(self.folder / "text.txt")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("api")
    model = make_model(folder / "model")
    text = write_text(folder / "text.txt", words=600)
    report = ptqcli.quantize(folder / "model", output=folder / "done", algo="rtn", scheme="w4a16-g32", **SHORT, calib=str(text))
    return Workshop(folder, model, report)


def tensors_equal(left: Path, right: Path) -> bool:
    return filecmp.cmp(left / "model.safetensors", right / "model.safetensors", shallow=False)


# The surface


def test_dir_lists_the_public_names() -> None:
    assert {name for name in dir(ptqcli) if not name.startswith("_")} == set(ptqcli.__all__) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        ptqcli.quantise  # noqa: B018


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_no_module_takes_the_place_of_a_public_name(name: str) -> None:
    """Importing ``ptqcli.x`` makes ``x`` an attribute of the package, whatever ``__getattr__`` would say."""
    assert not (PACKAGE / name).exists()
    assert not (PACKAGE / f"{name}.py").exists()
    assert callable(getattr(ptqcli, name))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_help_names_every_parameter_and_what_is_raised(name: str) -> None:
    what = getattr(ptqcli, name)
    text = inspect.getdoc(what) or ""
    assert len(text) > 20
    if name.endswith("Error"):
        return
    unnamed = [parameter for parameter in inspect.signature(what).parameters if parameter not in text]
    assert unnamed == []
    assert "Raises" in text or what is Report
    assert f"{name}(" in pydoc.plain(pydoc.render_doc(ptqcli))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ptqcli; dir(ptqcli); ptqcli.Recipe; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


# Requests


def test_changes_mean_what_they_mean_in_a_file(tmp_path: Path) -> None:
    start = {"algo": "gptq", "wbits": 3, "group_size": 32, "gptq": {"damp": 0.5, "act_order": False}, "nsamples": 4}
    file = tmp_path / "start.yaml"
    file.write_text(yaml.safe_dump(start))
    written = load_recipe(file)
    changes: list[dict[str, Any]] = [
        {},
        {"damp": 0.1},
        {"gptq": {"damp": 0.1}},
        {"options": {"gptq": {"damp": 0.1}}},
        {"scheme": "w8a16"},
        {"wbits": 8, "seed": 3},
        {"ignore": ["q_proj"], "overrides": [{"pattern": "down", "bits": 8}]},
    ]
    for change in changes:
        assert _recipe(written, change) == _recipe(file, change) == load_recipe(file, change)
    assert _recipe(written, {"damp": 0.1}).options == {"gptq": {"damp": 0.1, "act_order": False}}
    assert _recipe(written, {"scheme": "w8a16"}).default_scheme == Scheme.parse("w8a16")
    assert _recipe(replace(written, overrides=(Override("up", skip=True),)), {"seed": 1}).overrides == (Override("up", skip=True),)
    assert written.options == {"gptq": {"damp": 0.5, "act_order": False}}
    for name, path in shipped_recipes().items():
        assert _recipe(name, {}) == load_recipe(path)


@pytest.mark.parametrize(
    "recipe, changes, message",
    [
        ("w4a16-gtpq", {}, "recipe 'w4a16-gtpq' is neither a file nor one of those that come along; did you mean 'w4a16-gptq'?"),
        (Recipe(), {"dmp": 0.1}, "unknown key 'dmp'; the keys are abits"),
        (Recipe(), {"wbits": "four"}, "'wbits' must be int, not 'four'"),
        (Recipe(algo="rtn"), {"damp": 0.1}, "damp belongs to gptq, obq, autoround and flexround, not to rtn; leave it out"),
        (Recipe(options={"gptq": {"damp": 0.1}}), {"algo": "rtn"}, "gptq.damp belongs to gptq, not to rtn; leave it out"),
        ({"wbits": 4}, {}, "a recipe is a Recipe, a name or a YAML file, not dict; give single keys by name"),
        (Recipe(), {"calib": ""}, "calib is empty"),
        (None, {"device": "gpu"}, "device 'gpu' is unknown; use cpu, cuda or cuda:N"),
        (None, {"device": None}, "device None is unknown"),
        (None, {"device": f"cuda:{torch.cuda.device_count()}"}, "is not on this machine"),
        (None, {"dtype": "float32"}, "dtype 'float32' is not valid; give a floating dtype"),
        (None, {"dtype": torch.int8}, "dtype torch.int8 is not valid"),
        (None, {"batch_size": 0}, "batch size 0 is not valid"),
        (None, {"batch_size": "4"}, "batch size '4' is not valid"),
        (None, {"activation_budget": -1}, "activation budget -1 is not valid"),
        (None, {"activation_budget": "4"}, "activation budget '4' is not valid"),
        (Recipe(scheme="w4a16"), {"wbits": 8}, "scheme w4a16 says what the numbers are, so leave wbits out"),
    ],
)
def test_a_request_that_cannot_work_is_refused(
    workshop: Workshop, tmp_path: Path, recipe: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        ptqcli.quantize(workshop.source, recipe, output=tmp_path / "out", **changes)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Quantizing


def test_a_folder_as_text_with_a_recipe_by_name_is_one_as_a_path_with_a_recipe(workshop: Workshop, tmp_path: Path) -> None:
    """And as the command line's."""
    changes = {"group_size": 32, "damp": 0.1, "calib": workshop.text, **SHORT}
    report = ptqcli.quantize(str(workshop.source), "w3a16-gptq", output=str(tmp_path / "text"), **changes)
    assert isinstance(report, Report)
    assert report.source == str(workshop.source.resolve())
    assert {layer.scheme for layer in report.layers} == {"w3a16-g32"}
    assert report.recipe["options"]["gptq"]["damp"] == 0.1
    recipe = Recipe(wbits=3, group_size=32, options={"gptq": {"damp": 0.1}}, calib=workshop.text, **SHORT)  # type: ignore[arg-type]
    ptqcli.quantize(workshop.source, recipe, output=tmp_path / "path")
    assert tensors_equal(tmp_path / "text", tmp_path / "path")
    ptqcli.quantize(workshop.source, recipe, output=tmp_path / "other", damp=1.0)
    assert not tensors_equal(tmp_path / "text", tmp_path / "other")
    with pytest.raises(UsageError, match="overwrite"):
        ptqcli.quantize(workshop.source, recipe, output=tmp_path / "path")
    ptqcli.quantize(workshop.source, recipe, output=tmp_path / "path", overwrite=True)


@pytest.mark.parametrize("algo", ["gptq", "awq+rtn"])
@pytest.mark.parametrize("tied, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_a_model_in_memory_gives_the_bytes_of_its_folder(tmp_path: Path, algo: str, tied: bool, dtype: torch.dtype) -> None:
    make_model(tmp_path / "model", "llama", dtype, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").train()
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    text = write_text(tmp_path / "text.txt", words=600)
    changes = {"algo": algo, "wbits": 4, "group_size": 32, "calib": str(text), **SHORT}
    from_folder = ptqcli.quantize(tmp_path / "model", output=tmp_path / "folder", **changes)
    report = ptqcli.quantize(model, output=tmp_path / "memory", tokenizer=byte_tokenizer(), **changes)

    assert tensors_equal(tmp_path / "folder", tmp_path / "memory")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "memory" / file).read_text()) == json.loads((tmp_path / "folder" / file).read_text())
    assert (report.layers, report.bytes_before, report.source) == (from_folder.layers, from_folder.bytes_before, None)
    assert model.training
    assert model.config.to_dict() == config
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items())


def test_a_model_in_memory_without_a_tokenizer(workshop: Workshop, tmp_path: Path, ptq: Ptq) -> None:
    """It is missed only where there is text to read."""
    with pytest.raises(PTQError, match="the model in memory needs its tokenizer for the calibration text; give tokenizer="):
        ptqcli.quantize(workshop.model, output=tmp_path / "out", algo="gptq", group_size=32, calib=workshop.text, **SHORT)
    assert list(tmp_path.iterdir()) == []
    ptqcli.quantize(workshop.model, output=tmp_path / "out", algo="rtn", scheme="w4a16-g32")
    assert tensors_equal(tmp_path / "out", workshop.done)
    assert "made from     a model in memory" in ptq("inspect", tmp_path / "out").out


def test_what_is_no_model_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    refused: list[tuple[Any, Any, type[Exception], str]] = [
        (workshop.source, byte_tokenizer(), UsageError, "tokenizer belongs to a model in memory; a folder has its own"),
        (tmp_path / "absent", None, UsageError, "no such folder"),
        ({"weights": 1}, None, UsageError, "a model is a folder, a hub id or a model of transformers, not dict"),
        (ptqcli.load_quantized(workshop.done), byte_tokenizer(), PTQError, "the model in memory is quantized already"),
        (workshop.done, None, UsageError, "quantized already"),
    ]
    for model, tokenizer, kind, message in refused:
        with pytest.raises(kind, match=message):
            ptqcli.quantize(model, output=tmp_path / "out", tokenizer=tokenizer, algo="rtn")


def test_threads_build_models_one_after_the_other(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []

    @contextmanager
    def watched(**_: Any) -> Iterator[None]:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.05)
        yield
        inside.pop()

    monkeypatch.setattr(accelerate, "init_empty_weights", watched)
    config = load_config(workshop.source)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: build_on_meta(config), range(3)))
    assert most == [1, 1, 1]


# Evaluating


def test_evaluate_compares_with_the_model_that_the_report_names(workshop: Workshop, ptq: Ptq) -> None:
    other = str(write_text(workshop.folder / "other.txt", words=300, seed=5))
    first, second = ptqcli.evaluate(workshop.done, [workshop.text, other], seqlen=64)
    assert (first.text, second.text) == (workshop.text, other)
    assert first.tokens > second.tokens
    [original] = ptqcli.evaluate(str(workshop.source), Path(workshop.text), seqlen=64)
    assert original.mean_kl is None
    assert first.baseline_perplexity == pytest.approx(original.perplexity, rel=1e-6)
    assert first.mean_kl is not None
    assert first.mean_kl > 0
    shown = json.loads(ptq("eval", workshop.done, "--ppl", workshop.text, "--seqlen", "64", "--json").out)["results"][0]
    assert shown["perplexity"] == first.perplexity
    assert shown["mean_kl"] == first.mean_kl


def test_evaluate_takes_models_in_memory(workshop: Workshop) -> None:
    packed, tokenizer = ptqcli.load_quantized(workshop.done), byte_tokenizer()
    [expected] = ptqcli.evaluate(workshop.done, workshop.text, seqlen=64)
    for baseline in (workshop.model, workshop.source):
        assert ptqcli.evaluate(packed, workshop.text, baseline=baseline, tokenizer=tokenizer, seqlen=64) == [expected]
    [alone] = ptqcli.evaluate(packed, workshop.text, tokenizer=tokenizer, seqlen=64)
    assert (alone.perplexity, alone.mean_kl) == (pytest.approx(expected.perplexity), None)
    [twice] = ptqcli.evaluate(workshop.model, workshop.text, baseline=workshop.model, tokenizer=tokenizer, seqlen=64)
    assert twice.mean_kl == pytest.approx(0, abs=1e-6)


def test_evaluations_that_cannot_work(workshop: Workshop) -> None:
    with pytest.raises(UsageError, match="evaluated with its tokenizer; give tokenizer="):
        ptqcli.evaluate(workshop.model, workshop.text)
    wrong: Any = 3
    for model, baseline in ((wrong, None), (None, None), (workshop.done, wrong)):
        with pytest.raises(UsageError, match="a model is a folder, a hub id or a model of transformers, not"):
            ptqcli.evaluate(model, workshop.text, baseline=baseline, tokenizer=None if baseline else byte_tokenizer())
    with pytest.raises(UsageError, match="device 'gpu' is unknown"):
        ptqcli.evaluate(workshop.done, workshop.text, device="gpu")
    with pytest.raises(UsageError, match="tokenizer belongs to a model in memory"):
        ptqcli.evaluate(workshop.done, workshop.text, tokenizer=byte_tokenizer())
    with pytest.raises(UsageError, match="is not quantized, so it cannot run on --kernel reference"):
        ptqcli.evaluate(workshop.source, workshop.text, kernel="reference")
    with pytest.raises(PTQError):
        ptqcli.evaluate(workshop.done, str(workshop.folder / "absent.txt"))


@pytest.mark.parametrize("free", [1, 300_000])
def test_a_model_that_does_not_fit_is_spread_and_measured(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """All of it, or a part, stays on the disk; the folder for it goes away with the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(models, "free_bytes", lambda device: free)
    model = models.load_model(workshop.source)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert away
    assert ("model.embed_tokens.weight" in away) is (free == 1)
    assert len(list(tmp_path.iterdir())) == 1
    [found] = ptqcli.evaluate(model, workshop.text, tokenizer=byte_tokenizer(), seqlen=64)
    [expected] = ptqcli.evaluate(workshop.model, workshop.text, tokenizer=byte_tokenizer(), seqlen=64)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    with pytest.raises(PTQError, match="holds no values; load the model whole, without offloading"):
        ptqcli.quantize(model, output=tmp_path / "out", algo="rtn", scheme="w4a16-g32")
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_loaded_leaves_no_folder(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(models, "free_bytes", lambda device: 1)
    with pytest.raises(PTQError, match=r"hold no tensor for model\.layers\.2"):
        models.load_model(tmp_path / "model")
    assert list((tmp_path / "temporary").iterdir()) == []


# Looking into a checkpoint, and running it


def test_a_checkpoint_is_opened_and_run(workshop: Workshop) -> None:
    opened = ptqcli.open_checkpoint(str(workshop.done))
    assert opened.schemes == {layer.name: Scheme.parse(layer.scheme) for layer in workshop.report.layers}
    with pytest.raises(UsageError, match="device 'gpu' is unknown; use cpu, cuda or cuda:N"):
        ptqcli.load_quantized(workshop.done, device="gpu")
    with pytest.raises(PTQError, match="lm_head is no quantized linear; they are named like model"):
        opened.weight("lm_head")
    twin = AutoModelForCausalLM.from_pretrained(workshop.source)
    for name in opened.schemes:
        linear, weight = twin.get_submodule(name), opened.weight(name)
        expected = ptqcli.solve(linear.weight.detach(), "w4a16-g32", "rtn", scale_dtype=torch.float32)
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(weight.scale, expected.scale)
        linear.weight.data = weight.dequantize()
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        logits = ptqcli.load_quantized(str(workshop.done))(ids).logits
        assert torch.allclose(logits, twin(ids).logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits, workshop.model(ids).logits, rtol=1e-3, atol=1e-3)
    for function in (ptqcli.open_checkpoint, ptqcli.load_quantized):
        with pytest.raises(PTQError, match="not quantized"):
            function(workshop.source)


# One matrix


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, INPUTS = matrix(24, 64), matrix(3, 100, 64, seed=1) * torch.linspace(0.1, 3, 64)


def output_error(weight: QuantizedWeight) -> float:
    return float((INPUTS.double() @ (WEIGHT.double() - weight.dequantize(torch.float64)).T).square().sum())


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    return left.scheme == right.scheme and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in ("codes", "scale", "zero")
    )


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g16-asym", "w4a16-row"])
def test_solve_is_what_the_solver_gives(scheme: str) -> None:
    hessian = Hessian(INPUTS.reshape(-1, 64).T @ INPUTS.reshape(-1, 64), 300)
    solvers: list[tuple[str, Any, dict[str, object]]] = [
        ("rtn", RTN("minmax"), {"scale_search": "minmax"}),
        ("rtn", RTN(), {}),
        ("gptq", GPTQ(), {}),
        ("gptq", GPTQ(damp=0.5, act_order=False), {"damp": 0.5, "act_order": False}),
        ("obq", OBQ(), {}),
    ]
    for name, solver, options in solvers:
        prepared = solver.prepare(Hessian(hessian.sums.clone(), 300), "here")
        expected = solver.solve(WEIGHT, prepared, Scheme.parse(scheme), torch.bfloat16).weight
        found = ptqcli.solve(WEIGHT, Scheme.parse(scheme), name, inputs=None if name == "rtn" else INPUTS, options=options)
        assert same(found, expected)
        assert found.scale.dtype == torch.bfloat16
    assert output_error(ptqcli.solve(WEIGHT, scheme, inputs=INPUTS)) < 0.9 * output_error(ptqcli.solve(WEIGHT, scheme, "rtn"))
    assert not same(ptqcli.solve(WEIGHT, scheme, inputs=INPUTS), ptqcli.solve(WEIGHT, scheme, inputs=INPUTS, options={"damp": 9.0}))


def test_solve_rounds_to_the_nearest_code() -> None:
    found = ptqcli.solve(WEIGHT, "w4a16-g32", "rtn", scale_dtype=torch.float32, options={"scale_search": "minmax"})
    groups = WEIGHT.reshape(24, 2, 32)
    scale = -groups.gather(2, groups.abs().argmax(2, keepdim=True)) / 8
    torch.testing.assert_close(found.scale, scale.squeeze(2))
    assert torch.equal(found.codes, ((groups / scale).round() + 8).clamp(0, 15).reshape(24, 64).to(torch.uint8))


def test_solve_adds_what_a_scheme_has_beside_codes() -> None:
    static = ptqcli.solve(WEIGHT, "w8a8-static", "rtn", inputs=INPUTS, scale_dtype=torch.float32)
    assert static.input_scale is not None
    assert float(static.input_scale) == pytest.approx(float(INPUTS.abs().max()) / 127.5)
    split = ptqcli.solve(WEIGHT, "w8a8-outliers7-static", "rtn", inputs=INPUTS, scale_dtype=torch.float32).outliers
    assert split is not None
    index = torch.nonzero(INPUTS.abs().amax((0, 1)) > 7).squeeze(1)
    assert 0 < len(index) < 64
    assert torch.equal(split.index, index.int())
    assert torch.equal(split.weight, WEIGHT[:, index])


BROKEN_INPUTS = INPUTS.clone().index_fill_(2, torch.tensor([5]), float("nan"))
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g128", inputs=INPUTS), UsageError, "group size 128 does not divide 64 input features"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32"), UsageError, "solver 'gptq' in w4a16-g32 looks at the inputs of the linear; give inputs="),
    (lambda: ptqcli.solve(WEIGHT, "w8a8-static", "rtn"), UsageError, "solver 'rtn' in w8a8-static looks at the inputs"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32", "awq+gptq"), UsageError, "transforms work on blocks; name a solver alone"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32", "best"), UsageError, "algorithm 'best' is unknown; choose one of awq"),
    (lambda: ptqcli.solve(WEIGHT, "w4a17"), UsageError, "w4a17"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32", "rtn", options={"damp": 1}), UsageError, "rtn has no option 'damp'"),
    (
        lambda: ptqcli.solve(WEIGHT, "w4a16-g32", inputs=INPUTS[..., :60]),
        UsageError,
        r"inputs are \[3, 100, 60\], but weight takes \[..., 64\]",
    ),
    (lambda: ptqcli.solve(WEIGHT.int(), "w4a16-g32"), UsageError, r"weight is torch.int32 \[24, 64\]; give a floating matrix \[out, in\]"),
    (lambda: ptqcli.solve(WEIGHT.tolist()), UsageError, "weight is a tensor, not list"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32", inputs=INPUTS.tolist()), UsageError, "inputs is a tensor, not list"),
    (lambda: ptqcli.solve(WEIGHT / 0, "w4a16-g32"), PTQError, "weight holds NaN or infinity"),
    (lambda: ptqcli.solve(WEIGHT, "w4a16-g32", inputs=BROKEN_INPUTS), PTQError, "inputs"),
]


@pytest.mark.parametrize("call, kind, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_a_matrix_that_cannot_be_solved_is_refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
