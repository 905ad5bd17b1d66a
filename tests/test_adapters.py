"""EoRA and the adapters that it is written as, beside textbook forms and peft."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from safetensors.torch import load_file, save_file
from tiny import make_model, token_ids, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli.adapters.eora import beside_bias, low_rank_correction
from ptqcli.adapters.files import CONFIG_FILE, TENSOR_FILE, read_adapter
from ptqcli.adapters.low_rank import LowRank
from ptqcli.checkpoint.auxiliary import ADAPTER
from ptqcli.cli import quantize_report
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.linears import linear_weight
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.runtime import load_quantized

RANK = 4
WIDER = 16  # of the adapters in checkpoints of 64 columns


def problem(out_features: int, in_features: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A difference D [out, in], and inputs X [in, tokens] whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-2, 1, in_features, dtype=torch.float64)
    X = sizes[:, None] * (mixing @ torch.randn(in_features, tokens, generator=generator, dtype=torch.float64))
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64), X


def loss(D: Tensor, product: Tensor, X: Tensor) -> float:
    return float(((D - product) @ X).square().sum())


def least_loss(D: Tensor, X: Tensor, rank: int) -> float:
    """What no product of this rank goes below: the energy of ``D H^(1/2)`` beyond its first singular values (Eckart and Young)."""
    values, vectors = torch.linalg.eigh(X @ X.t())
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.t()
    return float(torch.linalg.svdvals(D @ root)[rank:].square().sum())


def papers(D: Tensor, X: Tensor, rank: int) -> Tensor:
    """The paper's product: the eigenvalues' roots in front of the singular values, and undone behind them."""
    values, Q = torch.linalg.eigh(X @ X.t())
    root = values.clamp(min=1e-12).sqrt()
    U, S, V = torch.linalg.svd(D @ Q @ torch.diag(root), full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank] @ torch.diag(1 / root) @ Q.t()


@pytest.mark.parametrize("shape", [(12, 20, 400), (20, 12, 400), (16, 16, 400), (12, 20, 9)], ids=["wide", "tall", "square", "singular H"])
@pytest.mark.parametrize("rank", [1, RANK])
def test_no_product_of_its_rank_has_a_lower_loss(shape: tuple[int, int, int], rank: int) -> None:
    D, X = problem(*shape)
    found = low_rank_correction(D, X @ X.t(), rank)
    assert (found.A.shape, found.B.shape) == ((rank, shape[1]), (shape[0], rank))
    assert loss(D, found.B @ found.A, X) == pytest.approx(least_loss(D, X, rank), rel=1e-9, abs=1e-9 * loss(D, 0 * D, X))
    unweighted = low_rank_correction(D, torch.eye(shape[1]), rank)
    assert loss(D, unweighted.B @ unweighted.A, X) > 1.05 * least_loss(D, X, rank)


def test_it_is_the_product_of_the_paper() -> None:
    D, X = problem(12, 20, 400)
    found = low_rank_correction(D, X @ X.t(), RANK)
    torch.testing.assert_close(found.B @ found.A, papers(D, X, RANK), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 9, 100), (9, 5, 100)])
def test_a_rank_above_the_smaller_side_gives_back_everything_and_zeros(shape: tuple[int, int, int]) -> None:
    D, X = problem(*shape)
    found = low_rank_correction(D, X @ X.t(), 7)
    torch.testing.assert_close(found.B @ found.A, D)
    assert not found.A[5:].any()
    assert not found.B[:, 5:].any()


def test_no_difference_and_no_inputs_are_no_trouble() -> None:
    D, X = problem(6, 8, 50)
    assert not low_rank_correction(0 * D, X @ X.t(), RANK).matrix().any()
    unseen = low_rank_correction(D, torch.zeros(8, 8), RANK)
    assert torch.isfinite(unseen.matrix()).all()
    assert (D - unseen.matrix()).norm() <= D.norm()


def test_beside_a_bias_that_takes_the_mean_it_is_the_best_for_the_rest() -> None:
    """Reduced-rank regression: no ``B A x`` of its rank is closer to ``D (x - mu)``."""
    D, X = problem(12, 20, 400)
    X = X + 3 * X.std(dim=1, keepdim=True)
    H, s, mean = X @ X.t(), X.sum(dim=1), X.mean(dim=1, keepdim=True)
    wanted = D @ (X - mean)
    found = low_rank_correction(beside_bias(D, H, s, X.shape[1], "x"), H, RANK)
    best = wanted @ torch.linalg.pinv(X)  # without a limit of the rank
    least = float((wanted - best @ X).square().sum() + torch.linalg.svdvals(best @ X)[RANK:].square().sum())
    assert float((wanted - found.B @ found.A @ X).square().sum()) == pytest.approx(least, rel=1e-6)
    without = low_rank_correction(D, H, RANK)
    assert float((wanted - without.B @ without.A @ X).square().sum()) > 1.05 * least


def test_neither_half_depends_on_the_number_of_tokens() -> None:
    D, X = problem(12, 20, 400)
    few, many = (low_rank_correction(D, factor * X @ X.t(), RANK) for factor in (1, 1e6))
    torch.testing.assert_close(few.A.abs(), many.A.abs())
    torch.testing.assert_close(few.A.norm(dim=1), few.B.norm(dim=0))


# In checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and their checkpoints with and without an adapter."""
    folder = tmp_path_factory.mktemp("made")
    write_text(folder / "text.txt")
    for name in ("llama", "gpt2"):
        make_model(folder / name, name)
        quantize(folder / name, request_for(folder, adapter_rank=WIDER), folder / f"{name}-out")
    quantize(folder / "llama", request_for(folder), folder / "plain")
    return folder


