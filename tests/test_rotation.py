"""Rotations are found in every architecture that has room for them, refused by name elsewhere, and leave the logits as they were."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import ARCHITECTURES, ROTARY, make_model, token_ids, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptqcli.checkpoint.tensors import MemoryTensors, NewTensor, RewrittenTensors, SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.rewritten import Rewrite
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder, ModelInMemory
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.report import LOGS, read_report
from ptqcli.pipeline.rewriting import logits, logits_moved
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized
from ptqcli.transforms.cut import CutError
from ptqcli.transforms.hadamard import random_rotation
from ptqcli.transforms.residual_stream import Gain, ModelInPieces
from ptqcli.transforms.rotation import HARM, Rotate

CPU = torch.device("cpu")
HIDDEN, HEAD = 64, 16
NOISE = 2e-6  # of code that computes norms and softmax in float32 whatever the dtype of the model

MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}
MORE = {
    "gemma": ("GemmaConfig", {**ROTARY, "head_dim": HEAD}),  # 1 + weight, and an embedding times the root of the width
    "granite": ("GraniteConfig", {**ROTARY, **MULTIPLIERS}),
    "smollm3": ("SmolLM3Config", ROTARY),
    "glm": ("GlmConfig", {**ROTARY, "head_dim": HEAD}),
    "odd": ("LlamaConfig", {**ROTARY, "hidden_size": 72, "head_dim": 20, "intermediate_size": 96}),  # 72 = 8 x 9, and heads of 4 x 5
    "olmo": ("OlmoConfig", ROTARY),  # norms without parameters
    "cohere": ("CohereConfig", ROTARY),  # one norm for attention and MLP, no bias, a mean
    "phi": ("PhiConfig", ROTARY),
    "nemotron": ("NemotronConfig", ROTARY),
}
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite", "smollm3", "glm", "odd")
MEAN = "subtracts the mean of the channels"
SANDWICH = "is added to the residual stream, and only what linears and embeddings give can be rotated"
REFUSED = {
    "gpt2": f"transformer.h.0.ln_1 (LayerNorm) {MEAN}",
    "gpt_neox": f"gpt_neox.layers.0.input_layernorm (LayerNorm) {MEAN}",
    "opt": f"model.decoder.layers.0.self_attn_layer_norm (LayerNorm) {MEAN}",
    "bloom": f"transformer.h.0.input_layernorm (LayerNorm) {MEAN}",
    "falcon": f"transformer.h.0.input_layernorm (LayerNorm) {MEAN}",
    "stablelm": f"model.layers.0.input_layernorm (LayerNorm) {MEAN}",
    "phi": f"model.layers.0.input_layernorm (LayerNorm) {MEAN}",
    "nemotron": f"model.layers.0.input_layernorm (NemotronLayerNorm1P) {MEAN}",
    "cohere": f"model.layers.0.input_layernorm (CohereLayerNorm) {MEAN}",
    "olmo": "model.layers.0.self_attn.q_proj reads the residual stream in another way",
    "gemma2": f"what model.layers.0.post_attention_layernorm (Gemma2RMSNorm) gives {SANDWICH}",
    "gemma3": f"what model.layers.0.post_attention_layernorm (Gemma3RMSNorm) gives {SANDWICH}",
    "olmo2": f"what model.layers.0.post_attention_layernorm (Olmo2RMSNorm) gives {SANDWICH}",
}


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, name, entry)


@torch.no_grad()
def make(folder: Path, architecture: str, **changes: Any) -> Any:
    """A tiny model whose norms multiply by numbers that differ, saved in ``folder``."""
    model = make_model(folder, architecture, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "bias" not in name:
            parameter.copy_(torch.empty(parameter.shape).uniform_(0.5, 2, generator=generator))
    model.save_pretrained(folder)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def pieces_of(skeleton: Skeleton) -> ModelInPieces:
    return ModelInPieces(skeleton.model, lambda twin, _: skeleton.kind.call(twin, token_ids(8)).logits)


# What is found


def test_the_stream_of_a_llama_is_the_known_one(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    stream = pieces_of(Skeleton(ModelFolder(tmp_path))).stream("lm_head")
    blocks = [f"model.layers.{index}" for index in range(2)]
    assert stream.width == HIDDEN
    writers = [f"{block}.{local}" for block in blocks for local in ("self_attn.o_proj", "mlp.down_proj")]
    assert stream.writers == ("model.embed_tokens", *writers)
    norms = {f"{block}.{local}" for block in blocks for local in ("input_layernorm", "post_attention_layernorm")}
    assert stream.norms == {norm: Gain(f"{norm}.weight", 0.0) for norm in (*norms, "model.norm")}
    expected = {"lm_head": "model.norm"}
    for block in blocks:
        expected |= {f"{block}.self_attn.{name}_proj": f"{block}.input_layernorm" for name in "qkv"}
        expected |= {f"{block}.mlp.{name}_proj": f"{block}.post_attention_layernorm" for name in ("gate", "up")}
    assert stream.readers == expected


@pytest.mark.parametrize(
    "architecture, first, size",
    [
        ("llama", [0, 16], HEAD),  # two heads of values for four of queries
        ("phi3", [96, 112], HEAD),  # behind the queries and keys of a fused linear
        ("gpt_neox", [32, 80, 128, 176], HEAD),  # [q k v] head by head
        ("falcon", [80], HEAD),  # one head for all
        ("odd", [0, 20], 20),
    ],
)
def test_heads_are_the_known_ones(architecture: str, first: list[int], size: int, tmp_path: Path) -> None:
    make(tmp_path, architecture)
    heads = pieces_of(Skeleton(ModelFolder(tmp_path))).heads()
    assert len(heads) == 2
    for found in heads:
        assert found.channels.tolist() == [list(range(start, start + size)) for start in first]


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_rotated_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    make(tmp_path, architecture)
    with pytest.raises(UsageError) as caught:
        plan_run(tmp_path, Recipe(algo="rotate+gptq", group_size=32), Resources())
    assert REFUSED[architecture] in str(caught.value)
    assert "use equalize in its place, or --no-rotate-stream for the heads alone" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_that_cannot_be_rotated_goes_without_where_that_is_asked_for(architecture: str, tmp_path: Path) -> None:
    make(tmp_path, architecture)
    recipe = load_recipe(flags={"algo": "rotate+gptq", "rotate_unsuited": "skip", "group_size": 32})
    skeleton, plan = plan_run(tmp_path, recipe, Resources())
    assert isinstance(skeleton.source, ModelFolder), "the file's own tensors"
    assert plan.rewrites == ()
    assert plan.notes[0].startswith("rotate is left out, as it does not suit this model: ")
    assert REFUSED[architecture] in plan.notes[0]


def test_codes_without_the_rotation_are_those_of_the_solver_alone(tmp_path: Path) -> None:
    make(tmp_path / "model", "gpt2")
    found = []
    for algo, options in (("gptq", {}), ("rotate+gptq", {"rotate_unsuited": "skip"})):
        flags = {"algo": algo, "group_size": 32, "calib": str(write_text(tmp_path / "text.txt")), "nsamples": 2, "seqlen": 16, **options}
        quantize(tmp_path / "model", load_recipe(flags=flags), tmp_path / algo)
        found.append(SafetensorsFolder(tmp_path / algo))
    assert found[0].names == found[1].names
    assert all(torch.equal(found[0].read(name), found[1].read(name)) for name in found[0].names)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "bloom", "falcon"])
def test_heads_alone_are_rotated_where_the_stream_cannot_be(architecture: str, tmp_path: Path) -> None:
    make(tmp_path, architecture)
    skeleton, plan = plan_run(tmp_path, load_recipe(flags={"algo": "rotate+gptq", "rotate_stream": False, "group_size": 32}), Resources())
    assert plan.rewrites == ("rotated the values of 2 attentions in heads of 16 (seed 0)",)
    assert plan.bytes_before == skeleton.total_bytes
    assert 1e-14 < logits_moved(skeleton.source, None, CPU) < 1e-5


class Stream(nn.Module):
    """A model of one block whose stream is read through ``look``, and whose writers add what ``add`` makes of their output."""

    def __init__(self, look: Callable[[Tensor], Tensor] = lambda x: x, add: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(32, 8), nn.RMSNorm(8), nn.RMSNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 32)
        self.look, self.add = look, add

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.add(self.down(self.up(self.look(self.norm(x))).relu()))
        return self.head(self.last(x))


def in_pieces(model: nn.Module) -> ModelInPieces:
    return ModelInPieces(model, lambda twin, _: twin(token_ids(6) % 32))


@pytest.mark.parametrize("look, add", [(lambda x: x, lambda x: x), (lambda x: 3 * x, lambda x: x * -0.25)])
def test_constant_factors_on_the_way_do_no_harm(look: Any, add: Any) -> None:
    stream = in_pieces(Stream(look, add)).stream("head")
    assert (stream.writers, stream.readers) == (("embed", "down"), {"up": "norm", "head": "last"})


@pytest.mark.parametrize(
    "look, add, name",
    [
        (torch.relu, lambda x: x, "up"),
        (lambda x: x.roll(1, dims=-1), lambda x: x, "up"),
        (lambda x: x + 1, lambda x: x, "up"),
        (lambda x: x, torch.tanh, "last"),
        (lambda x: x, lambda x: x * torch.linspace(0.5, 2, 8), "last"),
        (lambda x: x, lambda x: x + 1, "last"),
    ],
)
def test_other_code_on_the_way_forbids_the_rotation(look: Any, add: Any, name: str) -> None:
    with pytest.raises(CutError, match=f"^{name} reads the residual stream in another way"):
        in_pieces(Stream(look, add)).stream("head")


class ByName(nn.RMSNorm):
    """A norm that is called with its input by name."""

    def forward(self, *, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class CalledByName(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.last = ByName(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.last(hidden_states=x + self.down(self.up(self.norm(x)).relu())))


def test_a_norm_may_be_called_by_name() -> None:
    assert in_pieces(CalledByName()).stream("head") == in_pieces(Stream()).stream("head")


class Observed(Stream):
    """Something else reads the stream, or the output of a norm."""

    def __init__(self, watched: str) -> None:
        super().__init__()
        self.watched = watched

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        seen = x if self.watched == "stream" else self.norm(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.last(x)) * seen.amax()


@pytest.mark.parametrize("watched, reason", [("stream", "the model reads the residual stream"), ("norm", "norm runs more than once")])
def test_a_model_that_looks_at_its_stream_is_refused(watched: str, reason: str) -> None:
    with pytest.raises(CutError, match=reason):
        in_pieces(Observed(watched)).stream("head")


def test_an_expert_that_no_token_reached_is_refused() -> None:
    model = Stream()
    model.idle = nn.Linear(8, 8)
    with pytest.raises(CutError, match="idle did not run on the probe"):
        in_pieces(model).stream("head")


# What the rotated model computes


def stored(folder: Path) -> dict[str, Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name) for name in source.names}


def rewrite(folder: Path, **options: Any) -> Rewrite:
    return Rotate(**options).prepare(Skeleton(ModelFolder(folder)))


def loaded_in_float64(folder: Path, tensors: dict[str, Tensor], config: Any) -> Any:
    """The model of ``config`` as transformers loads it from a file of these tensors, none of which has a tied twin."""
    config.tie_word_embeddings, config.dtype = False, "float64"
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ROTATED)
@torch.no_grad()
def test_transformers_gives_equal_logits_in_float64(architecture: str, tied: bool, tmp_path: Path) -> None:
    """The bound is the noise of norms and softmax, which transformers computes in float32 whatever the model's dtype."""
    model = make(tmp_path / "model", architecture, tie_word_embeddings=tied).double()
    change = rewrite(tmp_path / "model")
    wide = MemoryTensors({name: tensor.double() for name, tensor in stored(tmp_path / "model").items()})
    source = RewrittenTensors(wide, change.tensors)
    expected = model(input_ids=token_ids()).logits
    rotated = loaded_in_float64(tmp_path / "rotated", {name: source.read(name) for name in source.names}, model.config)
    assert rotated.lm_head.weight.dtype == torch.float64
    assert relative(rotated(input_ids=token_ids()).logits, expected) < NOISE
    assert relative(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight) > 0.5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@torch.no_grad()
