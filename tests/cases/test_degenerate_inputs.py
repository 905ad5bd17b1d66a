"""Kind: a degenerate input refused although the answer is plain.

Where calibration gives no evidence (all inputs of a linear zero, single columns zero, or too small to be squared), every algorithm rounds
to nearest, which is compared with the codes of ``rtn`` on the same grids, and the report counts it. Polishing then fits the grids to the
weights alone. Weights that are constant or zero are held.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import Ptq
from safetensors.torch import load_file, save_file
from tiny import make_model, write_text
from variants import some_slow

import ptqcli

SHORT = {"nsamples": 3, "seqlen": 16}
WEIGHT = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
INPUTS = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
SCHEMES = ("w4a16-g32", "w3a16-g64-asym", "w2a16-row", "w8a8", "w8a8-static", "w8a8-tensor", "llm-int8-static")


# The grids of rounding, and nothing done to them afterwards.
PLAIN = {"scale_search": "mse", "polish": 0}


def same(one: ptqcli.QuantizedWeight, other: ptqcli.QuantizedWeight) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "scale", "zero"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [{}, {"damp": 0.0}, {"scale_search": "minmax"}], ids=str)
@pytest.mark.parametrize("solver", ["gptq", "obq"])
def test_inputs_that_are_all_zero_are_rounded_to_nearest(solver: str, options: dict, scheme: str) -> None:
    asked = {**PLAIN, **options}
    nearest = ptqcli.solve(WEIGHT, scheme, "rtn", inputs=INPUTS * 0, options={"scale_search": asked["scale_search"]})
    assert same(ptqcli.solve(WEIGHT, scheme, solver, inputs=INPUTS * 0, options=asked), nearest)
    assert not same(ptqcli.solve(WEIGHT, scheme, solver, inputs=INPUTS, options=asked), nearest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("solver", "search"), [("gptq", "mse"), ("obq", "minmax")])
def test_without_evidence_grids_are_fitted_to_the_weights(solver: str, search: str, scheme: str) -> None:
    """Codes are those nearest to the weights, and not farther from them than with the ranges at the start."""
    found = ptqcli.solve(WEIGHT, scheme, solver, inputs=INPUTS * 0)
    nearest = ptqcli.solve(WEIGHT, scheme, "rtn", inputs=INPUTS * 0, options={"scale_search": search})
    scale, zero = (part.float().repeat_interleave(64 // part.shape[1], dim=1) for part in (found.scale, found.zero))
    codes = ((WEIGHT / scale).round() + zero).clamp(0, found.scheme.levels - 1)
    assert (found.codes == codes).float().mean() > 0.999  # but for ties
    error, usual = (float((each.dequantize(torch.float32) - WEIGHT).norm()) for each in (found, nearest))
    assert error <= usual
    assert error < usual or found.scheme.bits == 8  # where the rounding of the scales leaves no room


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-18, 1e-10, 1e8, 1e17])
@pytest.mark.parametrize("solver", ["gptq", "obq"])
def test_tiny_and_large_inputs_give_the_codes_of_usual_ones_or_round_to_nearest(solver: str, size: float) -> None:
    found = ptqcli.solve(WEIGHT, "w4a16-g32", solver, inputs=INPUTS.double() * size, options=PLAIN)
    usual = ptqcli.solve(WEIGHT, "w4a16-g32", solver, inputs=INPUTS, options=PLAIN)
    nearest = ptqcli.solve(WEIGHT, "w4a16-g32", "rtn")
    squares_have_digits = size >= 1e-18
    assert (found.codes == (usual if squares_have_digits else nearest).codes).float().mean() > 0.99
    assert same(found, nearest) or squares_have_digits


@pytest.mark.parametrize("damp", [0.01, 0.0])
@pytest.mark.parametrize("solver", ["gptq", "obq"])
@pytest.mark.parametrize("dead", [range(5), range(32), range(1, 64)], ids=len)
def test_columns_without_input_are_rounded_to_nearest(solver: str, damp: float, dead: range) -> None:
    inputs = INPUTS.clone()
    inputs[:, list(dead)] = 0
    found = ptqcli.solve(WEIGHT, "w4a16-row", solver, inputs=inputs, options={**PLAIN, "damp": damp})
    nearest = ptqcli.solve(WEIGHT, "w4a16-row", "rtn")
    assert torch.equal(found.codes[:, list(dead)], nearest.codes[:, list(dead)])


@pytest.mark.parametrize("inputs", [INPUTS[:1], INPUTS[:1].expand(50, -1), INPUTS * 0 + 1], ids=["one token", "one repeated", "ones"])
@pytest.mark.parametrize("solver", ["gptq", "obq"])
def test_inputs_of_rank_one_are_solved(solver: str, inputs: torch.Tensor) -> None:
    found = ptqcli.solve(WEIGHT, "w4a16-g32", solver, inputs=inputs)
    wanted = inputs @ WEIGHT.t()

    def error(weight: ptqcli.QuantizedWeight) -> float:
        return float((inputs @ weight.dequantize(torch.float32).t() - wanted).norm() / wanted.norm())

    assert error(found) < error(ptqcli.solve(WEIGHT, "w4a16-g32", "rtn"))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 1e-15, 1e15])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-row-asym", "w2a16-row-asym", "w8a8"])
@pytest.mark.parametrize("solver", ["rtn", "gptq", "obq"])
def test_constant_weights_are_held(solver: str, scheme: str, value: float) -> None:
    weight = torch.full((8, 64), value)
    found = ptqcli.solve(weight, scheme, solver, inputs=INPUTS, scale_dtype=torch.float32).dequantize(torch.float64)
    half_step = 1e-6 if "asym" in scheme else 1.01 / (15 if "w4" in scheme else 255)  # with a zero point the value is an end of the grid
    assert ((found - weight.double()).abs() <= abs(value) * half_step).all()


# In the pipeline


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``unreached``: the norms of the first block are zero, and so are the inputs of all its linears."""
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "unreached")
    file = folder / "unreached" / "model.safetensors"
    stored = load_file(file)
    for name, tensor in stored.items():
        if name.startswith("model.layers.0.") and "norm" in name:
            tensor.zero_()
    save_file(stored, file, metadata={"format": "pt"})
    write_text(folder / "text.txt")
    return folder


