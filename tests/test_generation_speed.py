"""Prefill, decode and memory of whole models: what is run, what is counted, and the published definitions by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, POSITIONS, TOKENS, VOCABULARY, make_model, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel

import ptqcli
from ptqcli.bench import generation
from ptqcli.bench.generation import bench_generation, count_operations, generate, peak_memory, weight_bytes
from ptqcli.bench.machine import Machine
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.config import load_config

CPU = torch.device("cpu")
LIMIT = 1e12
MACHINE = Machine(
    name="test", device="cpu", threads=1, cache_bytes=1 << 20, bandwidth=1e10, arithmetic={"float32": LIMIT, "int8": 2 * LIMIT}
)

# A model small enough for paper: 2 layers, 4 heads of 16, 2 of them for keys and values, 64 channels, 128 inside, 257 tokens.
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, gate and up and down
BODY = 2 * LAYER
HEAD = 64 * VOCABULARY
LHQ = 2 * 4 * 16
ROTARY = 2e-4  # of the operations: before transformers 5.18 the angles of rotary embeddings are a small product, which is counted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def calls(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """What each forward pass of ``model`` was given and gave: tokens, length of the cache before it, positions of the logits."""
    seen: list[dict[str, Any]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        seen.append({"ids": kwargs["input_ids"], "cached": 0 if cache is None else cache.get_seq_length()})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[-1]["logits"] = output.logits.shape

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    yield seen
    for hook in hooks:
        hook.remove()


def greedy_without_cache(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -count:]


# What is run


def test_decode_feeds_one_token_a_step_over_the_cache(model: PreTrainedModel, calls: list[dict[str, Any]]) -> None:
    generate(model, token_ids(10, batch=3), new_tokens=5)
    assert [call["ids"].shape for call in calls] == [(3, 10), (3, 1), (3, 1), (3, 1), (3, 1)]
    assert [call["cached"] for call in calls] == [0, 10, 11, 12, 13]


def test_prefill_computes_the_logits_of_the_last_position_alone(model: PreTrainedModel, calls: list[dict[str, Any]]) -> None:
    generate(model, token_ids(10, batch=3), new_tokens=2)
    assert [call["logits"] for call in calls] == [(3, 1, VOCABULARY), (3, 1, VOCABULARY)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "bloom", "falcon"])
def test_the_tokens_are_those_of_greedy_decoding_without_a_cache(tmp_path: Path, architecture: str) -> None:
    model = make_model(tmp_path, architecture)
    ids = token_ids(12)
    assert torch.equal(generate(model, ids, 6).tokens, greedy_without_cache(model, ids, 6))


def test_the_end_of_a_text_ends_nothing() -> None:
    """A model whose every answer is the end-of-text token still makes all tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURES["llama"][1], **TOKENS})).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0  # of equal logits the first wins
    tokens = generate(model, token_ids(4), 9).tokens
    assert torch.equal(tokens, torch.zeros(2, 9, dtype=torch.long))