def test_one_flipped_sign_anywhere_shows(architecture: str, tmp_path: Path) -> None:
    """The twin of the test before, for every tensor that is rewritten: matrices and biases, of writers, readers and heads; norms."""
    model = make(tmp_path / "model", architecture).double()
    change = rewrite(tmp_path / "model")
    wide = MemoryTensors({name: tensor.double() for name, tensor in stored(tmp_path / "model").items()})
    source = RewrittenTensors(wide, change.tensors)
    expected = model(input_ids=token_ids()).logits
    rotated = loaded_in_float64(tmp_path / "rotated", {name: source.read(name) for name in source.names}, model.config)
    changed = [name for name in source.names if not torch.equal(source.read(name), wide.read(name))]
    assert set(changed) == set(change.tensors)
    assert len(changed) == {"llama": 21, "qwen2": 23, "phi3": 15}[architecture]
    for name in changed:
        parameter = rotated.get_parameter(name)
        place = (..., 5) if name.startswith("model.embed") else (5,) if parameter.dim() == 1 else (slice(None), 5)
        parameter[place] *= -1
        assert relative(rotated(input_ids=token_ids()).logits, expected) > 100 * NOISE, name
        parameter[place] *= -1
    assert relative(rotated(input_ids=token_ids()).logits, expected) < NOISE