ALGORITHMS = [
    *({"algo": algo, "group_size": 32} for algo in ("gptq", "obq", "awq", "awq+gptq", "awq+obq")),
    *({"algo": algo, "wbits": 8, "abits": 8} for algo in ("gptq", "smoothquant", "smoothquant+gptq")),
    {"algo": "smoothquant+gptq", "smooth_alpha": "auto", "act_scales": "static"},
    {"algo": "llm-int8+gptq", "outliers": "static"},
    {"algo": "gptq", "group_size": 32, "sequential": False},
]


@pytest.mark.parametrize("request_", some_slow(ALGORITHMS, every=3), ids=lambda request: " ".join(map(str, request.values())))
def test_a_block_that_no_input_reaches_has_the_codes_of_rtn(request_: dict, workshop: Path, tmp_path: Path) -> None:
    text = str(workshop / "text.txt")
    plain = {} if request_["algo"] in ("awq", "smoothquant") else PLAIN
    report = ptqcli.quantize(workshop / "unreached", output=tmp_path / "out", calib=text, **SHORT, **request_, **plain)
    wanted = {key: value for key, value in request_.items() if key in ("group_size", "wbits", "abits", "act_scales")}
    kept = {"wbits": 8, "abits": 8} if "group_size" not in request_ else {}
    ptqcli.quantize(workshop / "unreached", output=tmp_path / "rtn", calib=text, **SHORT, **{"algo": "rtn", **kept, **wanted})
    found, nearest = (ptqcli.open_checkpoint(tmp_path / name) for name in ("out", "rtn"))
    for layer in report.layers:
        in_first = layer.name.startswith("model.layers.0.")
        assert layer.inputs_all_zero == in_first
        if in_first:
            assert same(found.weight(layer.name), nearest.weight(layer.name)), layer.name
            assert layer.relative_error == 0


def test_it_is_said_in_a_line_and_kept_in_the_report(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    flags = ("--group-size", "32", "--calib", workshop / "text.txt", "--nsamples", "3", "--seqlen", "16")
    done = ptq("quantize", workshop / "unreached", "--output", tmp_path / "out", *flags)
    assert done.code == 0
    assert "7 linears rounded to nearest, since all their inputs were zero (first model.layers.0.self_attn.q_proj)" in done.out
    assert "columns never activated" not in done.out
    layers = json.loads((tmp_path / "out" / "ptq_report.json").read_text())["layers"]
    assert [layer["inputs_all_zero"] for layer in layers] == [True] * 7 + [False] * 7
    assert "inputs all zero: rounded to nearest" in ptq("inspect", tmp_path / "out").out