def request_for(folder: Path, **changes: Any) -> Recipe:
    given = {"algo": "gptq", "wbits": 2, "group_size": 32, "calib": str(folder / "text.txt"), "nsamples": 8, "seqlen": 48, **changes}
    return load_recipe(flags=given)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return found


def dequantized(original: Path, checkpoint: Path) -> Any:
    """The original with the values of the codes in the place of its weights, and the checkpoint's biases."""
    model, packed = AutoModelForCausalLM.from_pretrained(original), open_checkpoint(checkpoint)
    for name in packed.schemes:
        linear = model.get_submodule(name)
        with torch.no_grad():
            linear_weight(linear).copy_(packed.weight(name).dequantize())
            if linear.bias is not None:
                linear.bias.copy_(packed.tensors.read(packed.names.disk(f"{name}.bias") or ""))
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, which peft 0.21 asks for it
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_computes_what_we_compute(made: Path, name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    out = made / f"{name}-out"
    theirs = dequantized(made / name, out)
    without = logits(theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, out / ADAPTER)  # it warns of keys that are missing, and this would fail
    ours = logits(load_quantized(out, adapter=True))
    torch.testing.assert_close(ours, logits(adapted), rtol=1e-4, atol=1e-4)
    assert (ours - without).abs().max() > 1e-2  # and it does something
    assert len(adapted.peft_config["default"].target_modules) == len(load_report(out)["layers"])


def load_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "ptq_report.json").read_text())
    return report


def test_the_outputs_come_closer_to_the_originals(made: Path) -> None:
    original = logits(AutoModelForCausalLM.from_pretrained(made / "llama"))
    off, beside = (float((logits(load_quantized(made / "llama-out", adapter=use)) - original).norm()) for use in (False, True))
    assert beside < 0.9 * off
    for layer in load_report(made / "llama-out")["layers"]:
        assert layer["adapter_error"] < 0.98 * layer["relative_error"]


def test_codes_do_not_depend_on_the_adapter_and_rank_0_is_none(made: Path, tmp_path: Path) -> None:
    assert filecmp.cmp(made / "plain" / "model.safetensors", made / "llama-out" / "model.safetensors", shallow=False)
    quantize(made / "llama", request_for(made, adapter_rank=0), tmp_path / "zero")
    assert sorted(path.name for path in (tmp_path / "zero").iterdir()) == sorted(path.name for path in (made / "plain").iterdir())
    assert load_report(tmp_path / "zero") == load_report(made / "plain")


def test_rounding_and_8_bit_activations_get_one_too(made: Path, tmp_path: Path) -> None:
    """Neither asks for a Hessian by itself; the errors with the adapter are measured on inputs that are rounded for the codes alone."""
    for name, changes in (("rtn", {"algo": "rtn"}), ("w8a8", {"algo": "rtn", "wbits": None, "group_size": None, "scheme": "w4a8"})):
        quantize(made / "llama", request_for(made, adapter_rank=RANK, **changes), tmp_path / name)
        assert all(layer["adapter_error"] < layer["relative_error"] for layer in load_report(tmp_path / name)["layers"])
        assert len(read_adapter(tmp_path / name / ADAPTER)) == len(load_report(tmp_path / name)["layers"])


def test_two_runs_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    quantize(made / "llama", request_for(made, adapter_rank=WIDER), tmp_path / "again")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert filecmp.cmp(made / "llama-out" / ADAPTER / file, tmp_path / "again" / ADAPTER / file, shallow=False)