def test_models_are_timed_in_turn(model: PreTrainedModel, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    other = make_model(tmp_path, seed=1)
    order: list[tuple[str, int]] = []

    def noting(name: str) -> Any:
        return lambda _module, _args, kwargs: order.append((name, kwargs["input_ids"].shape[1]))

    hooks = [each.register_forward_pre_hook(noting(name), with_kwargs=True) for name, each in (("one", model), ("two", other))]
    progress: list[tuple[int, int]] = []
    points = bench_generation(
        {"one": model, "two": other}, 1, 8, 3, CPU, MACHINE, seconds=1e-9, on_progress=lambda *at: progress.append(at)
    )
    for hook in hooks:
        hook.remove()
    prefills = [name for name, count in order if count == 8]
    assert prefills == ["one", "two"] * (1 + generation.FEWEST_ROUNDS)  # the first pair is the warm-up
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert [point.model for point in points] == ["one", "two"]
    assert {point.rounds for point in points} == {3}


def test_rounds_go_on_for_as_long_as_was_asked_for(model: PreTrainedModel) -> None:
    [point] = bench_generation({"one": model}, 1, 4, 2, CPU, MACHINE, seconds=60.0)
    assert point.rounds == generation.MOST_ROUNDS


def test_rates_are_tokens_over_median_times(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by known steps: per run prefill takes 2 s, and decode 1, 4 and 3 s."""
    took = iter([(2.0, 1.0), (2.0, 4.0), (2.0, 3.0)])

    def run(_model: object, ids: Tensor, new_tokens: int) -> generation.Generation:
        prefill, decode = next(took) if new_tokens == 7 else (0.0, 0.0)  # not the warm-up
        return generation.Generation(prefill, decode, torch.zeros(ids.shape[0], new_tokens))

    monkeypatch.setattr(generation, "generate", run)
    [point] = bench_generation({"one": model}, 5, 8, 7, CPU, MACHINE, {"one": 123}, seconds=1e-9)
    assert (point.prefill_seconds, point.prefill_tokens_per_second) == (2.0, 5 * 8 / 2.0)
    assert point.decode_tokens_per_second == 5 * 6 / 3.0  # the first of the 7 comes from prefill
    assert (point.peak_memory, point.dtype) == (123, "float32")
    # PaLM's formula and the operations of the pass, by hand.
    assert point.prefill_mfu == pytest.approx(5 * 8 * (2 * (BODY + HEAD) + 4 * LHQ * 8) / 2.0 / LIMIT, rel=1e-12)
    assert point.prefill_hfu == pytest.approx((5 * 8 * (2 * BODY + 4 * LHQ * 8) + 5 * 2 * HEAD) / 2.0 / LIMIT, rel=ROTARY)
    decode = sum(5 * (2 * (BODY + HEAD) + 4 * LHQ * (8 + step)) for step in range(1, 7))
    assert point.decode_mfu == pytest.approx(decode / 3.0 / LIMIT, rel=1e-12)
    assert point.decode_hfu == pytest.approx(decode / 3.0 / LIMIT, rel=ROTARY)


def test_a_dtype_without_a_limit_has_no_utilization(model: PreTrainedModel) -> None:
    unmeasured = replace(MACHINE, arithmetic={"int8": 1.0})
    [point] = bench_generation({"one": model}, 1, 4, 2, CPU, unmeasured, seconds=1e-9)
    assert (point.prefill_mfu, point.prefill_hfu, point.decode_mfu, point.decode_hfu) == (None, None, None, None)


@pytest.mark.parametrize(("batch", "prompt", "new_tokens"), [(0, 4, 2), (1, 0, 2), (1, 4, 1), (1, POSITIONS - 1, 2)])
def test_settings_that_cannot_work_are_refused(model: PreTrainedModel, batch: int, prompt: int, new_tokens: int) -> None:
    with pytest.raises(UsageError):
        bench_generation({"one": model}, batch, prompt, new_tokens, CPU, MACHINE)


def test_all_positions_can_be_used(model: PreTrainedModel) -> None:
    [point] = bench_generation({"one": model}, 1, POSITIONS - 2, 2, CPU, MACHINE, seconds=1e-9)
    assert point.prompt == POSITIONS - 2


# Operations


def test_operations_of_a_tiny_model_by_hand(model: PreTrainedModel) -> None:
    prefill, decode = count_operations(model.config, batch=3, prompt=8, new_tokens=2)
    assert prefill.model == 24 * (2 * (BODY + HEAD) + 4 * LHQ * 8)
    assert prefill.hardware == pytest.approx(24 * (2 * BODY + 4 * LHQ * 8) + 3 * 2 * HEAD, rel=ROTARY)
    assert decode.model == 3 * (2 * (BODY + HEAD) + 4 * LHQ * 9)
    assert decode.hardware == pytest.approx(decode.model, rel=ROTARY)
    assert decode.hardware != pytest.approx(3 * (2 * (BODY + HEAD) + 4 * LHQ * 10), rel=ROTARY)


def test_a_tied_head_is_counted_and_the_lookup_is_not(model: PreTrainedModel) -> None:
    tied = LlamaConfig(**{**ARCHITECTURES["llama"][1], **TOKENS, "tie_word_embeddings": True})
    assert count_operations(tied, 1, 8, 4) == count_operations(model.config, 1, 8, 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hardware_operations_exceed_the_formula_by_nothing_in_decode(tmp_path: Path, architecture: str) -> None:
    """Where no window shortens attention a decode step does exactly what the formula counts, in every architecture."""
    kind, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**{**arguments, **TOKENS})
    _, decode = count_operations(config, 2, 6, 5)
    assert decode.hardware == pytest.approx(decode.model, rel=ROTARY)


def test_a_sliding_window_spares_operations() -> None:
    config = MistralConfig(**{**ARCHITECTURES["mistral"][1], **TOKENS})
    _, decode = count_operations(config, 1, 100, 3)
    assert decode.hardware is not None
    assert decode.hardware < decode.model


def test_counting_leaves_the_configuration_alone(model: PreTrainedModel) -> None:
    before = model.config._attn_implementation
    count_operations(model.config, 1, 4, 2)
    assert model.config._attn_implementation == before != "eager"


def test_a_quantized_checkpoint_counts_like_its_original(model: PreTrainedModel) -> None:
    config = load_config(Path(ptqcli.__file__).parent / "demo")
    original = count_operations(config, 1, 16, 4)
    config.quantization_config = {"quant_method": "compressed-tensors"}
    assert count_operations(config, 1, 16, 4) == original


def test_a_config_without_heads_is_named() -> None:
    config = SimpleNamespace(model_type="llama", num_hidden_layers=2, hidden_size=64, get_text_config=lambda: config)
    with pytest.raises(PTQError, match="type llama does not name its layers, heads and width"):
        generation._attention_width(config)


def test_weights_are_counted_once_where_they_are_shared() -> None:
    tied = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURES["llama"][1], **TOKENS, "tie_word_embeddings": True}))
    norms, frequencies = 5 * 64, sum(buffer.numel() for buffer in tied.buffers())
    assert weight_bytes(tied) == 4 * (BODY + HEAD + norms + frequencies)


# Memory

BALLAST = 400 << 20


def load_with_ballast(folder: Path, size: int) -> PreTrainedModel:
    """A model whose loading needs ``size`` bytes more than the model, for a moment."""
    torch.ones(size, dtype=torch.uint8)
    return AutoModelForCausalLM.from_pretrained(folder)


def fail_to_load(error: Exception) -> None:
    raise error


def end_at_once() -> None:
    os._exit(9)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    """What this process ever held does not matter; what the other one held for a moment does."""
    make_model(tmp_path)
    ours = torch.ones(4 * BALLAST, dtype=torch.uint8)
    assert generation.peak_resident() > len(ours)
    peak = peak_memory(partial(load_with_ballast, tmp_path, BALLAST), 1, 4, 2, CPU)
    assert BALLAST < peak < 3 * BALLAST


@pytest.mark.slow
def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(PTQError, match="ended early, most likely because memory ran out"):
        peak_memory(end_at_once, 1, 4, 2, CPU)


@pytest.fixture
def _signals_kept() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals_kept")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UsageError("--kernel triton: not here"), "--kernel triton: not here"),
        (RuntimeError("no room\nfor it"), "RuntimeError: no room"),
    ],
)
def test_what_goes_wrong_in_the_other_process_is_told(error: Exception, says: str) -> None:
    ours, theirs = Pipe(duplex=False)
    generation._tell_peak(theirs, 1, partial(fail_to_load, error), 1, 4, 2, CPU)
    told = ours.recv()
    assert isinstance(told, UsageError if isinstance(error, UsageError) else PTQError)
    assert str(told) == says
