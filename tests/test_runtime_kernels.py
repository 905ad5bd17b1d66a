"""What the runtime makes of a checkpoint: the kernel that each layer gets, which layers are joined, and that it speaks as elsewhere."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import random_inputs
from packed import (
    STATIC,
    TENSOR,
    TOKEN,
    TOKENS,
    by_transformers,
    everything,
    gpt2,
    llama,
    logits,
    random_model,
    relative_error,
    w8a8,
    write_checkpoint,
)
from ptq_kernels import JoinedLinear, LinearPart, TorchInt4WeightOnly, W8A8Linear
from ptq_kernels.reference import int_mm_is_fast_and_exact
from tiny import ARCHITECTURES, make_model, token_ids
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import OutlierSplit, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.runtime import joined as joining
from ptqcli.runtime import kernels_in, layers, load_quantized, quantized_linear

GOLDEN = Path(__file__).parent / "golden" / "ckpt"
INTEGER = "torch" if int_mm_is_fast_and_exact() else "reference"

SCHEMES = {
    "w4 g32": Scheme(4, 32),
    "w4 asym": Scheme(4, 64, symmetric=False),
    "w4 row": Scheme(4, -1),
    "w3": Scheme(3, 128),
    "w8 row": Scheme(8, -1),
    "w8 g32": Scheme(8, 32),
    "w8a8 token": w8a8(TOKEN),
    "w8a8 matrix": w8a8(TENSOR, 0),
    "w8a8 static": w8a8(STATIC),
    "llm.int8": w8a8(TOKEN, -1, OutlierSplit(2.0)),
    "llm.int8 static": w8a8(TOKEN, -1, OutlierSplit(0.5, dynamic=False)),
}


def weight(scheme: Scheme, columns: int = 64) -> QuantizedWeight:
    return round_to_nearest(random_inputs(32, columns), scheme, torch.float32, MinMax())


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        (Scheme(4, 32), "torch"),
        (Scheme(4, -1), "torch"),
        (Scheme(4, 64, symmetric=False), "torch"),
        (Scheme(4, 16), "reference"),
        (Scheme(3, 32), "reference"),
        (Scheme(8, -1), "torch"),
        (Scheme(8, 32), "reference"),
        (Scheme(8, -1, symmetric=False), "reference"),
        (w8a8(TOKEN), INTEGER),
    ],
    ids=lambda value: str(value) if isinstance(value, Scheme) else value,
)
def test_the_kernel_that_a_scheme_gets_on_a_cpu(scheme: Scheme, kernel: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantized_linear(weight(scheme), None, dtype)
        assert layer.kernel == kernel
        assert quantized_linear(weight(scheme), None, dtype, kernel="reference").kernel == "reference"
        x = random_inputs(3, 64, dtype=dtype)
        expected = quantized_linear(weight(scheme), None, dtype, kernel="reference")(x)
        assert relative_error(layer(x).float(), expected.float()) < (1e-5 if dtype == torch.float32 else 6e-3)


def test_a_column_order_takes_the_reference() -> None:
    moved = replace(weight(Scheme(4, 32)), g_idx=(torch.arange(64) % 2).int())
    layer = quantized_linear(moved, None, torch.float32)
    assert layer.kernel == "reference"
    assert torch.allclose(layer(torch.eye(64)), moved.dequantize().T)


@pytest.mark.parametrize(
    ("scheme", "kernel", "message"),
    [
        (Scheme(4, 32), "triton", "kernel triton cannot run it: it needs a CUDA device; use --kernel auto"),
        (Scheme(3, 32), "torch", "kernel torch cannot run it: it has 4 and 8 bits, not 3; use --kernel auto"),
        (Scheme(4, 16), "torch", "kernel torch cannot run it: 4-bit weights need groups of a multiple of 32; use --kernel auto"),
        (Scheme(8, 32), "torch", "kernel torch cannot run it: 8-bit weights need one scale a row and no zero points; use --kernel auto"),
        (Scheme(4, 32), "marlin", "kernel 'marlin' is unknown; use auto, triton, torch, reference"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_run_it_is_refused(scheme: Scheme, kernel: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantized_linear(weight(scheme), None, torch.float32, kernel=kernel)
    assert str(caught.value) == message


def test_the_layer_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(3, 32)))
    with pytest.raises(UsageError, match=r"^model\.layers\.0\.self_attn\.q_proj: kernel torch cannot run it"):
        load_quantized(tmp_path, kernel="torch")


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        (Scheme(4, 32), torch.bfloat16, None),
        (Scheme(8, -1, symmetric=False), torch.float16, None),
        (Scheme(4, 64), torch.bfloat16, None),
        (w8a8(TOKEN), torch.float32, None),
        (Scheme(4, 16), torch.bfloat16, "it has groups of 32, 64, 128 and whole rows, not of 16"),
        (Scheme(3, 32), torch.bfloat16, "it has 4 and 8 bits, not 3"),
        (Scheme(4, 32), torch.float32, "it takes activations of 16 bits, not float32"),
    ],
    ids=str,
)
def test_what_triton_takes(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, dtype: torch.dtype, reason: str | None) -> None:
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: object())
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert layers._not_on_triton(weight(scheme), dtype, torch.device("cuda")) == reason
    capability = (7, 5)
    assert "8.0 or later" in str(layers._not_on_triton(weight(scheme), dtype, torch.device("cuda")))
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    assert layers._not_on_triton(weight(scheme), dtype, torch.device("cuda")) == "triton is not installed"


@pytest.mark.parametrize("name", SCHEMES)
def test_joined_layers_change_nothing(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(SCHEMES[name]), [3, 5])
    joined, single = load_quantized(tmp_path), load_quantized(tmp_path, fuse=False)
    found = {place: type(module) for place, module in joined.named_modules() if place.endswith("_proj")}
    assert sum(kind is LinearPart for kind in found.values()) == 10
    assert not any(isinstance(module, JoinedLinear) for module in single.modules())
    assert kernels_in(joined) == kernels_in(single)
    # The largest input of a token stands at the border of two codes, where 1e-7 can decide.
    assert relative_error(logits(joined), logits(single)) < (1e-2 if "a8" in name or "int8" in name else 1e-5)


def test_unlike_layers_are_not_joined(tmp_path: Path) -> None:
    def choose(name: str) -> Scheme | None:
        if name == "lm_head" or name.endswith("0.self_attn.v_proj"):
            return None
        return Scheme(8, 32) if name.endswith("1.self_attn.k_proj") else Scheme(4, 32)

    write_checkpoint(tmp_path, random_model(llama()), choose)
    model: Any = load_quantized(tmp_path)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert [type(part).__name__ for part in (first.q_proj, first.k_proj, first.v_proj)] == ["LinearPart", "LinearPart", "Linear"]
    assert [type(part).__name__ for part in (second.q_proj, second.k_proj, second.v_proj)] == [
        "LinearPart",
        "ReferenceWeightOnly",
        "LinearPart",
    ]
    assert second.v_proj._joined[0] is second.q_proj.joined
    assert kernels_in(model) == {"W4A16 torch": 12, "W8A16 reference": 1}
    assert relative_error(logits(model), logits(by_transformers(tmp_path))) < 1e-5


def test_other_static_scales_are_not_joined(tmp_path: Path) -> None:
    from packed import change_tensor

    write_checkpoint(tmp_path, random_model(llama()), everything(w8a8(STATIC)))
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.input_scale"].mul_(2))
    model: Any = load_quantized(tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, W8A8Linear)
    assert isinstance(model.model.layers[1].mlp.up_proj, LinearPart)
    assert relative_error(logits(model), logits(by_transformers(tmp_path))) < 1e-2


# Layers that read the norm's output together, in a block.
JOINED = {"opt": 3, "phi3": 0, "gpt2": 0, "gpt_neox": 0, "bloom": 0, "falcon": 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_joined_where_it_can_be(tmp_path: Path, architecture: str) -> None:
    model = make_model(tmp_path / "model", architecture)
    write_checkpoint(tmp_path / "packed", model, lambda name: None if "head" in name else Scheme(4, 32))
    ours = load_quantized(tmp_path / "packed")
    assert sum(isinstance(module, LinearPart) for module in ours.modules()) == 2 * JOINED.get(architecture, 5)
    ids = token_ids()
    with torch.no_grad():
        assert relative_error(ours(ids).logits, model(ids).logits) < 1e-4


def test_a_model_that_cannot_be_probed_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PTQError("the model does not run on empty tensors")

    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    expected = logits(load_quantized(tmp_path))
    monkeypatch.setattr(joining, "probe_model", refuse)
    model = load_quantized(tmp_path)
    assert not any(isinstance(module, LinearPart) for module in model.modules())
    assert relative_error(logits(model), expected) < 1e-5


# Generation


def token_by_token(model: Any, given: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
    """Twelve greedy tokens after TOKENS, each by one step with the cache of those before, and the logits of every step.

    given: the tokens that are fed, instead of the model's own.
    """
    ids, cache, tokens, steps = TOKENS, None, [], []
    with torch.no_grad():
        for step in range(12):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1]
            tokens.append(int(last.argmax()))
            ids = torch.tensor([[given[step] if given else tokens[-1]]])
            steps.append(last.float())
    return tokens, torch.cat(steps)


def disagreements(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Steps at which the likeliest token is another one, though the expected one leads by more than the logits differ."""
    first, second = expected.topk(2).values.unbind(dim=-1)
    clear = first - second > 2 * (found - expected).abs().amax(dim=-1)
    assert clear.sum() > len(clear) // 2
    return int((clear & (found.argmax(dim=-1) != expected.argmax(dim=-1))).sum())


