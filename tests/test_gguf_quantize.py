"""GPTQ on the grids of GGUF blocks, and ``ptq quantize --format gguf``: against float64, the gguf package, and the sizes that were told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Ptq, one_line
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_models import make_case
from hypothesis import given
from hypothesis import strategies as st
from layers import correlated_layer
from tiny import make_model, write_text
from torch import Tensor

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import LinearSpec, find_format
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.ranges import SquaredError, WeightedBlocks
from ptqcli.numerics.scheme import BLOCKS, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.report import LOGS
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.runtime.models import load_model
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.refine_blocks import BlockRefinement
from ptqcli.solvers.rtn import RTN

GGUF = find_format("gguf")
DEMO = Path(ptqcli.__file__).parent / "demo"


def assert_same_weight(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.scheme == expected.scheme
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert torch.equal(found.dequantize(torch.float32), expected.dequantize(torch.float32))


# Schemes


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_schemes_with_one_name(name: str) -> None:
    scheme = Scheme.parse(name.upper())
    assert str(scheme) == name
    assert Scheme.of_blocks(name) == scheme
    with pytest.raises(UsageError, match=f"{name} has .* bits in groups of"):
        Scheme(8, -1, blocks=name)


def test_the_types_that_run_packed_are_schemes_of_integers() -> None:
    assert Scheme.parse("q4_0") == Scheme(4, 32)
    assert Scheme.parse("Q8_0") == Scheme(8, 32)
    with pytest.raises(UsageError, match="blocks 'q7_k' are unknown"):
        Scheme(4, 32, blocks="q7_k")
    with pytest.raises(UsageError, match="super-blocks of 256 columns, which do not divide 576"):
        Scheme.parse("q4_k").group_count(576)


@pytest.mark.parametrize("name", BLOCKS)
def test_pack_gives_what_the_gguf_package_decodes(name: str) -> None:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.03
    scheme = Scheme.parse(name)
    found = round_to_nearest(weight, scheme, torch.float16, WeightedBlocks())
    stored = GGUF.pack("m", found)
    assert list(stored) == [f"m.{name}"]
    theirs = dequantize(stored[f"m.{name}"].numpy(), GGMLQuantizationType[name.upper()])
    assert np.array_equal(theirs, found.dequantize(torch.float32).numpy())
    assert_same_weight(GGUF.unpack("m", stored.__getitem__, scheme), found)
    assert 0 < float((torch.from_numpy(theirs) - weight).norm() / weight.norm()) < 1.2 * 0.6**scheme.bits


@given(
    name=st.sampled_from([*BLOCKS, "q4_0", "q8_0"]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    size=st.sampled_from([0.0, 1e-6, 0.02, 3e4]),
    seed=st.integers(0, 2**31),
)
def test_unpack_is_the_inverse_of_pack(name: str, rows: int, blocks: int, size: float, seed: int) -> None:
    """Any codes on a grid that was fitted, zeros and the ends of fp16 among the weights."""
    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(seed)
    columns = blocks * (32 if scheme.blocks is None else scheme.columns_per_block)
    weight = torch.randn(rows, columns, generator=generator) * size
    fitted = round_to_nearest(weight, scheme, torch.float16, SquaredError())
    codes = torch.randint(scheme.levels, weight.shape, generator=generator, dtype=torch.uint8)
    found = replace(fitted, codes=codes)
    spec = LinearSpec(name="m", scheme=scheme, out_features=rows, in_features=columns, scale_dtype=torch.float16)
    stored = GGUF.pack("m", found)
    assert sum(tensor.nbytes for tensor in stored.values()) == GGUF.stored_bytes(spec)
    back = GGUF.unpack("m", stored.__getitem__, scheme)
    assert_same_weight(back, found)
    assert torch.equal(GGUF.pack("m", back)[f"m.{name}"], stored[f"m.{name}"])


def test_a_scale_that_is_no_number_is_named() -> None:
    data = GGUF.pack("m", round_to_nearest(torch.randn(2, 256), Scheme.parse("q4_k"), torch.float16, WeightedBlocks()))["m.q4_k"]
    data[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # fp16 infinity
    with pytest.raises(PTQError, match="m: a block has a scale that is no finite number"):
        GGUF.unpack("m", lambda _: data, Scheme.parse("q4_k"))


# Solvers


def column_loop(weight: Tensor, hessian: Tensor, grid: QuantizedWeight) -> Tensor:
    """GPTQ's Algorithm 1 on a given grid, columns by falling diagonal, in float64: the values that are chosen."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, chosen = weight.double()[:, order].clone(), torch.empty_like(weight)
    group = weight.shape[1] // grid.scale.shape[1]
    for j, column in enumerate(order.tolist()):
        scale, zero = (each[:, column // group].double().unsqueeze(1) for each in (grid.scale, grid.zero))
        values = (torch.arange(grid.scheme.levels).double() - zero) * scale
        value = values.gather(1, (values - left[:, j : j + 1]).abs().argmin(dim=1, keepdim=True)).squeeze(1)
        chosen[:, column] = value
        left[:, j + 1 :] -= torch.outer((left[:, j] - value) / factor[j, j], factor[j, j + 1 :])
    return chosen


@pytest.mark.parametrize("name", BLOCKS)
def test_gptq_equals_the_textbook_with_the_better_grid_of_each_row(name: str) -> None:
    weight, hessian = correlated_layer(24, 256, 900, torch.float64, 0, spread=0.1)
    scheme, solver = Scheme.parse(name), GPTQ(polish=0)
    found = solver.solve(weight, solver.prepare(hessian, "m"), scheme, torch.float16).weight
    damped = hessian.matrix + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(256)
    tried = []
    for importance in (None, damped.diagonal().float()):
        grid = round_to_nearest(weight, scheme, torch.float16, WeightedBlocks(importance))
        values = column_loop(weight, damped, grid)
        error = weight - values
        tried.append((((error @ damped) * error).sum(dim=1), values))
    (first, one), (second, other) = tried
    assert bool((first < second).any())
    assert bool((second < first).any())
    truth = torch.where((second < first).unsqueeze(1), other, one)
    assert torch.allclose(found.dequantize(torch.float64), truth, rtol=0, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize(
    "solver", [GPTQ(), GPTQ(polish=0), GPTQ(act_order=False), OBQ(), RTN(polish=2)], ids=lambda solver: str(solver)[:24]
)
@pytest.mark.parametrize("name", ["q4_k", "q3_k", "q5_0", "q4_1"])
def test_the_hessian_lowers_the_objective(solver: Any, name: str) -> None:
    weight, hessian = correlated_layer(16, 256, 900, torch.float32, 0, spread=1)
    scheme = Scheme.parse(name)

    def objective(quantized: QuantizedWeight) -> float:
        error = (weight - quantized.dequantize(torch.float32)).double()
        return float((error @ hessian.matrix.double() * error).sum())

    found = solver.solve(weight, solver.prepare(hessian, "m"), scheme, torch.float16).weight
    assert objective(found) < 0.85 * objective(RTN().solve(weight, None, scheme, torch.float16).weight)
    assert_same_weight(GGUF.unpack("m", GGUF.pack("m", found).__getitem__, scheme), found)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_refit_is_the_least_squares_solution(name: str) -> None:
    """Against a dense system of what every block shares, in float64, for each row by itself; rounding to fp16 moves it a little."""
    weight, hessian = correlated_layer(5, 512, 900, torch.float64, 1, spread=1)
    H = hessian.matrix + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(512)
    start = round_to_nearest(weight, Scheme.parse(name), torch.float16, WeightedBlocks())
    work = BlockRefinement(weight, H, start)
    work.refit()
    assert start.blocks is not None
    values, shared = zip(*start.blocks.parts(), strict=True)
    count, moved = shared[0].shape[1], 0
    for row in range(5):
        dense = torch.zeros(512, len(values) * count, dtype=torch.float64)
        for part, value in enumerate(values):
            for block in range(count):
                columns = slice(block * 512 // count, (block + 1) * 512 // count)
                dense[columns, part * count + block] = value[row, columns].double()
        exact = torch.linalg.lstsq(dense.T @ H @ dense, dense.T @ H @ weight[row].unsqueeze(1), driver="gelsd").solution.squeeze(1)
        before = torch.cat([each[row] for each in shared]).double()
        after = torch.cat([each[row] for each in (part[1] for part in work.blocks.parts())]).double()

        misses = [weight[row] - dense @ each for each in (before, after, exact)]
        old, new, least = (float(miss @ H @ miss) for miss in misses)
        assert least <= new <= old
        assert torch.equal(after, before) or new - least < 0.02 * (old - least) + 1e-4 * least  # kept where a sign would turn
        moved += not torch.equal(after, before)
    assert moved >= 3
    rounded = work.result()
    assert torch.allclose(work.weight.t() - work.error.t(), rounded.dequantize(torch.float64), rtol=0, atol=1e-6)


# Files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in a mix, by GPTQ; beside it the same mix by rounding."""
    folder = tmp_path_factory.mktemp("made")
    ptqcli.quantize(DEMO, output=folder / "out", format="gguf", gguf_type="q4_k_m", nsamples=8, seqlen=256)
    ptqcli.convert(DEMO, "gguf", output=folder / "rounded.gguf", gguf_type="q4_k_m")
    return folder / "out"


def test_the_folder_holds_one_file_with_the_types_of_the_mix(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "demo-Q4_K_M.gguf",
        "ptq_log.jsonl",
        "ptq_log.txt",
        "ptq_report.json",
    ]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(made / "demo-Q4_K_M.gguf").tensors}
    assert types == {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(made.parent / "rounded.gguf").tensors}
    assert {types["blk.0.attn_q.weight"], types["blk.3.attn_v.weight"], types["token_embd.weight"]} == {"Q4_K", "Q6_K"}


def test_the_report_tells_the_bytes_of_the_file_and_the_error_of_each_layer(made: Path, ptq: Ptq) -> None:
    report = json.loads((made / "ptq_report.json").read_text())
    assert report["bytes_after"] == sum(tensor.n_bytes for tensor in GGUFReader(made / "demo-Q4_K_M.gguf").tensors)
    assert report["files"] == ["SHA256SUMS", "demo-Q4_K_M.gguf"]
    shown = json.loads(ptq("inspect", made, "--json").out)
    errors = {layer["name"]: layer["relative_error"] for layer in shown["layers"] if "relative_error" in layer}
    assert errors == {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    assert 0 < max(errors.values()) < 0.2


def test_the_file_is_what_was_solved_and_better_than_rounding(made: Path) -> None:
    """Over the model's own text, in KL to the original: what is fed back is worth it, although the grids of rounding are fitted, too."""
    ids = torch.tensor([list(range(5, 261))])
    original, found, rounded = (load_model(path) for path in (DEMO, made / "demo-Q4_K_M.gguf", made.parent / "rounded.gguf"))
    with torch.no_grad():
        p, q, r = (torch.log_softmax(model(ids).logits.double(), -1) for model in (original, found, rounded))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.9 * float((p.exp() * (p - r)).sum(-1).mean())
    packed = open_checkpoint(made)
    assert {str(scheme) for scheme in packed.schemes.values()} == {"q4_k", "q6_k"}
    linear = found.get_submodule("model.layers.0.self_attn.k_proj")
    assert torch.equal(linear.weight, packed.weight("model.layers.0.self_attn.k_proj").dequantize(torch.float32))


@pytest.mark.slow
def test_it_is_replaced_when_it_is_asked_for_and_deterministic(made: Path, ptq: Ptq) -> None:
    before = (made / "demo-Q4_K_M.gguf").read_bytes()
    again = ("quantize", "--format", "gguf", "--nsamples", "8", "--seqlen", "256", "--output", made)
    assert "already exists" in one_line(ptq(*again))
    assert ptq(*again, "--overwrite").code == 0
    assert (made / "demo-Q4_K_M.gguf").read_bytes() == before
    (made / "other.gguf").write_bytes(b"mine")
    assert "other.gguf, which ptq quantize did not write" in one_line(ptq(*again, "--overwrite"))
    (made / "other.gguf").unlink()


def test_the_folder_is_published_and_its_card_takes_what_was_measured(made: Path, ptq: Ptq, tmp_path: Path) -> None:
    shown = json.loads(ptq("push", made, "me/demo", "--dry-run", "--json").out)
    assert sorted(shown["files"]) == sorted(path.name for path in made.iterdir() if path.name not in LOGS)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((made / "demo-Q4_K_M.gguf").read_bytes())
    assert list(json.loads(ptq("push", alone, "me/demo", "--dry-run", "--json").out)["files"]) == ["alone.gguf"]
    text = tmp_path / "text.txt"
    text.write_text("The built-in function returns a list of names. " * 40)
    assert ptq("eval", made, "--ppl", text, "--seqlen", "64", "--write-card").code == 0
    assert "## Measured" in (made / "README.md").read_text()
    assert "leave --write-card out" in one_line(ptq("eval", alone, "--no-baseline", "--ppl", text, "--seqlen", "64", "--write-card"))


def test_a_file_is_called_by_its_model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the ending of a GGUF file that it was made of, nor by the revision of one in the hub's cache."""
    ptqcli.quantize(made.parent / "rounded.gguf", output=tmp_path / "again", format="gguf", algo="rtn", allow_requantize=True)
    assert (tmp_path / "again" / "rounded-Q4_K_M.gguf").is_file()
    revision = tmp_path / "models--some--Thing-1B" / "snapshots" / "0a1b2c"
    make_case(revision, "llama", monkeypatch)
    ptqcli.quantize(revision, output=tmp_path / "hub", format="gguf", gguf_type="q8_0", algo="rtn")
    assert (tmp_path / "hub" / "Thing-1B-Q8_0.gguf").is_file()
    assert GGUFReader(tmp_path / "hub" / "Thing-1B-Q8_0.gguf").fields["general.name"].contents() == "Thing-1B"


def test_blocks_go_to_other_formats_only_when_rounding_anew_is_asked_for(made: Path, ptq: Ptq) -> None:
    refused = one_line(ptq("convert", made, "--to", "gptq", "--output", made.parent / "gptq"))
    assert "gptq holds integers with free scales, not blocks of q" in refused
    assert not (made.parent / "gptq").exists()
    assert ptq("convert", made, "--to", "gptq", "--output", made.parent / "gptq", "--requantize", "w4a16-g64").code == 0
    assert {str(scheme) for scheme in open_checkpoint(made.parent / "gptq").schemes.values()} == {"w4a16-g64"}


@pytest.mark.parametrize(("kind", "schemes"), [("q4_0", {"w4a16-g32"}), ("q5_0", {"q5_0"}), ("q2_k", {"w4a16-g32"})])
def test_other_types(kind: str, schemes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of 64 columns, which no super-block divides, legacy types stand in."""
    make_case(tmp_path / "model", "llama", monkeypatch)
    write_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calib": str(tmp_path / "text.txt"), "nsamples": 2, "seqlen": 32}
    plan = plan_run(tmp_path / "model", Recipe(format="gguf", gguf_type=kind, **options), Resources())[1]
    report = ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", format="gguf", gguf_type=kind, **options)
    assert report.bytes_after == plan.bytes_after
    packed = open_checkpoint(tmp_path / "out").schemes
    assert {str(scheme) for name, scheme in packed.items() if name != "lm_head"} == schemes


@pytest.mark.parametrize("case", ["gemma2", "qwen2", "llama-biases"])
def test_other_models(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_case(tmp_path / "model", case, monkeypatch)
    write_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calib": str(tmp_path / "text.txt"), "nsamples": 2, "seqlen": 32}
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", format="gguf", gguf_type="q8_0", **options)
    ptqcli.convert(tmp_path / "model", "gguf", output=tmp_path / "rounded.gguf", gguf_type="q8_0")
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        errors = [
            float((load_model(path)(ids).logits - expected).norm())
            for path in ((tmp_path / "out" / "model-Q8_0.gguf"), tmp_path / "rounded.gguf")
        ]
    assert 0.3 < errors[0] / errors[1] < 2  # 64 tokens of other text say little of random weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "gguf", "--gguf-type", "q4km"), "GGUF type 'q4km' is unknown; use"),
        (("--format", "gguf", "--gguf-type", "f16"), "quantizes nothing; ptq convert MODEL --to gguf --gguf-type f16"),
        (("--format", "gguf", "--gguf-type", "q4_k_m", "--wbits", "4"), "gguf type q4_k_m says what the numbers are, so leave wbits out"),
        (("--gguf-type", "q4_k_m"), "compressed-tensors has no mixes of types"),
        (("--format", "gguf", "--wbits", "3"), "name a mix of them with --gguf-type, and no bits or groups"),
        (
            ("--format", "gguf", "--finish", "kl"),
            "gguf is one file, whose scales stand and which has no adapter; leave --finish out",
        ),
        (("--format", "gguf", "--adapter-rank", "8"), "leave --adapter-rank out"),
        (("--format", "gguf", "--override", "q_proj:bits=8"), "q4_k has bits and groups of its own; skip the linear instead"),
        (("--format", "gguf", "--algo", "autoround"), "learns the rounding of integers, not of scheme q4_k"),
        (("--scheme", "q4_k"), "holds integers with free scales, not blocks of q4_k, which --format gguf does"),
    ],
)
def test_requests_that_cannot_work_are_refused_in_one_line(flags: tuple[str, ...], message: str, ptq: Ptq, tmp_path: Path) -> None:
    refused = ptq("quantize", *flags, "--output", tmp_path / "out")
    assert refused.code == 2
    assert message in one_line(refused)
    assert not (tmp_path / "out").exists()


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_the_work(ptq: Ptq, tmp_path: Path) -> None:
    make_model(tmp_path / "opt", "opt")
    refused = ptq("quantize", tmp_path / "opt", "--format", "gguf", "--algo", "rtn", "--output", tmp_path / "out")
    assert refused.code == 1
    assert "opt" in one_line(refused)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_mix_keeps_the_scheme_that_it_names() -> None:
    assert Recipe(format="gguf", scheme="q6_k").mix is None
    assert Recipe(format="gguf").mix == "q4_k_m"
    assert str(Recipe(format="gguf", gguf_type="Q5_K_M").default_scheme) == "q5_k"
