"""bitsandbytes files: transformers and peft load what ptq writes, and ptq what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import by_transformers, check_perplexity, demo_in, logits, relative
from packed import change_tensor
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import ptqcli
from ptqcli.formats.packed_checkpoint import PackedCheckpoint, open_checkpoint
from ptqcli.runtime import load_quantized

bitsandbytes = pytest.importorskip("bitsandbytes", reason="transformers reads and writes the format with it")

GOLDEN = Path(__file__).parents[1] / "golden" / "ckpt"
FOUR_BITS = ["nf4-g64", "nf4-g64-double", "fp4-g64-double", "nf4-g32"]
IN_8_BITS = 2e-3  # in float16, where a wrong scale would be five times as much
LAYERS = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_in(tmp_path_factory.mktemp("demo"), torch.float32)


def written(folder: Path, model: Path, scheme: str, algo: str = "rtn", **options: Any) -> Path:
    if scheme.startswith("w8"):  # looks for outliers
        options |= {"calib": str(tiny.write_text(folder / "text.txt")), "nsamples": 4, "seqlen": 64}
    ptqcli.quantize(model, output=folder / "out", algo=algo, format="bitsandbytes", scheme=scheme, **options)
    return folder / "out"


def packed_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def compute_in_float32(model: Any) -> Any:
    """The fast path of bitsandbytes on a CPU multiplies in bfloat16 and rounds scales to it; one that asks for gradients is exact."""
    for module in packed_modules(model).values():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_transformers_has_our_logits_in_4_bits(tmp_path: Path, demo: Path, scheme: str) -> None:
    """And the twin: with one code changed it has others."""
    folder = written(tmp_path, demo, scheme)
    ours = logits(load_quantized(folder))
    model = compute_in_float32(by_transformers(folder))
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), ours) < 1e-5

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] ^= 0x80

    change_tensor(folder, change)
    assert relative(logits(compute_in_float32(by_transformers(folder))), ours) > 1e-5


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_every_weight_is_the_same_to_the_last_bit(tmp_path: Path, demo: Path, scheme: str) -> None:
    folder = written(tmp_path, demo, scheme)
    packed = open_checkpoint(folder)
    for name, module in packed_modules(by_transformers(folder)).items():
        theirs = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        torch.testing.assert_close(packed.weight(name).dequantize(), theirs, rtol=3e-7, atol=1e-9)


def test_gptq_on_its_grid_loads_like_any_other(tmp_path: Path, demo: Path) -> None:
    text = str(tiny.write_text(tmp_path / "text.txt"))
    folder = written(tmp_path, demo, "nf4-g64-double", "gptq", calib=text, nsamples=4, seqlen=64)
    assert relative(logits(compute_in_float32(by_transformers(folder))), logits(load_quantized(folder))) < 1e-5


def test_linears_that_are_left_as_they_are(tmp_path: Path, demo: Path) -> None:
    folder = written(tmp_path, demo, "nf4-g64", overrides=[{"pattern": "layers.1.*down_proj", "skip": True}])
    model = compute_in_float32(by_transformers(folder))
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), logits(load_quantized(folder))) < 1e-5


def test_a_conv1d_is_read(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model", "gpt2")
    folder = written(tmp_path, tmp_path / "model", "nf4-g64")
    assert relative(logits(compute_in_float32(by_transformers(folder))), logits(load_quantized(folder))) < 1e-5


def inputs_and_outputs(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer of bitsandbytes, when the model reads the tokens."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in packed_modules(model).items():
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0].clone(), out.clone())}))
    logits(model)
    return seen


def expected_output(packed: PackedCheckpoint, name: str, given: Tensor, threshold: float) -> Tensor:
    """Its formula: columns with outliers by the weight in floating point, the others on 127 steps to the largest of a token."""
    weight, x = packed.weight(name).dequantize(torch.float32), given.reshape(-1, given.shape[-1]).half().float()
    above = (x.abs() >= threshold).any(dim=0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    below = x.masked_fill(x.abs() >= threshold, 0) if threshold else x
    largest = below.abs().amax(dim=1, keepdim=True)
    rounded = (below * (127 / largest)).round() * (largest / 127)
    rounded[:, above] = given.reshape(x.shape).float()[:, above]
    return functional.linear(rounded, weight).view(*given.shape[:-1], -1)


def worst_output(found: dict[str, tuple[Tensor, Tensor]], packed: PackedCheckpoint, threshold: float) -> float:
    """The largest relative error of an output, of all layers, over the tokens: one wrong scale shows in it. found: inputs and outputs."""
    errors = []
    for name, (given, out) in found.items():
        expected = expected_output(packed, name, given, threshold)
        errors.append(((out.float() - expected).flatten(0, -2).norm(dim=0) / expected.flatten(0, -2).norm(dim=0)).max())
    return float(torch.stack(errors).max())


def with_a_wrong_scale(folder: Path) -> None:
    """That of one output of one linear is 1 % larger."""
    change_tensor(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.SCB"][3].mul_(1.01))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-outliers6", "w8a8-outliers2.5"])
def test_transformers_computes_with_our_weights_in_8_bits(tmp_path: Path, demo: Path, scheme: str) -> None:
    """With negative scales and codes of -128; its logits are ours but for the noise of rounding. The twin: without signs, others."""
    folder = written(tmp_path, demo, scheme)
    packed = open_checkpoint(folder)
    scales = torch.cat([packed.weight(name).scale.flatten() for name in packed.schemes])
    assert 0.3 < (scales < 0).float().mean() < 0.7
    assert any(bool((packed.weight(name).codes == 0).any()) for name in packed.schemes)
    model, split = by_transformers(folder), packed.schemes[next(iter(packed.schemes))].outliers
    threshold = 0.0 if split is None else split.threshold
    assert worst_output(inputs_and_outputs(model), packed, threshold) < IN_8_BITS
    ours, exact = logits(load_quantized(folder)), logits(AutoModelForCausalLM.from_pretrained(demo))
    assert relative(logits(model), ours) < 1.5 * relative(ours, exact)

    with_a_wrong_scale(folder)
    assert worst_output(inputs_and_outputs(by_transformers(folder)), packed, threshold) > IN_8_BITS
    change_tensor(folder, lambda tensors: [tensor.abs_() for name, tensor in tensors.items() if name.endswith(".SCB")])
    assert relative(logits(by_transformers(folder)), ours) > 0.5


def written_by_transformers(folder: Path, demo: Path, **asked: Any) -> Any:
    """The model, which lies in ``folder`` too."""
    model = AutoModelForCausalLM.from_pretrained(demo, quantization_config=BitsAndBytesConfig(**asked)).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_what_transformers_writes_in_4_bits_runs_as_it_does_there(tmp_path: Path, demo: Path, kind: str, double: bool) -> None:
    model = written_by_transformers(tmp_path, demo, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    packed = open_checkpoint(tmp_path)
    assert {str(found) for found in packed.schemes.values()} == {f"{kind}-g64{'-double' * double}"}
    assert packed_modules(model).keys() == packed.schemes.keys()
    compute_in_float32(model)
    assert relative(logits(load_quantized(tmp_path)), logits(model)) < 1e-5
    check_perplexity(tmp_path, model, ".nested_absmax" if double else ".absmax")


def test_what_transformers_writes_in_8_bits_runs_as_it_does_there(tmp_path: Path, demo: Path) -> None:
    """Its layers compute with the weights that are read here. The twin: with one scale 1 % larger they do not."""
    model = written_by_transformers(tmp_path, demo, load_in_8bit=True)
    packed = open_checkpoint(tmp_path)
    assert {str(found) for found in packed.schemes.values()} == {"w8a8-outliers6"}
    assert packed_modules(model).keys() == packed.schemes.keys()
    seen = inputs_and_outputs(model)
    assert worst_output(seen, packed, 6.0) < IN_8_BITS
    with_a_wrong_scale(tmp_path)
    assert worst_output(seen, open_checkpoint(tmp_path), 6.0) > IN_8_BITS


def test_perplexity_of_what_transformers_writes_in_8_bits(tmp_path: Path, demo: Path) -> None:
    model = written_by_transformers(tmp_path, demo, load_in_8bit=True)
    check_perplexity(tmp_path, model, ".SCB")


def test_the_golden_checkpoints_load_here_as_where_they_were_made() -> None:
    for name in ("bnb_int8", "bnb_nf4_dq"):
        assert packed_modules(by_transformers(GOLDEN / name)).keys() == open_checkpoint(GOLDEN / name).schemes.keys()


@pytest.mark.parametrize("scheme", ["nf4-g64", "nf4-g64-double", "w8a8-outliers6"])
def test_an_adapter_is_trained_on_it(tmp_path: Path, demo: Path, scheme: str) -> None:
    peft = pytest.importorskip("peft", reason="it trains adapters")
    model = AutoModelForCausalLM.from_pretrained(written(tmp_path, demo, scheme))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(packed_modules(model))
    optimizer, ids, losses = torch.optim.Adam(trained, lr=1e-2), tiny.token_ids(), []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