@torch.no_grad()
def test_the_formulas_in_dense_float64(tmp_path: Path) -> None:
    """Each kind of tensor of a llama against the products of the docstring, with R1 and R2 as dense matrices."""
    make(tmp_path, "llama", tie_word_embeddings=True)
    before, change = stored(tmp_path), rewrite(tmp_path, seed=4)
    source = RewrittenTensors(MemoryTensors({name: tensor.double() for name, tensor in before.items()}), change.tensors)
    generator = torch.Generator().manual_seed(4)
    r1, r2 = (random_rotation(size, generator).apply(torch.eye(size)) for size in (HIDDEN, HEAD))
    values, queries = torch.block_diag(r2, r2), torch.block_diag(r2, r2, r2, r2)
    w = {name: tensor.double() for name, tensor in before.items()}
    layer = "model.layers.0."
    gain, last = torch.diag(w[layer + "input_layernorm.weight"]), torch.diag(w["model.norm.weight"])
    expected = {
        "model.embed_tokens.weight": w["model.embed_tokens.weight"] @ r1,
        "lm_head.weight": w["model.embed_tokens.weight"] @ last @ r1,
        layer + "self_attn.q_proj.weight": w[layer + "self_attn.q_proj.weight"] @ gain @ r1,
        layer + "self_attn.v_proj.weight": values.t() @ w[layer + "self_attn.v_proj.weight"] @ gain @ r1,
        layer + "self_attn.o_proj.weight": r1.t() @ w[layer + "self_attn.o_proj.weight"] @ queries,
        layer + "mlp.down_proj.weight": r1.t() @ w[layer + "mlp.down_proj.weight"],
        layer + "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.float64),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(source.read(name), tensor, rtol=0, atol=1e-12)
        assert name not in w or not torch.allclose(source.read(name), w[name], atol=1e-3)


def test_the_seed_settles_the_rotation_and_each_part_can_be_left_out(tmp_path: Path) -> None:
    make(tmp_path, "llama")

    def tensors(**options: Any) -> dict[str, Tensor]:
        source = RewrittenTensors(SafetensorsFolder(tmp_path), rewrite(tmp_path, **options).tensors)
        return {name: source.read(name) for name in source.names}

    plain = tensors()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors(seed=0).items())
    turned = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors(seed=1)[turned], plain[turned])
    before = stored(tmp_path)
    alone = tensors(stream=False)
    assert {name for name in alone if not torch.equal(alone[name], before[name])} == {
        f"model.layers.{index}.self_attn.{name}_proj.weight" for index in range(2) for name in "vo"
    }
    assert torch.equal(tensors(heads=False)[turned], plain[turned])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_each_tensor_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path, "llama", dtype=dtype)
    change = rewrite(tmp_path)
    narrow = RewrittenTensors(SafetensorsFolder(tmp_path), change.tensors)
    exact = RewrittenTensors(MemoryTensors({name: tensor.double() for name, tensor in stored(tmp_path).items()}), change.tensors)
    for name in change.tensors:
        assert narrow.read(name).dtype == narrow.dtype(name) == dtype
        assert torch.equal(narrow.read(name), exact.read(name).to(dtype)), name


