"""NaN, infinity, zero and negative numbers where a model has none: refused, by name, where they are read, or carried on as NaN.

Rows 12, 24, 25. A trained model holds no NaN and no infinity, and a scale is a positive number. What such a value is quantized to is a
number like any other, so that the damage would be invisible afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import STATIC, TOKEN, everything, llama, random_model, w8a8, write_checkpoint
from ptq_kernels import LLMInt8Linear, W8A8Linear
from safetensors.torch import load_file, save_file
from tiny import make_model, write_text
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.activations import round_activations
from ptqcli.numerics.scheme import OutlierSplit, Scheme
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe
from ptqcli.runtime.load import load_quantized
from ptqcli.runtime.models import load_model

BAD = (math.nan, math.inf, -math.inf)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_model(folder, num_hidden_layers=1, dtype=torch.bfloat16)
    return folder


def changed(source: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the model in ``source`` with one number of one tensor changed."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Norm, embedding, head, a weight that is quantized: the four kinds of places that a source model has.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", math.nan), ("model.embed_tokens.weight", math.inf), ("lm_head.weight", -math.inf),
        (f"{DOWN}.weight", math.nan), ("model.layers.0.input_layernorm.weight", math.nan),
    ],
)  # fmt: skip
def test_a_source_model_is_refused_even_where_nothing_is_calibrated(source: Path, tmp_path: Path, name: str, value: float) -> None:
    model = changed(source, tmp_path / "model", name, value)
    with pytest.raises(PTQError, match=f"model.safetensors: tensor {name} holds NaN or infinity"):
        quantize(model, Recipe(algo="rtn", group_size=32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_model_is_refused_with_calibration_and_when_it_is_run(source: Path, tmp_path: Path) -> None:
    model = changed(source, tmp_path / "model", "lm_head.weight", math.nan)
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(PTQError, match=r"tensor lm_head\.weight holds NaN or infinity"):
        quantize(model, Recipe(group_size=32, calib=str(text), nsamples=2, seqlen=32), tmp_path / "out")
    with pytest.raises(PTQError, match=r"lm_head\.weight holds NaN or infinity"):
        load_model(model)


SCHEMES = {"packed": Scheme.parse("w4a16-g32-asym"), "static": w8a8(STATIC), "outliers": w8a8(TOKEN, split=OutlierSplit(6.0, False))}


@pytest.fixture(scope="module", params=SCHEMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, random_model(llama(layers=1)), everything(SCHEMES[request.param]), split=(1, 5))
    return folder


@pytest.mark.parametrize("value", [*BAD, 0.0, -1.0, 1e-45])
def test_scales_of_a_checkpoint_are_numbers_that_scale(checkpoint: Path, tmp_path: Path, value: float) -> None:
    """Those of weights may be negative, those of inputs not."""
    scales = [name for name in load_file(checkpoint / "model.safetensors") if name in (f"{DOWN}.weight_scale", f"{DOWN}.input_scale")]
    assert scales
    for name in scales:
        folder = changed(checkpoint, tmp_path / name, name, value)
        if value == -1.0 and name.endswith("weight_scale"):
            assert (open_checkpoint(folder).weight(DOWN).scale == -1.0).any()
            continue
        with pytest.raises(PTQError, match=f"{name}:? holds"):
            open_checkpoint(folder).weight(DOWN)


@pytest.mark.parametrize("leaf", ["norm.weight", "embed_tokens.weight", "q_proj.bias", "q_proj.weight_scale", "outlier_weight"])
def test_every_floating_tensor_of_a_checkpoint_is_finite(checkpoint: Path, tmp_path: Path, leaf: str) -> None:
    name = next((name for name in load_file(checkpoint / "model.safetensors") if name.endswith(leaf)), None)
    if name is None:
        pytest.skip("this scheme keeps no columns")
    folder = changed(checkpoint, tmp_path / "broken", name, math.nan)
    with pytest.raises(PTQError, match=f"{name} holds NaN or infinity"):
        load_quantized(folder)


def test_what_the_dtype_of_the_model_cannot_hold_is_refused_too(checkpoint: Path, tmp_path: Path) -> None:
    for number, (name, value) in enumerate([("model.norm.weight", 1e6), (f"{DOWN}.weight_scale", 1e-12)]):
        folder = changed(checkpoint, tmp_path / str(number), name, value)
        with pytest.raises(PTQError, match=r"leaves? the range of torch\.float16; load the model in another dtype"):
            load_quantized(folder, dtype=torch.float16)


def test_nothing_is_refused_that_is_right(checkpoint: Path) -> None:
    assert torch.isfinite(load_quantized(checkpoint)(torch.arange(8).unsqueeze(0)).logits).all()


# Layers: every path on which inputs become integers. A token with NaN or infinity gives NaN, and the others what they give without it.


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)


LAYERS: dict[str, Callable[[bool], torch.nn.Module]] = {
    "static": lambda reference: W8A8Linear(codes(8, 64), torch.rand(8), torch.tensor([0.05]), False, reference=reference),
    "token": lambda reference: W8A8Linear(codes(8, 64), torch.rand(8), None, True, reference=reference),
    "outliers": lambda reference: LLMInt8Linear(
        codes(8, 64), torch.rand(8), torch.tensor([3], dtype=torch.int32), torch.rand(8, 1), None, True, reference=reference
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integer_layers(kind: str, reference: bool, value: float, dtype: torch.dtype) -> None:
    layer = LAYERS[kind](reference)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = layer(x)
    assert torch.isfinite(expected).all()
    x[1, 7] = value
    found = layer(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("value", BAD)
def test_one_scale_from_all_tokens_is_lost_for_all(value: float) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = value
    assert W8A8Linear(codes(8, 64), torch.rand(8), None, False)(x).isnan().all()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("activations", [STATIC, TOKEN])
def test_rounding_in_floating_point_says_the_same(value: float, activations) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = value
    rounded = round_activations(x, activations, torch.tensor([0.1]) if activations is STATIC else None)
    assert torch.isfinite(rounded[0]).all()
    assert rounded[1, 3].isnan()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_weight_only_layers(tmp_path: Path, value: float, bits: int, kernel: str) -> None:
    from ptqcli.numerics.ranges import MinMax
    from ptqcli.numerics.weight import round_to_nearest
    from ptqcli.runtime.layers import quantized_linear

    weight = round_to_nearest(torch.randn(16, 64), Scheme(bits, 32 if bits == 4 else -1), torch.float32, MinMax())
    layer = quantized_linear(weight, None, torch.float32, kernel=kernel)
    for tokens in (1, 40):  # a kernel for one token, an expanded weight for many
        x = torch.randn(tokens, 64)
        x[0, 7] = value
        found = layer(x)
        assert not torch.isfinite(found[0]).any()
        assert torch.isfinite(found[1:]).all()


@pytest.mark.parametrize(
    ("bits", "value", "signed", "fits"),
    [
        (8, 60_000, False, True),
        (8, 65_504, False, False),
        (4, 60_000, False, True),
        (4, 65_000, False, False),
        (8, 65_504, True, True),
        (4, 65_504, True, True),
    ],
)
def test_a_result_that_is_written_can_be_read(tmp_path: Path, bits: int, value: float, signed: bool, fits: bool) -> None:
    """Weights near the end of float16: the code farthest out stands for half a step more than the weight, on a signed grid for itself."""
    make_model(tmp_path / "model", num_hidden_layers=1, dtype=torch.float16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{DOWN}.weight"][0, 0] = -value
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(algo="rtn", wbits=bits, group_size=32, options={"rtn": {"signed": signed}})
    if fits:
        quantize(tmp_path / "model", recipe, tmp_path / "out")
        assert open_checkpoint(tmp_path / "out").weight(DOWN).dequantize().to(torch.float16).isfinite().all()
    else:
        with pytest.raises(PTQError, match=f"{DOWN}: its weights come so close to the end of torch.float16"):
            quantize(tmp_path / "model", recipe, tmp_path / "out")