@pytest.mark.parametrize("name", [name for name in SCHEMES if "llm" not in name and "asym" not in name])
def test_it_speaks_as_transformers_does(tmp_path: Path, name: str) -> None:
    """8-bit activations in float32 differ by some 5e-3 where an input ties between two codes (test_runtime.py)."""
    write_checkpoint(tmp_path, random_model(llama()), everything(SCHEMES[name]))
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    expected, wanted = token_by_token(theirs)
    _, steps = token_by_token(ours, expected)
    assert disagreements(steps, wanted) == 0
    assert relative_error(steps, wanted) < (2e-2 if "a8" in name else 1e-5)
    tokens, _ = token_by_token(ours)
    assert "a8" in name or tokens == expected
    generated = ours.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated[0, TOKENS.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("name", ["llm.int8", "llm.int8 static", "w4 asym"])
def test_what_transformers_does_not_read_speaks_as_without_a_cache(tmp_path: Path, name: str) -> None:
    """With a threshold, the columns of a prefill depend on all its tokens: there the cache is that of the run itself, token by token."""
    write_checkpoint(tmp_path, random_model(llama()), everything(SCHEMES[name]), [3, 5])
    ours, plain = load_quantized(tmp_path), load_quantized(tmp_path, kernel="reference", fuse=False)
    tokens, wanted = token_by_token(plain)
    _, steps = token_by_token(ours, tokens)
    assert disagreements(steps, wanted) == 0
    assert relative_error(steps, wanted) < 2e-2
    if name != "llm.int8":
        whole = torch.cat((TOKENS, torch.tensor([tokens])), dim=1)
        with torch.no_grad():
            again = ours(input_ids=whole, use_cache=False).logits[0, TOKENS.shape[1] - 1 : -1]
        assert relative_error(steps, again) < 2e-2


@pytest.mark.parametrize("folder", ["ct_w4_sym_g32", "ct_w3_sym_g32", "ct_w8a8_dyn", "ct_w8a8_static", "ct_mixed"])
def test_checkpoints_of_the_library_speak_as_in_transformers(folder: str) -> None:
    ours, theirs = load_quantized(GOLDEN / folder), by_transformers(GOLDEN / folder)
    expected, wanted = token_by_token(theirs)
    _, steps = token_by_token(ours, expected)
    assert disagreements(steps, wanted) == 0
    assert relative_error(steps, wanted) < (2e-2 if "w8a8" in folder or "mixed" in folder else 1e-5)


def test_a_batch_with_padding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    ids = torch.cat((TOKENS, TOKENS.roll(3)))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_conv1d_speaks(tmp_path: Path) -> None:
    model = random_model(gpt2())
    write_checkpoint(tmp_path, model, everything(Scheme(4, 32)))
    assert token_by_token(load_quantized(tmp_path))[0] == token_by_token(model)[0]


def test_the_package_hands_it_on(tmp_path: Path) -> None:
    assert ptqcli.load_quantized is load_quantized
    with pytest.raises(AttributeError, match="load_quantised"):
        ptqcli.load_quantised  # noqa: B018


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_block_compiles_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    model: Any = load_quantized(tmp_path)
    mlp = model.model.layers[0].mlp
    x = random_inputs(1, 5, 128)
    assert isinstance(mlp.down_proj, TorchInt4WeightOnly)
    with torch.no_grad():
        assert torch.allclose(torch.compile(mlp, fullgraph=True)(x), mlp(x), atol=1e-5)


def test_it_loads_while_transformers_has_another_default(tmp_path: Path) -> None:
    """``AutoModelForCausalLM`` knows nothing of the layers here; both can be used in one program."""
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    first = logits(load_quantized(tmp_path))
    pytest.importorskip("compressed_tensors")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path)), first)


def test_a_loaded_model_refuses_to_be_saved(tmp_path: Path) -> None:
    """transformers would write the kernels' layout without a scheme, and load random weights in its place."""
    write_checkpoint(tmp_path / "packed", random_model(llama()), everything(Scheme(4, 32)))
    model: Any = load_quantized(tmp_path / "packed")
    with pytest.raises(PTQError, match=r"cannot be saved; copy .*packed instead"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