# The proof


def test_the_proof_finds_the_logits_equal(tmp_path: Path) -> None:
    for architecture in ("qwen2", "odd"):
        make(tmp_path / architecture, architecture, dtype=torch.bfloat16)
        skeleton, _ = plan_run(tmp_path / architecture, Recipe(algo="rotate+gptq", group_size=-1), Resources())
        assert 1e-14 < logits_moved(skeleton.source, None, CPU) < 1e-5


@torch.no_grad()
def test_the_proof_runs_the_model_as_it_is(tmp_path: Path) -> None:
    model = make(tmp_path, "gemma").double()
    skeleton = Skeleton(ModelFolder(tmp_path))
    assert relative(logits(skeleton, token_ids(), CPU), model(input_ids=token_ids()).logits) < NOISE
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that one linear has turned and another not."""
    make(tmp_path / "model", "llama")
    prepare = Rotate.prepare

    def forgetful(self: Rotate, skeleton: Skeleton) -> Rewrite:
        change = prepare(self, skeleton)
        return replace(change, tensors={name: new for name, new in change.tensors.items() if "layers.1.self_attn.o_proj" not in name})

    monkeypatch.setattr(Rotate, "prepare", forgetful)
    with pytest.raises(PTQError, match=r"behind rotate the model's logits differ by .* leave rotate out"):
        quantize(tmp_path / "model", Recipe(algo="rotate", group_size=32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Whole runs


@pytest.mark.parametrize("bits", [pytest.param(2, marks=pytest.mark.slow), 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture, tied", [("llama", True), ("qwen2", False)])
@torch.no_grad()
def test_a_quantized_checkpoint_loads_in_transformers_with_equal_logits(architecture: str, tied: bool, bits: int, tmp_path: Path) -> None:
    make(tmp_path / "model", architecture, tie_word_embeddings=tied)
    recipe = Recipe(algo="rotate+gptq", wbits=bits, group_size=32, calib=str(write_text(tmp_path / "text.txt")), nsamples=4, seqlen=48)
    report = quantize(tmp_path / "model", recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["architectures"] == json.loads((tmp_path / "model" / "config.json").read_text())["architectures"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = token_ids()
    expected = theirs.eval()(input_ids=ids).logits
    assert relative(load_quantized(tmp_path / "out")(input_ids=ids).logits, expected) < 1e-3
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(input_ids=ids).logits
    assert relative(expected, original) < {2: 1.4, 3: 1.2, 4: 0.8, 8: 0.07}[bits]  # as far as without a rotation
    assert read_report(tmp_path / "out")["rewritten"] == asdict(report.rewritten)
    assert report.rewritten.done == ["rotated the residual stream of 64 channels and the values of 2 attentions in heads of 16 (seed 0)"]
    assert report.rewritten.difference < 1e-5


@pytest.mark.parametrize("algo", ["rotate+awq+gptq", "rotate+equalize+gptq"])
@torch.no_grad()
def test_transforms_of_blocks_work_on_the_rotated_model(algo: str, tmp_path: Path) -> None:
    """In memory, too, and at 8 bits with what they have done to it."""
    model = make(tmp_path / "model", "llama", tie_word_embeddings=True)
    tokenizer = ModelFolder(tmp_path / "model").tokenizer()
    recipe = Recipe(algo=algo, wbits=8, group_size=32, calib=str(write_text(tmp_path / "text.txt")), nsamples=4, seqlen=48)
    report = quantize(ModelInMemory(model, tokenizer), recipe, tmp_path / "out")
    assert len([fold for fold in report.folds if fold.left_alone is None]) == (8 if "awq" in algo else 4)
    ids = token_ids()
    assert relative(load_quantized(tmp_path / "out")(input_ids=ids).logits, model(input_ids=ids).logits) < 0.07


def test_the_same_request_writes_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    for name in ("one", "two"):
        quantize(tmp_path / "model", Recipe(algo="rotate+rtn", group_size=32), tmp_path / name)
    files, others = (sorted(path.name for path in (tmp_path / name).iterdir() if path.name not in LOGS) for name in ("one", "two"))
    assert files == others
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_the_plan_tells_what_a_tied_pair_costs_and_what_harms(tmp_path: Path) -> None:
    make(tmp_path, "llama", tie_word_embeddings=True)
    plain = plan_run(tmp_path, Recipe(algo="gptq", group_size=32), Resources())[1]
    skeleton, plan = plan_run(tmp_path, Recipe(algo="rotate+gptq", group_size=32), Resources())
    head = skeleton.nbytes("lm_head.weight")
    assert (plan.bytes_before, plan.bytes_after) == (plain.bytes_before, plain.bytes_after + head)
    assert f"rotate gives embedding and output head, which share one matrix, one each: {head / 2**20:.1f} MiB more" in plan.notes
    assert ("rewritten", plan.rewrites[0]) in plan.summary_rows()
    assert HARM not in plan.notes
    assert HARM in plan_run(tmp_path, Recipe(algo="rotate", group_size=32), Resources())[1].notes
    make(tmp_path, "llama")
    assert not any("one each" in note for note in plan_run(tmp_path, Recipe(algo="rotate+gptq", group_size=32), Resources())[1].notes)


@pytest.mark.parametrize(
    "request_, reason",
    [
        ({"algo": "awq+rotate+gptq"}, "rotate rewrites the whole model and comes first; write rotate+awq+gptq"),
        ({"algo": "smoothquant+awq+rotate"}, "write rotate+smoothquant+awq+rtn"),
        ({"algo": "rotate+gptq", "rotate_stream": False, "rotate_heads": False}, "rotate has nothing to rotate"),
        ({"algo": "rotate+gptq", "rotate_unsuited": "leave"}, "rotate unsuited 'leave' is unknown; use refuse or skip"),
        ({"algo": "rotate+gptq", "rotate_seed": 2**63}, "rotate seed 9223372036854775808 is too large"),
    ],
)
def test_requests_that_cannot_work_are_refused(request_: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(flags=request_)
    assert reason in str(caught.value)


# Rewritten tensors


def test_rewritten_tensors_are_made_when_they_are_read() -> None:
    read: list[str] = []

    def twice(take: Callable[[str], Tensor]) -> Tensor:
        read.append("a")
        return take("a").double() * 2

    base = MemoryTensors({"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.zeros(4)})
    source = RewrittenTensors(base, {"a": NewTensor("a", twice), "c": NewTensor("a", twice)})
    assert source.names == ("a", "b", "c")
    assert (source.shape("c"), source.dtype("c"), source.total_bytes) == ((2, 3), torch.float16, 12 + 16 + 12)
    assert not read
    assert torch.equal(source.read("c"), torch.full((2, 3), 2, dtype=torch.float16))
    assert torch.equal(source.read("b"), torch.zeros(4))
    assert read == ["a"]
    with pytest.raises(PTQError, match="holds no tensor d"):
        source.shape("d")


@pytest.mark.parametrize(
    "made, reason", [(torch.full((2,), 1e6), "leaves the range of torch.float16"), (torch.ones(3), r"rewritten to \[3\], and takes \[2\]")]
)
def test_a_rewritten_tensor_that_does_not_fit_is_refused(made: Tensor, reason: str) -> None:
    source = RewrittenTensors(MemoryTensors({"a": torch.ones(2, dtype=torch.float16)}), {"a": NewTensor("a", lambda _: made)})
    with pytest.raises(PTQError, match=f"a: .*{reason}"):
        source.read("a")
