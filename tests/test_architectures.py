"""Every architecture by discovery alone: capture, quantization, loading and evaluation on tiny random models."""

import json
import warnings

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from packaging.version import Version
from tiny import ARCHITECTURES, advance, in_memory, make_model, token_ids, write_text
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from variants import some_slow

from ptqcli.calibration.record import record_calls
from ptqcli.calibration.text import evaluation_ids
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.model.linears import linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized

# What the blocks of each architecture hold: linears per block and stages (distinct inputs) per block.
EXPECTED = {
    "llama": (7, 4),
    "mistral": (7, 4),
    "qwen2": (7, 4),
    "qwen3": (7, 4),
    "gemma2": (7, 4),
    "gemma3": (7, 4),
    "phi3": (4, 4),
    "opt": (6, 4),
    "gpt2": (4, 4),
    "gpt_neox": (4, 4),
    "bloom": (4, 4),
    "falcon": (4, 3),
    "stablelm": (7, 4),
    "olmo2": (7, 4),
}
CPU = torch.device("cpu")


@pytest.fixture(params=some_slow(sorted(ARCHITECTURES), every=2))
def architecture(request):
    return request.param


def test_structure_is_discovered(architecture, tmp_path):
    make_model(tmp_path, architecture)
    skeleton = Skeleton(ModelFolder(tmp_path))
    linears, stages = EXPECTED[architecture]
    assert len(skeleton.blocks) == 2
    assert len(skeleton.linears) == 2 * linears
    for shape in skeleton.shapes:
        assert len(shape.stages) == stages
        assert sum(len(stage) for stage in shape.stages) == linears
        assert not shape.unused
        assert not shape.repeated


@torch.no_grad()
def test_replayed_blocks_give_the_model_bit_for_bit(architecture, tmp_path):
    model = make_model(tmp_path, architecture)
    windows = token_ids(batch=5)
    seen = []
    handle = Skeleton(ModelFolder(tmp_path))
    last = model.get_submodule(handle.blocks_name)[-1]
    last.register_forward_hook(lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output))
    for start in range(0, 5, 2):
        model(input_ids=windows[start : start + 2], use_cache=False)

    recording = record_calls(handle, windows, 2, CPU, torch.float32, in_memory)
    for index in range(2):
        block = handle.load_block(index, CPU, torch.float32)
        advance(handle, recording, index, block)
        handle.release(handle.units[index])
    assert torch.equal(recording.hidden, torch.cat(seen))


@torch.no_grad()
def test_quantizes_loads_and_evaluates(architecture, tmp_path):
    original = make_model(tmp_path / "model", architecture)
    recipe = Recipe(algo="gptq", group_size=32, calib=str(write_text(tmp_path / "text.txt")), nsamples=10, seqlen=64)
    report = quantize(tmp_path / "model", recipe, tmp_path / "out", resources=Resources(batch_size=4))
    assert len(report.layers) == 2 * EXPECTED[architecture][0]
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)

    dense = decompressed(original, tmp_path / "out")
    packed = load_quantized(tmp_path / "out")
    ids = token_ids()
    expected = dense(input_ids=ids).logits
    torch.testing.assert_close(packed(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(original.logits_before, expected, rtol=1e-2)

    tokens = evaluation_ids(str(write_text(tmp_path / "held.txt", 300, seed=9)), load_tokenizer(tmp_path / "out"))
    measured = perplexity(packed, tokens, seqlen=64).perplexity
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    losses = [dense(input_ids=window[None], labels=window[None]).loss for window in windows]
    assert measured == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


@torch.no_grad()
def test_transformers_loads_the_checkpoint_or_says_why_not(architecture, tmp_path):
    make_model(tmp_path / "model", architecture)
    recipe = Recipe(algo="rtn", group_size=32)
    quantize(tmp_path / "model", recipe, tmp_path / "out")
    notes = plan_run(tmp_path / "model", recipe, Resources())[1].notes
    if architecture == "gpt2":
        assert any("Conv1D" in note for note in notes)
        with pytest.raises(ValueError, match="conv1d"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        return
    if architecture == "falcon":  # its linears multiply with their weight themselves, which the packed ones do not have
        assert any("FalconLinear" in note and "dequantize=True" in note for note in notes)
        if Version(transformers.__version__) < Version("5.23"):
            pytest.skip("transformers before 5.23 cannot load Falcon from this format at all")
        choice = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    else:
        assert not any("transformers" in note for note in notes)
        choice = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **choice)
    assert not any(info.values()), info
    ids = token_ids()
    expected = theirs.eval()(input_ids=ids).logits
    ours = load_quantized(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def decompressed(model, checkpoint):
    """``model`` with every packed matrix replaced by what the compressed-tensors library itself reads, and with the biases of the file."""
    model.logits_before = model(input_ids=token_ids()).logits
    reader = SafetensorsFolder(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    group = next(iter(config["config_groups"].values()))
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"], format=group["format"])
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    skeleton = Skeleton(ModelFolder(checkpoint.parent / "model"))
    for site in skeleton.linears:
        stored = skeleton.stored_name(f"{site.name}.weight").removesuffix(".weight")
        keys = ("weight_packed", "weight_scale", "weight_shape")
        weight = library.decompress({key: reader.read(f"{stored}.{key}") for key in keys}, scheme)["weight"]
        linear = model.get_submodule(site.name)
        linear_weight(linear).copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(reader.read(f"{stored}.bias"))
    return model
