"""Words to algorithms, options to schemes, and every algorithm from the request to logits."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_kernels import LLMInt8Linear, W8A8Linear
from tiny import make_model, token_ids, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM
from variants import some_slow

from ptqcli.algorithms import find_algorithm, parts
from ptqcli.calibration.statistics import Hessian, InputStatistics, StatisticsRequest
from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import UsageError
from ptqcli.formats.compressed_tensors_config import OUTLIERS_KEY
from ptqcli.numerics.scheme import AUTO_GROUP, ActivationScheme, OutlierSplit, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.report import LOGS, Report
from ptqcli.recipe import Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import kernels_in, load_quantized
from ptqcli.solvers import LinearTask, Solution, Stage
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.per_matrix import PerMatrix
from ptqcli.solvers.rtn import RTN
from ptqcli.transforms.awq import AWQ
from ptqcli.transforms.smoothquant import SmoothQuant

TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)

# Words


@pytest.mark.parametrize(
    "name, transforms, solver",
    [
        ("rtn", [], "rtn"),
        ("gptq", [], "gptq"),
        ("obq", [], "obq"),
        ("awq", ["awq"], "rtn"),
        ("smoothquant", ["smoothquant"], "rtn"),
        ("llm-int8", [], "rtn"),
        ("awq+gptq", ["awq"], "gptq"),
        ("awq+smoothquant+gptq", ["awq", "smoothquant"], "gptq"),
        ("smoothquant+awq+obq", ["smoothquant", "awq"], "obq"),
        ("llm-int8+gptq", [], "gptq"),
        ("smoothquant+llm-int8", ["smoothquant"], "rtn"),
        ("llm-int8+awq+rtn", ["awq"], "rtn"),
    ],
)
def test_an_algorithm_is_transforms_in_order_and_one_solver(name: str, transforms: list[str], solver: str) -> None:
    algorithm = find_algorithm(name)
    assert (algorithm.name, [part.name for part in algorithm.transforms], algorithm.solver.name) == (name, transforms, solver)


@pytest.mark.parametrize(
    "name, word",
    [
        ("magic", "'magic' is unknown"),
        ("awq+magic+gptq", "'magic' is unknown"),
        ("", "'' is unknown"),
        ("awq+", "'' is unknown"),
        ("awq + gptq", "'awq ' is unknown"),
        ("GPTQ", "'GPTQ' is unknown"),
        ("awq+awq", "awq stands twice"),
        ("gptq+awq+gptq", "gptq stands twice"),
        ("gptq+obq", "gptq and obq are both solvers"),
        ("awq+rtn+gptq", "rtn and gptq are both solvers"),
        ("gptq+awq", "write awq+gptq"),
        ("awq+obq+smoothquant", "write awq+smoothquant+obq"),
        ("gptq+llm-int8", "write llm-int8+gptq"),
    ],
)
def test_what_is_no_algorithm_is_refused_by_name(name: str, word: str) -> None:
    for ask in (lambda: find_algorithm(name), lambda: Recipe(algo=name)):
        with pytest.raises(UsageError) as caught:
            ask()
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_part_has_a_name_and_a_summary_and_works_alone() -> None:
    assert set(parts()) >= {"awq", "smoothquant", "llm-int8", "rtn", "gptq", "obq"}
    for name, part in parts().items():
        assert (part.name, part.load().name, find_algorithm(name).name) == (name, name, name)
        assert part.load().summary
        assert Recipe(algo=name).algorithm == find_algorithm(name)


def test_options_reach_the_parts() -> None:
    given = {"awq": {"clip": False}, "smoothquant": {"alpha": "auto"}, "gptq": {"damp": 0.1, "act_order": False, "scale_search": "minmax"}}
    recipe = Recipe(algo="awq+smoothquant+gptq", options=given)
    assert recipe.transforms() == [AWQ(clip=False), SmoothQuant("auto")]
    assert recipe.solver() == GPTQ(0.1, act_order=False, static_groups=True, scale_search="minmax")
    assert Recipe(algo="obq", options={"obq": {"damp": 0.2}}).solver() == OBQ(0.2)
    assert Recipe(algo="awq").solver() == RTN()


# Schemes

SCHEMES = [
    ({}, Scheme(4, AUTO_GROUP)),
    ({"group_size": 128}, Scheme(4, 128)),
    ({"group_size": "auto"}, Scheme(4, AUTO_GROUP)),
    ({"scheme": "w4a16"}, Scheme(4, AUTO_GROUP)),
    ({"abits": 8, "group_size": "auto"}, Scheme(4, -1, activations=TOKEN)),
    ({"algo": "awq"}, Scheme(4, AUTO_GROUP)),
    ({"algo": "obq", "wbits": 3, "group_size": 64, "symmetric": False}, Scheme(3, 64, symmetric=False)),
    ({"algo": "rtn", "wbits": 8, "abits": 8}, Scheme(8, -1, activations=TOKEN)),
    ({"algo": "rtn", "abits": 8}, Scheme(4, -1, activations=TOKEN)),
    ({"algo": "rtn", "wbits": 8, "abits": 8, "group_size": 0, "act_scales": "static"}, Scheme(8, 0, activations=STATIC)),
    ({"algo": "smoothquant"}, Scheme(8, -1, activations=TOKEN)),
    ({"algo": "smoothquant", "act_scales": "tensor"}, Scheme(8, -1, activations=TENSOR)),
    ({"algo": "smoothquant", "wbits": 4, "abits": 16}, Scheme(4, AUTO_GROUP)),
    ({"algo": "smoothquant", "wbits": 4}, Scheme(4, -1, activations=TOKEN)),
    ({"algo": "smoothquant", "smooth_level": "O1"}, Scheme(8, 0, activations=TOKEN)),
    ({"algo": "smoothquant", "smooth_level": "O2"}, Scheme(8, 0, activations=TENSOR)),
    ({"algo": "smoothquant+gptq", "smooth_level": "O3"}, Scheme(8, 0, activations=STATIC)),
    ({"algo": "llm-int8"}, Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(6.0))),
    ({"algo": "llm-int8", "outliers": "static", "outlier_threshold": 3}, Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(3, False))),
    ({"algo": "llm-int8", "outliers": "none"}, Scheme(8, -1, activations=TOKEN)),
    ({"algo": "llm-int8", "act_scales": "tensor"}, Scheme(8, -1, activations=TENSOR, outliers=OutlierSplit())),
    ({"algo": "smoothquant+llm-int8"}, Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit())),
    ({"algo": "llm-int8+smoothquant+gptq"}, Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit())),
    ({"algo": "gptq", "wbits": 8, "abits": 8, "outliers": "dynamic"}, Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit())),
    ({"algo": "awq+smoothquant+gptq", "group_size": -1}, Scheme(8, -1, activations=TOKEN)),
]


@pytest.mark.parametrize("request_, scheme", SCHEMES, ids=[str(request) for request, _ in SCHEMES])
def test_a_request_means_one_scheme(request_: dict[str, Any], scheme: Scheme) -> None:
    assert load_recipe(flags=request_).default_scheme == scheme


REFUSED = [
    ({"abits": 8, "symmetric": False}, "symmetric weights"),
    ({"abits": 8, "group_size": 128}, "not group size 128"),
    ({"algo": "smoothquant", "group_size": 32}, "not group size 32"),
    ({"abits": 4}, "4 bits per activation"),
    ({"abits": 0}, "0 bits per activation"),
    ({"wbits": 6, "abits": 8}, "6 bits per weight"),
    ({"group_size": 0}, "group size 0"),
    ({"group_size": -2}, "group size -2"),
    ({"group_size": AUTO_GROUP}, f"group size {AUTO_GROUP}"),
    ({"group_size": "64"}, "group size 64 is not valid"),
    ({"outliers": "static"}, "outlier columns are split off from 8-bit activations"),
    ({"algo": "llm-int8", "abits": 16, "outliers": "dynamic"}, "outlier columns are split off from 8-bit activations"),
    ({"algo": "llm-int8", "act_scales": "static"}, "not static ones"),
    ({"algo": "llm-int8", "outliers": "some"}, "outliers 'some'"),
    *(({"algo": "llm-int8", "outlier_threshold": value}, f"threshold {value}") for value in (0.0, -6.0, float("nan"), float("inf"))),
    *(({"algo": "smoothquant", "smooth_alpha": value}, f"alpha {value!r}") for value in (-0.1, 1.1, float("nan"), "best")),
    ({"algo": "smoothquant", "smooth_level": "O4"}, "smooth level 'O4'"),
    ({"algo": "gptq", "smooth_level": "O1"}, "belongs to smoothquant, not to gptq"),
    ({"algo": "smoothquant", "smooth_level": "O1", "group_size": -1}, "smooth level O1 sets the group size"),
    ({"algo": "smoothquant", "smooth_level": "O3", "act_scales": "static"}, "smooth level O3 sets"),
    ({"algo": "smoothquant", "smooth_level": "O1", "abits": 16}, "activations stay in 16 bit"),
    ({"algo": "gptq", "act_scales": "token"}, "activations stay in 16 bit"),
    ({"abits": 8, "act_scales": "channel"}, "activation scales 'channel'"),
    ({"algo": "obq", "damp": -1.0}, "damp -1.0"),
]


@pytest.mark.parametrize("request_, message", REFUSED, ids=[str(request) for request, _ in REFUSED])
def test_what_contradicts_itself_is_refused_by_name(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(flags=request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


W8A8 = Scheme(8, -1, activations=TOKEN)


@pytest.mark.parametrize(
    "scheme, change, expected",
    [
        (W8A8, {"abits": 16}, Scheme(8, -1)),
        (W8A8, {"abits": 16, "group_size": 64, "symmetric": False}, Scheme(8, 64, symmetric=False)),
        (W8A8, {"abits": 8}, W8A8),
        (W8A8, {"bits": 4}, replace(W8A8, bits=4)),
        (W8A8, {"group_size": 0}, replace(W8A8, group_size=0)),
        (replace(W8A8, group_size=0, activations=STATIC), {"abits": 8}, replace(W8A8, group_size=0, activations=STATIC)),
        (replace(W8A8, group_size=0), {"abits": 16}, Scheme(8, -1)),
        (replace(W8A8, outliers=OutlierSplit()), {"abits": 16, "bits": 4}, Scheme(4, -1)),
        (replace(W8A8, outliers=OutlierSplit()), {"bits": 4}, replace(W8A8, bits=4, outliers=OutlierSplit())),
        (Scheme(4, 128), {"abits": 8, "bits": 8}, W8A8),
        (Scheme(4, 128), {"abits": 16}, Scheme(4, 128)),
        (Scheme(4, 64), {"group_size": "auto"}, Scheme(4, AUTO_GROUP)),
        (W8A8, {"group_size": "auto"}, W8A8),
        (Scheme(4, AUTO_GROUP), {"group_size": 64, "bits": 8}, Scheme(8, 64)),
        (Scheme(4, 128, symmetric=False), {"abits": 8, "symmetric": True}, replace(W8A8, bits=4)),
    ],
)
def test_an_override_changes_what_it_names(scheme: Scheme, change: dict[str, Any], expected: Scheme) -> None:
    assert Override("proj", **change).apply(scheme) == expected


@pytest.mark.parametrize(
    "scheme, change, message",
    [
        (W8A8, {"abits": 4}, "4 bits per activation"),
        (Scheme(4, 128), {"abits": 4}, "4 bits per activation"),
        (Scheme(4, 128), {"abits": 0}, "0 bits per activation"),
        (W8A8, {"group_size": 64}, "not group size 64"),
        (W8A8, {"symmetric": False}, "symmetric weights"),
        (Scheme(4, 128), {"group_size": 0}, "group size 0"),
        (Scheme(4, 128, symmetric=False), {"abits": 8}, "symmetric weights"),
    ],
)
def test_an_override_that_cannot_work_is_refused_by_its_pattern(scheme: Scheme, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Override("proj", **change).apply(scheme)
    assert str(caught.value).startswith("override 'proj': ")


# From the request to logits

ALGORITHMS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32},
    "gptq": {"group_size": 32},
    "obq": {"group_size": 32},
    "awq": {"group_size": 32},
    "smoothquant": {},
    "llm-int8": {"outlier_threshold": 6.0},
    "llm-int8 static": {"outlier_threshold": 6.0, "outliers": "static"},
    "awq+gptq": {"group_size": 32},
    "smoothquant+gptq": {},
    "awq+obq": {"group_size": 32},
    "awq+smoothquant+gptq": {},
    "llm-int8+gptq static": {"outlier_threshold": 6.0, "outliers": "static"},
    "smoothquant+llm-int8": {"outlier_threshold": 1.5},
}


def recipe_for(name: str, folder: Path, **changes: Any) -> Recipe:
    algo = name.removesuffix(" static")
    given = {"algo": algo, "calib": str(folder / "text.txt"), "nsamples": 6, "seqlen": 48, **ALGORITHMS.get(name, {}), **changes}
    return load_recipe(flags=given)


@dataclass(eq=False)
class Runs:
    """Models of some architectures with a text each, and one run of each algorithm that a test has asked for."""

    parent: Path

    @cache  # noqa: B019
    def folder(self, architecture: str) -> Path:
        (self.parent / architecture).mkdir()
        return prepared(self.parent / architecture, architecture)

    @cache  # noqa: B019
    def run(self, architecture: str, name: str) -> tuple[Report, Path]:
        folder = self.folder(architecture)
        out = folder / name
        return quantize(folder / "model", recipe_for(name, folder), out), out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def llama(runs: Runs) -> Path:
    return runs.folder("llama")


def prepared(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model whose norms have a few large channels, and a text."""
    model = make_model(folder / "model", architecture, dtype, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" not in name:
                parameter[3:5] += 6
    model.save_pretrained(folder / "model")
    write_text(folder / "text.txt")
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=token_ids()).logits
    return found.float()