def test_a_checkpoint_with_an_adapter_is_replaced_unless_something_else_lies_there(made: Path, tmp_path: Path) -> None:
    small = request_for(made, algo="rtn", wbits=4, adapter_rank=1)
    quantize(made / "llama", small, tmp_path / "out")
    quantize(made / "llama", request_for(made, algo="rtn", wbits=4), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / ADAPTER).exists()
    quantize(made / "llama", small, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / ADAPTER / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds adapter/thesis\.txt"):
        quantize(made / "llama", small, tmp_path / "out", overwrite=True)


def test_ranks_out_of_range_are_told(made: Path) -> None:
    for rank in (-1, 513):
        with pytest.raises(UsageError, match=f"adapter rank {rank} is out of range"):
            request_for(made, adapter_rank=rank)


def test_eval_adds_it_when_asked(ptq: Ptq, made: Path) -> None:
    def kl(*flags: str | Path) -> float:
        answer = ptq("eval", made / "llama-out", "--ppl", made / "text.txt", "--seqlen", "48", "--json", *flags)
        assert answer.code == 0, answer.err
        [result] = json.loads(answer.out)["results"]
        return float(result["mean_kl"])

    assert kl("--adapter") == kl("--adapter", made / "llama-out" / ADAPTER) < kl()
    refused = ptq("eval", made / "plain", "--ppl", made / "text.txt", "--adapter")
    assert "holds no adapter_config.json" in one_line(refused)
    assert "is not quantized" in one_line(ptq("eval", made / "llama", "--ppl", made / "text.txt", "--adapter"))
    assert quantize_report.ADAPTER == ADAPTER


# Adapters of others


def keyed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))

    return change


def stored(change: Callable[[dict[str, Tensor]], Any], **keys: Any) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        keyed(**keys)(folder)
        tensors = load_file(folder / TENSOR_FILE)
        change(tensors)
        save_file(tensors, folder / TENSOR_FILE)

    return rewrite


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "another kind": (keyed(peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (keyed(use_dora=True), "use_dora is True"),
    "ranks that differ": (keyed(rank_pattern={"q_proj": 2}), "rank_pattern is"),
    "no rank": (keyed(r=0), "r is 0 and lora_alpha 16"),
    "a rank of text": (keyed(r="4"), "r is '4'"),
    "a scaling that is not finite": (keyed(lora_alpha=float("inf")), "lora_alpha inf"),
    "a scaling that no float holds": (keyed(lora_alpha=10**400), "lora_alpha 1000000"),
    "one half": (stored(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")), "one half of the adapter of 'model.layers.0.self_attn.q_proj'"),
    "an odd tensor": (stored(lambda tensors: tensors.update({"x": torch.ones(2)})), "'x' is no tensor of a plain LoRA adapter"),
    "no matrix": (stored(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4)})), "not a floating matrix"),
    "two ranks": (stored(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(3, 64)})), "do not fit together"),
    "another width": (stored(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(WIDER, 63)})), r"is for a matrix \[64, 63\]"),
    "a product out of range": (
        stored(lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.full((64, WIDER), 3e38)}), lora_alpha=2 * WIDER),
        "times lora_alpha / r leaves the range",
    ),
    "NaN": (stored(lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(torch.nan)), "NaN or infinity"),
    "nothing": (stored(dict.clear), "holds nothing"),
    "no model's": (
        stored(lambda tensors: tensors.update({key.replace(".0.", ".7."): value.clone() for key, value in list(tensors.items())})),
        "which is no linear of this model",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_or_another_kind_is_told_by_name(made: Path, tmp_path: Path, kind: str) -> None:
    damage, said = BROKEN[kind]
    for file in (CONFIG_FILE, TENSOR_FILE):
        (tmp_path / file).write_bytes((made / "llama-out" / ADAPTER / file).read_bytes())
    damage(tmp_path)
    with pytest.raises(PTQError, match=said):
        load_quantized(made / "llama-out", adapter=tmp_path)


def test_alpha_is_multiplied_in(made: Path, tmp_path: Path) -> None:
    for file in (CONFIG_FILE, TENSOR_FILE):
        (tmp_path / file).write_bytes((made / "llama-out" / ADAPTER / file).read_bytes())
    plain = read_adapter(tmp_path)
    keyed(lora_alpha=2 * WIDER)(tmp_path)
    doubled = read_adapter(tmp_path)
    assert all(torch.equal(doubled[name].matrix(), 2 * plain[name].matrix()) for name in plain)
    assert isinstance(next(iter(plain.values())), LowRank)
