"""Perplexity and divergence against plain transformers, a loop over single tokens, and float64 formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation import perplexity as perplexity_module
from ptqcli.evaluation.divergence import compare
from ptqcli.evaluation.perplexity import PerplexityResult, perplexity, result
from ptqcli.evaluation.windows import Window, plan_windows

VOCABULARY = 97
DEMO = Path(ptqcli.__file__).parent / "demo"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    options: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        # Large enough that the distributions are far from uniform.
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (150,), generator=torch.Generator().manual_seed(7))


def with_one_weight_changed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight[3, 5] += 0.5
    return twin


@torch.no_grad()
def plain_perplexity(model: LlamaForCausalLM, ids: Tensor, seqlen: int) -> float:
    """The published protocol with transformers' own loss."""
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, 1, seqlen)
    losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def log_probs_one_by_one(model: LlamaForCausalLM, ids: Tensor, seqlen: int, stride: int) -> Tensor:
    """For every token but the first, its distribution from one forward pass of its own, float64 [tokens - 1, vocabulary].

    A token belongs to the first window that holds it; windows start at multiples of the stride.
    """
    rows = []
    for position in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if position < start + seqlen)
        rows.append(model(input_ids=ids[None, start:position]).logits[0, -1].double().log_softmax(-1))
    return torch.stack(rows)


# Windows


def test_windows_without_stride_drop_the_tail() -> None:
    assert plan_windows(10, 4) == plan_windows(10, 4, 4) == [Window(0, 4, 3), Window(4, 4, 3)]


def test_overlapping_windows_keep_the_tail() -> None:
    assert plan_windows(9, 4, 2) == [Window(0, 4, 3), Window(2, 4, 2), Window(4, 4, 2), Window(6, 3, 1)]
    assert plan_windows(4, 4, 2) == [Window(0, 4, 3)]


@pytest.mark.parametrize("stride", [1, 2, 5, 11])
@pytest.mark.parametrize("tokens", [12, 13, 40, 41])
def test_overlapping_windows_score_every_token_once(tokens: int, stride: int) -> None:
    windows = plan_windows(tokens, 12, stride)
    scored = [window.start + window.length - back for window in windows for back in range(window.scored, 0, -1)]
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize(
    ("tokens", "seqlen", "stride", "message"),
    [
        (10, 1, None, "a window of 1 tokens has nothing to predict; give --seqlen 2 or more"),
        (10, 4, 5, "stride 5 does not fit windows of 4 tokens; give --stride 1 to 4"),
        (10, 4, 0, "stride 0 does not fit windows of 4 tokens; give --stride 1 to 4"),
        (10, 12, None, "the text has 10 tokens, less than one window of 12; give --seqlen 10 or less, or more text"),
        (1, 4, None, "the text has 1 tokens, less than one window of 4; give more text"),
    ],
)
def test_windows_that_cannot_be(tokens: int, seqlen: int, stride: int | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_windows(tokens, seqlen, stride)
    assert str(caught.value) == message


# Perplexity


@pytest.mark.parametrize("seqlen", [2, 50, 64])
def test_perplexity_is_that_of_plain_transformers(model: LlamaForCausalLM, ids: Tensor, seqlen: int) -> None:
    found = perplexity(model, ids, seqlen)
    windows = 150 // seqlen
    assert found.perplexity == pytest.approx(plain_perplexity(model, ids, seqlen), rel=1e-5)
    assert (found.windows, found.tokens) == (windows, windows * (seqlen - 1))
    assert (found.seqlen, found.stride) == (seqlen, seqlen)
    assert found.perplexity == math.exp(found.mean_nll)


def test_one_changed_weight_is_seen(model: LlamaForCausalLM, ids: Tensor) -> None:
    changed = perplexity(with_one_weight_changed(model), ids, 16).perplexity
    assert changed != pytest.approx(plain_perplexity(model, ids, 16), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 5, 11])
@pytest.mark.parametrize("tokens", [12, 40, 43])
def test_stride_is_a_loop_over_single_tokens(model: LlamaForCausalLM, ids: Tensor, tokens: int, stride: int) -> None:
    log_probs = log_probs_one_by_one(model, ids[:tokens], 12, stride)
    losses = -log_probs.gather(1, ids[1:tokens, None])
    found = perplexity(model, ids[:tokens], 12, stride)
    assert found.mean_nll == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.tokens == tokens - 1
    assert found.stride == stride


def test_batches_and_chunks_do_not_change_the_result(model: LlamaForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(model, ids, 16).mean_nll
    for batch_size in (1, 2, 100):
        assert perplexity(model, ids, 16, batch_size=batch_size).mean_nll == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(perplexity_module, "LOGITS_PER_CHUNK", 4 * VOCABULARY)
    assert perplexity(model, ids, 16).mean_nll == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(perplexity_module, "TOKENS_PER_BATCH", 1)
    assert perplexity(model, ids, 16, 7).mean_nll == pytest.approx(perplexity(model, ids, 16, 7, 3).mean_nll, rel=1e-6)


def test_losses_of_a_bfloat16_model_are_computed_in_float32(ids: Tensor) -> None:
    model = random_llama().to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=ids[:144].view(-1, 16)).logits[:, :-1].double()
    targets = ids[:144].view(-1, 16)[:, 1:, None]
    expected = -logits.log_softmax(-1).gather(2, targets).mean().item()
    assert perplexity(model, ids, 16).mean_nll == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off_and_the_mode_comes_back(ids: Tensor) -> None:
    model = random_llama(attention_dropout=0.5)
    expected = perplexity(model, ids, 16).mean_nll
    assert not model.training
    model.train()
    assert perplexity(model, ids, 16).mean_nll == expected
    assert model.training