def original(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Conv1D layers and norms that multiply by 1 + weight are met by each part alone; OBQ takes the same matrices as GPTQ.
UNLIKE_LLAMA = product(["rtn", "gptq", "awq", "smoothquant", "llm-int8", "llm-int8 static", "awq+smoothquant+gptq"], ["gpt2", "gemma2"])


@pytest.mark.parametrize("name, architecture", [*product(ALGORITHMS, ["llama"]), *UNLIKE_LLAMA])
def test_every_algorithm_quantizes_and_loads(name: str, architecture: str, runs: Runs) -> None:
    folder, (report, out) = runs.folder(architecture), runs.run(architecture, name)
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    found = logits(load_quantized(out))
    assert found.isfinite().all()
    assert relative(found, logits(original(folder))) < (0.8 if report.layers[0].scheme.startswith("w4") else 0.1)
    split = "outliers" in report.layers[0].scheme
    assert split == ("llm-int8" in name)
    for layer in report.layers:
        assert (layer.outlier_share is not None) == split
        if split:
            assert layer.outlier_share == layer.outlier_columns / in_features(folder, layer.name)
    assert not split or any(0 < layer.outlier_share < 1 for layer in report.layers)
    assert bool(report.folds) == bool(recipe_for(name, folder).transforms())


def in_features(folder: Path, name: str) -> int:
    reader = SafetensorsFolder(folder / "model")
    return reader.shape(f"{name}.weight")[0 if folder.name == "gpt2" else 1]


@pytest.mark.parametrize("name", some_slow([*ALGORITHMS], every=2))
def test_the_same_request_gives_the_same_bytes(name: str, runs: Runs, tmp_path: Path) -> None:
    _, out = runs.run("llama", name)
    quantize(runs.folder("llama") / "model", recipe_for(name, runs.folder("llama")), tmp_path / "again")
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all(filecmp.cmp(out / file, tmp_path / "again" / file, shallow=False) for file in names if file not in LOGS)


# Checkpoints with 8-bit activations in transformers


def by_transformers(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert {key: list(found) for key, found in info.items() if found} == {}
    return model


IN_TRANSFORMERS = [
    ("llama", {"algo": "rtn", "wbits": 8, "abits": 8}),
    ("llama", {"algo": "rtn", "wbits": 8, "abits": 8, "act_scales": "static"}),
    ("llama", {"algo": "awq", "wbits": 8, "abits": 8}),
    ("llama", {"algo": "smoothquant+gptq", "smooth_level": "O3"}),
    ("qwen2", {"algo": "smoothquant"}),  # biases of v
    ("opt", {"algo": "smoothquant", "smooth_level": "O2"}),  # biases of norms and of fc1
    ("opt", {"algo": "smoothquant", "act_scales": "static"}),
    ("gemma2", {"algo": "smoothquant", "smooth_level": "O1"}),
]


@pytest.mark.parametrize("architecture, request_", IN_TRANSFORMERS, ids=[f"{name} {request}" for name, request in IN_TRANSFORMERS])
def test_transformers_computes_the_same_with_8_bit_activations(architecture: str, request_: dict[str, Any], tmp_path: Path) -> None:
    folder = prepared(tmp_path, architecture)
    quantize(folder / "model", recipe_for("", folder, **request_), tmp_path / "out")
    ours, theirs = load_quantized(tmp_path / "out"), by_transformers(tmp_path / "out")
    linears = 12 if architecture == "opt" else 14
    assert sum(kernels_in(ours).values()) == linears
    expected = logits(theirs)
    assert relative(logits(ours), expected) < 1e-2
    before, after = SafetensorsFolder(folder / "model"), SafetensorsFolder(tmp_path / "out")
    if "smooth" in request_["algo"]:
        changed = {name for name in before.names if name in after.names and not name.endswith("proj.weight") and "fc" not in name}
        changed = {name for name in changed if not torch.equal(before.read(name), after.read(name))}
        assert len([name for name in changed if "norm" in name and name.endswith("weight")]) == 4
        if architecture == "opt":
            assert len([name for name in changed if "norm" in name and name.endswith("bias")]) == 4
        if architecture in ("qwen2", "opt"):
            assert len([name for name in changed if name.endswith("v_proj.bias")]) == 2
    norm = next(module for name, module in ours.named_modules() if "norm" in name and "weight" in module._parameters)
    norm.weight.data[:8] *= 1.5
    assert relative(logits(ours), expected) > 1e-2


@pytest.mark.parametrize("name", ["llm-int8", "llm-int8 static"])
def test_transformers_refuses_an_outlier_split(name: str, runs: Runs) -> None:
    _, out = runs.run("llama", name)
    with pytest.raises(ValueError, match=OUTLIERS_KEY):
        AutoModelForCausalLM.from_pretrained(out)


# Outliers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llm-int8", "llm-int8 static", "llm-int8+gptq static"])
def test_with_every_column_an_outlier_the_model_is_the_original(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = prepared(tmp_path, "llama", dtype)
    report = quantize(folder / "model", recipe_for(name, folder, outlier_threshold=1e-9), tmp_path / "out")
    assert all(layer.outlier_share == 1 for layer in report.layers)
    ours, expected = load_quantized(tmp_path / "out"), logits(original(folder))
    assert torch.equal(logits(ours), expected)
    next(module for module in ours.modules() if isinstance(module, LLMInt8Linear)).outlier_weight[0, 0] += 0.5
    assert not torch.equal(logits(ours), expected)


@pytest.mark.parametrize("name", ["llm-int8", "llm-int8 static", "llm-int8+gptq static", "smoothquant+llm-int8"])
def test_with_no_outlier_the_model_is_plain_w8a8(name: str, llama: Path, tmp_path: Path) -> None:
    solver = {"llm-int8+gptq static": "gptq", "smoothquant+llm-int8": "smoothquant"}.get(name, "rtn")
    report = quantize(llama / "model", recipe_for(name, llama, outlier_threshold=1e6), tmp_path / "split")
    assert all(layer.outlier_columns == 0 for layer in report.layers)
    quantize(llama / "model", recipe_for("", llama, algo=solver, wbits=8, abits=8), tmp_path / "plain")
    split, plain = SafetensorsFolder(tmp_path / "split"), SafetensorsFolder(tmp_path / "plain")
    assert all(torch.equal(split.read(stored), plain.read(stored)) for stored in plain.names)
    assert torch.equal(logits(load_quantized(tmp_path / "split")), logits(load_quantized(tmp_path / "plain")))


# Passes over the calibration text


def passes(folder: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Counter[int]]:
    """For each block how often each batch ran through it."""
    seen: dict[CalibratedBlock, Counter[int]] = {}
    forward = CalibratedBlock.forward

    def counted(self: CalibratedBlock, batch: int) -> Tensor:
        seen.setdefault(self, Counter())[batch] += 1
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedBlock, "forward", counted)
        quantize(folder / "model", recipe_for(name, folder, **changes), out, resources=Resources(batch_size=2))
    return list(seen.values())


@pytest.mark.parametrize(
    "name, sequential, count",
    [
        ("gptq", True, 1),
        ("obq", True, 1),
        ("llm-int8+gptq static", True, 1),
        ("awq", True, 2),
        ("smoothquant", True, 2),
        ("awq+gptq", True, 2),
        ("awq+smoothquant+gptq", True, 2),
        ("smoothquant+llm-int8", True, 2),
        ("gptq", False, 2),
        ("awq+gptq", False, 2),
        ("awq+smoothquant+gptq", False, 2),
        ("smoothquant+llm-int8", False, 2),
    ],
)
def test_passes_do_not_grow_with_the_parts(
    name: str, sequential: bool, count: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = passes(llama, tmp_path / "out", name, monkeypatch, sequential=sequential)
    assert counted == [Counter(dict.fromkeys(range(3), count))] * 2


@pytest.mark.parametrize("name", ["rtn", "rtn abits"])
def test_rounding_needs_no_text(name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abits = {"wbits": 8, "abits": 8} if name == "rtn abits" else {"group_size": 32}
    assert not passes(llama, tmp_path / "out", "", monkeypatch, algo="rtn", **abits)


def test_statistics_behind_transforms_are_those_of_the_transformed_block(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = StatisticsRequest(hessian=True, magnitudes=True, samples=True)
    pairs: list[tuple[InputStatistics, InputStatistics, InputStatistics]] = []
    measured: list[list[InputStatistics]] = []
    observe, at_once = CalibratedBlock.observe, CalibratedBlock.at_once

    def observing(self: CalibratedBlock, needs: StatisticsRequest) -> list[InputStatistics]:
        measured.append(observe(self, needs))
        return measured[-1]

    def comparing(self: CalibratedBlock, statistics: list[InputStatistics]) -> Iterator[tuple[int, InputStatistics]]:
        pairs.extend(zip(statistics, observe(self, everything), measured[-1], strict=True))
        return at_once(self, statistics)

    monkeypatch.setattr(CalibratedBlock, "observe", observing)
    monkeypatch.setattr(CalibratedBlock, "at_once", comparing)
    recipe = recipe_for("awq+smoothquant+gptq", llama, sequential=False)
    quantize(llama / "model", recipe, tmp_path / "out", resources=Resources(batch_size=2))
    assert len(pairs) == 2 * 4
    for given, fresh, before in pairs:
        fresh.settle()
        assert given.tokens == fresh.tokens == 6 * 48
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(given.largest, fresh.largest, **close)
        torch.testing.assert_close(given.summed, fresh.summed, **close)
        torch.testing.assert_close(given.sampled(), fresh.sampled(), rtol=1e-4, atol=1e-5 * float(fresh.sampled().abs().max()))
        scale = fresh.hessian.matrix.diagonal().sqrt()
        difference = (given.hessian.matrix - fresh.hessian.matrix) / scale / scale.unsqueeze(1)
        assert difference.abs().max() < 1e-5
        assert not torch.allclose(before.largest, fresh.largest, rtol=1e-2)


# What PerMatrix adds to a solver


@dataclass
class Placed:
    """A run of one stage, of some linears that read ``inputs``; keeps what is placed."""

    linears: tuple[LinearTask, ...]
    inputs: Tensor

    def alike_stages(self) -> Iterator[list[Stage]]:
        return ([stage] for stage in self.stages())

    def stages(self) -> Iterator[Stage]:
        statistics = InputStatistics.empty(
            self.inputs.shape[1], StatisticsRequest(hessian=True, magnitudes=True, samples=True), len(self.inputs), torch.device("cpu")
        )
        statistics.add(self.inputs)
        yield Stage(self.linears, statistics)

    def place_each(self, groups: Sequence[Sequence[str]], solve: Callable[[Sequence[str]], Sequence[Solution]]) -> None:
        for group in groups:
            for name, solution in zip(group, solve(group), strict=True):
                self.place(name, solution)

    def place(self, name: str, solution: Solution) -> None:
        self.found: dict[str, Solution] = {**getattr(self, "found", {}), name: solution}

    def progress(self, name: str, done: int, total: int) -> None:
        pass


COLUMNS, LARGE = 24, [2, 9, 10]


def calibration_inputs() -> Tensor:
    """Inputs whose columns LARGE reach beyond 6."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, COLUMNS, generator=generator).clamp(-4, 4) @ (torch.eye(COLUMNS) + 0.1)
    inputs = inputs.clamp(-5.9, 5.9)
    inputs[:, LARGE] *= 20
    return inputs


def lifted(solver: Any, scheme: Scheme, inputs: Tensor, dtype: torch.dtype = torch.float32, names: str = "q") -> dict[str, Solution]:
    run = Placed(tuple(task(name, scheme, dtype) for name in names), inputs)
    PerMatrix(solver).solve(run)
    return run.found


def task(name: str, scheme: Scheme, dtype: torch.dtype = torch.float32) -> LinearTask:
    return LinearTask(name=name, weight=matrix(name, dtype), scheme=scheme, scale_dtype=dtype)


def matrix(name: str, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(ord(name)))
    return rows.to(dtype).float()


def solved_alone(solver: Any, weight: Tensor, inputs: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    hessian = Hessian.zeros(inputs.shape[1], torch.device("cpu"))
    hessian.add(inputs)
    solution: Solution = solver.solve(weight, solver.prepare(hessian, "alone"), scheme, dtype)
    return solution.weight


def split_scheme(dynamic: bool, threshold: float = 6.0) -> Scheme:
    return Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(threshold, dynamic))


SOLVERS = [RTN("mse"), GPTQ(), OBQ()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_split_takes_its_columns_out_before_the_solver(solver: Any, bits: int) -> None:
    inputs, scheme = calibration_inputs(), replace(split_scheme(dynamic=False), bits=bits)
    kept = [column for column in range(COLUMNS) if column not in LARGE]
    for name, solution in lifted(solver, scheme, inputs, torch.bfloat16, "qk").items():
        found, weight = solution.weight, matrix(name, torch.bfloat16)
        alone = solved_alone(solver, weight[:, kept], inputs[:, kept], scheme, torch.bfloat16)
        assert torch.equal(found.codes[:, kept], alone.codes)
        assert torch.equal(found.scale, alone.scale)
        assert (found.codes[:, LARGE] == 2 ** (bits - 1)).all()
        assert found.outliers.index.tolist() == LARGE
        assert found.outliers.index.dtype == torch.int32
        assert found.outliers.weight.dtype == torch.bfloat16
        assert torch.equal(found.outliers.weight.float(), weight[:, LARGE])
        assert torch.equal(found.dequantize().float()[:, LARGE], weight[:, LARGE])
        assert solution.notes.outlier_columns == len(LARGE)
        whole = solved_alone(solver, weight, inputs, scheme, torch.bfloat16)  # the twin: with the columns in
        assert isinstance(solver, RTN) or not torch.equal(found.codes[:, kept], whole.codes[:, kept])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_dynamic_split_keeps_codes_and_columns(solver: Any) -> None:
    inputs, scheme = calibration_inputs(), split_scheme(dynamic=True)
    found = lifted(solver, scheme, inputs)["q"].weight
    whole = solved_alone(solver, matrix("q", torch.float32), inputs, scheme)
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.scale, whole.scale)
    assert found.outliers.index.tolist() == LARGE
    assert torch.equal(found.outliers.weight, matrix("q", torch.float32)[:, LARGE])
    assert not (found.codes[:, LARGE] == 128).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("dynamic", [True, False])
def test_all_columns_or_none_may_be_outliers(solver: Any, dynamic: bool) -> None:
    inputs, weight = calibration_inputs(), matrix("q", torch.float32)
    every = lifted(solver, split_scheme(dynamic, 1e-9), inputs)["q"]
    assert every.notes.outlier_columns == COLUMNS
    assert torch.equal(every.weight.dequantize(), weight)
    assert (every.weight.codes.shape, every.weight.scale.shape, every.weight.zero.shape) == ((10, COLUMNS), (10, 1), (10, 1))
    assert dynamic or (every.weight.codes == 128).all()
    none = lifted(solver, split_scheme(dynamic, 1e9), inputs)["q"]
    assert none.notes.outlier_columns == 0
    assert none.weight.outliers.weight.shape == (10, 0)
    assert torch.equal(none.weight.codes, solved_alone(solver, weight, inputs, split_scheme(dynamic)).codes)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_columns_that_never_get_an_input_may_be_all_that_is_left(solver: Any) -> None:
    """As behind a ReLU, with a threshold that everything else exceeds."""
    inputs = calibration_inputs()
    dead = [0, 7]
    inputs[:, dead] = 0
    solver = replace(solver, polish=0)
    found = lifted(solver, split_scheme(False, 1e-9), inputs)["q"].weight
    weight = matrix("q", torch.float32)
    assert found.outliers.index.tolist() == [column for column in range(COLUMNS) if column not in dead]
    nearest = round_to_nearest(weight[:, dead], split_scheme(False), torch.float32, solver.ranges)
    assert torch.equal(found.codes[:, dead], nearest.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 0])
def test_a_static_input_scale_is_the_largest_input_of_all(dtype: torch.dtype, group_size: int) -> None:
    inputs = calibration_inputs()
    scheme = Scheme(8, group_size, activations=STATIC)
    found = lifted(GPTQ(), scheme, inputs, dtype, "qkv")
    expected = (inputs.abs().max() / 127.5).reshape(1).to(dtype)
    for solution in found.values():
        assert solution.weight.input_scale.dtype == dtype
        assert torch.equal(solution.weight.input_scale, expected)
        assert (solution.weight.outliers, solution.notes.outlier_columns) == (None, None)
    assert (lifted(RTN(), scheme, torch.zeros(5, COLUMNS))["q"].weight.input_scale == 1).all()
    assert lifted(RTN(), replace(scheme, activations=TOKEN), inputs)["q"].weight.input_scale is None


def test_stored_static_scales_are_those_of_the_calibration_text(llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for("", llama, algo="smoothquant", act_scales="static")
    quantize(llama / "model", recipe, tmp_path / "out", resources=Resources(batch_size=2))
    reader = SafetensorsFolder(tmp_path / "out")
    for layer in range(2):
        scales = [reader.read(f"model.layers.{layer}.self_attn.{name}_proj.input_scale") for name in "qkv"]
        assert scales[0].shape == (1,)
        assert torch.equal(scales[0], scales[1])
        assert torch.equal(scales[0], scales[2])
    windows = calibration_windows(documents(recipe.calib, "calibration", None), load_tokenizer(llama / "model"), 6, 48, 0)
    model, largest = load_quantized(tmp_path / "out", fuse=False), {}
    for name, module in model.named_modules():
        if isinstance(module, W8A8Linear):
            module.register_forward_pre_hook(lambda _module, args, name=name: largest.update({name: args[0].abs().max()}))
    with torch.no_grad():
        model(windows)
    # The first is exactly what the text reaches; behind it the stages were quantized one by one.
    first = "model.layers.0.self_attn.q_proj"
    assert float(largest[first] / 127.5) == pytest.approx(float(reader.read(f"{first}.input_scale")), rel=1e-5)
    for name, found in largest.items():
        assert float(found / 127.5) == pytest.approx(float(reader.read(f"{name}.input_scale")), rel=0.05)


def test_thresholds_of_one_stage_may_differ() -> None:
    inputs = calibration_inputs()
    schemes = {"q": split_scheme(False, 6.0), "k": split_scheme(False, 5.0), "v": W8A8}
    run = Placed(tuple(task(name, scheme) for name, scheme in schemes.items()), inputs)
    PerMatrix(GPTQ()).solve(run)
    for name, scheme in schemes.items():
        alone = lifted(GPTQ(), scheme, inputs, names=name)[name].weight
        assert torch.equal(run.found[name].weight.codes, alone.codes)
    assert len(run.found["k"].weight.outliers.index) > len(LARGE)


def test_the_report_gives_the_share_of_outlier_columns(runs: Runs) -> None:
    report, out = runs.run("llama", "llm-int8 static")
    reader = SafetensorsFolder(out)
    for layer in report.layers:
        assert layer.outlier_columns == reader.shape(f"{layer.name}.outlier_index")[0]
    assert report.stored()["layers"][0]["outlier_share"] == report.layers[0].outlier_share