def test_progress_counts_windows(model: LlamaForCausalLM, ids: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(model, ids, 16, batch_size=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.skipif(not (DEMO / "model.safetensors").is_file(), reason="the demo model is not there yet")
def test_perplexity_of_the_demo_model_is_that_of_plain_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = torch.tensor(tokenizer(Path(__file__).read_text(encoding="utf-8")[:4000])["input_ids"])
    assert perplexity(model, ids, 128).perplexity == pytest.approx(plain_perplexity(model, ids, 128), rel=1e-5)


def test_requests_that_cannot_work(model: LlamaForCausalLM, ids: Tensor) -> None:
    with pytest.raises(UsageError) as caught:
        perplexity(model, ids, 65)
    assert str(caught.value) == "a window of 65 tokens is longer than the model's 64 positions; lower --seqlen"
    with pytest.raises(UsageError, match="a batch of 0 windows does not work; give 1 or more"):
        perplexity(model, ids, 16, batch_size=0)
    with pytest.raises(UsageError, match="the text has 0 tokens, less than one window of 16; give more text"):
        perplexity(model, ids[:0], 16)


def test_ids_of_another_tokenizer(model: LlamaForCausalLM) -> None:
    with pytest.raises(PTQError) as caught:
        perplexity(model, torch.arange(VOCABULARY + 1), 16)
    assert type(caught.value) is PTQError
    assert str(caught.value) == (
        "the token ids of the text are 0 to 97, and the model has 97 embeddings; use the tokenizer that belongs to the model"
    )


def test_a_damaged_weight_is_an_error(model: LlamaForCausalLM, ids: Tensor) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(PTQError) as caught:
        perplexity(damaged, ids, 16, batch_size=2)
    assert type(caught.value) is PTQError
    assert str(caught.value).startswith(
        "perplexity is not finite: for tokens 0 to 31 of the text the logits hold nan or infinity; the weights are damaged"
    )


def test_a_loss_whose_exponential_overflows() -> None:
    windows = plan_windows(8, 4)
    assert result(600.0, windows, 4, None) == PerplexityResult(
        perplexity=math.exp(100), mean_nll=100.0, tokens=6, windows=2, seqlen=4, stride=4, bos=False
    )
    with pytest.raises(PTQError, match=r"perplexity is not finite: the mean loss is 1000 nats"):
        result(6000.0, windows, 4, None)


# Divergence


@pytest.mark.parametrize("stride", [None, 5])
def test_divergence_is_that_of_the_float64_formula(model: LlamaForCausalLM, ids: Tensor, stride: int | None) -> None:
    baseline, changed, text = model, random_llama(seed=1), ids[:48]
    if stride is None:
        windows = [text[start : start + 12] for start in range(0, 48, 12)]
        q, p = (torch.cat([log_probs_one_by_one(each, window, 12, 12) for window in windows]) for each in (changed, baseline))
    else:
        q, p = (log_probs_one_by_one(each, text, 12, stride) for each in (changed, baseline))
    found = compare(changed, baseline, text, 12, stride)
    assert found.mean_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.model == perplexity(changed, text, 12, stride)
    assert found.baseline == perplexity(baseline, text, 12, stride)


def test_divergence_has_a_direction(model: LlamaForCausalLM, ids: Tensor) -> None:
    other = random_llama(seed=1)
    forth, back = compare(other, model, ids, 12), compare(model, other, ids, 12)
    assert forth.mean_kl != pytest.approx(back.mean_kl, rel=1e-3)
    assert forth.top1_agreement == back.top1_agreement < 0.5


def test_a_model_does_not_diverge_from_itself_and_does_from_its_twin(model: LlamaForCausalLM, ids: Tensor) -> None:
    same = compare(model, model, ids, 16)
    assert (same.mean_kl, same.top1_agreement) == (0.0, 1.0)
    twin = compare(with_one_weight_changed(model), model, ids, 16)
    assert twin.mean_kl > 1e-4
    assert 0.5 < twin.top1_agreement <= 1.0


def test_a_small_divergence_is_not_lost_in_rounding(model: LlamaForCausalLM, ids: Tensor) -> None:
    """A change of the size that 8-bit weights make, beside the same two models in float64."""
    torch.manual_seed(0)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.model.layers.parameters():
            weight += 1e-3 * weight.abs().max() * torch.randn_like(weight)
    found = compare(changed, model, ids, 16).mean_kl
    exact_models = copy.deepcopy(changed).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        q, p = (each(input_ids=ids[:144].view(-1, 16)).logits[:, :-1].log_softmax(-1) for each in exact_models)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert exact < 1e-2
    assert found == pytest.approx(exact, rel=1e-2)


def test_models_of_different_vocabularies(model: LlamaForCausalLM, ids: Tensor) -> None:
    with pytest.raises(UsageError) as caught:
        compare(model, random_llama(vocab_size=98), ids, 16)
    assert str(caught.value) == (
        "the model has a vocabulary of 97 tokens and the baseline one of 98, so they cannot be compared; "
        "give the baseline that the model was made from"
    )


def test_a_damaged_baseline_is_an_error(model: LlamaForCausalLM, ids: Tensor) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(PTQError, match="perplexity is not finite"):
        compare(model, damaged, ids, 16)
