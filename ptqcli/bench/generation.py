"""Speed of a whole model: prefill and decode, peak memory, and how much of the machine's arithmetic that uses.

Prefill is one forward pass over ``prompt`` tokens, which yields the first new token. Decode makes the others, one token of each sequence
a step, greedily, over the KV cache. All ``new_tokens`` are made whatever they are: the end of a text ends nothing, so that every model
does the same work. Models are timed in turn, round by round, and a time is the median of its rounds.

**Model FLOPs utilization** (Chowdhery et al. 2022, PaLM, appendix B), of a forward pass: tokens per second, times what the model needs
for a token, over the machine's limit,

    MFU = tokens/s * (2 N + 4 L H Q T) / P

with N the weights that are multiplied (the output head counts, the lookup of embeddings does not), L layers, H heads of Q channels, T
the tokens that are attended to (the whole prompt in prefill, what stands in the cache in decode), and P operations a second.
By definition N is counted for every token of the prompt.

**Hardware FLOPs utilization** (Korthikanti et al. 2022): the same with the operations of the pass as it really runs. They are counted on a
twin of the model without data: the head only for the positions that it computes, so that HFU of prefill may be below MFU; attention as
the whole square, which is what a kernel without a causal shortcut does. What unpacking weights costs is not in either number.

P is the limit that this machine was just measured to reach in the dtype of the model's activations, never a datasheet's. It is the
same for a model and its checkpoint, so that the two compare; integer products may pass it.

Memory is that of a process of its own (``peak_memory``), because high-water marks of one process cannot be told apart.
"""

from __future__ import annotations

import copy
import inspect
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ptqcli.bench.machine import Machine
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.config import build_on_meta
from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.resources import ran_out

Progress = Callable[[int, int], None]

FEWEST_ROUNDS = 3  # a median needs them
MOST_ROUNDS = 25
LEAST_NEW_TOKENS = 2  # the first comes from prefill, so with one alone nothing is decoded


@dataclass(frozen=True, kw_only=True)
class GenerationPoint:
    """One model at one setting; times are medians of ``rounds`` rounds.

    model: its name among those compared. batch: sequences. prompt: tokens of each. new_tokens: made for each, the first by prefill.
    peak_memory: bytes, loading included; CUDA: what torch allocated, CPU: the whole process, None where it was not measured.
    weights: bytes of parameters and buffers. mfu, hfu: shares of the measured limit of ``dtype``, None where there is no such limit, or
    the operations cannot be counted.
    """

    model: str
    batch: int
    prompt: int
    new_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int | None
    weights: int
    dtype: str
    rounds: int
    prefill_mfu: float | None
    prefill_hfu: float | None
    decode_mfu: float | None
    decode_hfu: float | None


def bench_generation(
    models: Mapping[str, Any],
    batch: int,
    prompt: int,
    new_tokens: int,
    device: torch.device,
    machine: Machine,
    memory: Mapping[str, int] | None = None,
    seconds: float = 2.0,
    on_progress: Progress | None = None,
) -> list[GenerationPoint]:
    """Prefill and decode of ``models`` (name -> transformers model on ``device``, in evaluation mode), timed in turn.

    memory: peak bytes by name, of ``peak_memory``. seconds: for each model, though at least FEWEST_ROUNDS rounds are taken.
    on_progress: called with the rounds done and all rounds. Raises UsageError for a setting that a model has no positions for.
    """
    for name, model in models.items():
        check_setting(model.config, name, batch, prompt, new_tokens)
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    for model in models.values():
        generate(model, ids, LEAST_NEW_TOKENS)  # warm-up: kernels are compiled, workspaces made
    runs = _run_in_turn(models, ids, new_tokens, seconds, on_progress)
    return [_point(name, model, runs[name], ids, new_tokens, machine, (memory or {}).get(name)) for name, model in models.items()]


def check_setting(config: Any, name: str, batch: int, prompt: int, new_tokens: int) -> None:
    """Raise UsageError unless a model of ``config`` can make ``new_tokens`` behind ``prompt`` tokens. name: what messages call it."""
    if min(batch, prompt) < 1 or new_tokens < LEAST_NEW_TOKENS:
        raise UsageError(f"batch {batch}, prompt {prompt}, {new_tokens} new tokens: give 1, 1 and {LEAST_NEW_TOKENS} or more")
    positions = positions_of(config)
    if prompt + new_tokens > positions:
        raise UsageError(
            f"a prompt of {prompt} and {new_tokens} new tokens are {prompt + new_tokens}, and the {name} has {positions} positions; "
            "lower --prompt or --new-tokens"
        )


def positions_of(config: Any) -> int:
    """Tokens that a model of ``config`` can attend to; without a limit, a number that none reaches."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if positions is None else int(positions)


# Running


@dataclass(frozen=True)
class Generation:
    """What one run took, and the tokens it made: int64 [batch, new_tokens]."""

    prefill_seconds: float
    decode_seconds: float
    tokens: Tensor


@torch.no_grad()
def generate(model: Any, ids: Tensor, new_tokens: int) -> Generation:
    """Make exactly ``new_tokens`` behind ``ids``, int64 [batch, prompt], greedily.

    As in transformers' ``generate``, a model that can leave out the logits that nobody reads does so.
    """
    options = {"use_cache": True, **_last_logits_only(model)}
    start = _now(ids.device)
    output = model(input_ids=ids, **options)
    newest = output.logits[:, -1:].argmax(-1)  # [batch, 1]
    between = _now(ids.device)
    tokens = [newest]
    for _ in range(new_tokens - 1):
        output = model(input_ids=newest, past_key_values=output.past_key_values, **options)
        newest = output.logits[:, -1:].argmax(-1)
        tokens.append(newest)
    return Generation(between - start, _now(ids.device) - between, torch.cat(tokens, dim=1))


def _last_logits_only(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _now(device: torch.device) -> float:
    """The clock, in seconds, once ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _run_in_turn(
    models: Mapping[str, Any], ids: Tensor, new_tokens: int, seconds: float, on_progress: Progress | None
) -> dict[str, list[Generation]]:
    """As many rounds as fit into ``seconds`` for each model, judged by the first round."""
    runs: dict[str, list[Generation]] = {name: [] for name in models}
    rounds, done = FEWEST_ROUNDS, 0
    start = time.perf_counter()
    while done < rounds:
        for name, model in models.items():
            runs[name].append(generate(model, ids, new_tokens))
        done += 1
        if done == 1:
            took = time.perf_counter() - start
            rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, math.ceil(seconds * len(models) / took)))
        if on_progress:
            on_progress(done, rounds)
    return runs


def _point(
    name: str, model: Any, runs: list[Generation], ids: Tensor, new_tokens: int, machine: Machine, memory: int | None
) -> GenerationPoint:
    batch, prompt = ids.shape
    prefill_seconds = statistics.median(run.prefill_seconds for run in runs)
    decode_seconds = statistics.median(run.decode_seconds for run in runs)
    dtype = str(model.dtype).removeprefix("torch.")
    limit = machine.arithmetic.get(dtype)
    prefill, decode = count_operations(model.config, batch, prompt, new_tokens)
    return GenerationPoint(
        model=name,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        prefill_seconds=prefill_seconds,
        prefill_tokens_per_second=batch * prompt / prefill_seconds,
        decode_tokens_per_second=batch * (new_tokens - 1) / decode_seconds,
        peak_memory=memory,
        weights=weight_bytes(model),
        dtype=dtype,
        rounds=len(runs),
        prefill_mfu=_share(prefill.model, prefill_seconds, limit),
        prefill_hfu=_share(prefill.hardware, prefill_seconds, limit),
        decode_mfu=_share(decode.model, decode_seconds, limit),
        decode_hfu=_share(decode.hardware, decode_seconds, limit),
    )


def _share(operations: float | None, seconds: float, limit: float | None) -> float | None:
    return None if operations is None or limit is None else operations / seconds / limit


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what two modules share counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


# Operations


@dataclass(frozen=True)
class Operations:
    """Operations of a stretch of work, two for a multiply-add. model: what the formula asks for. hardware: what is really computed, None
    where the model does not run without data."""

    model: float
    hardware: float | None


def count_operations(config: Any, batch: int, prompt: int, new_tokens: int) -> tuple[Operations, Operations]:
    """Operations of prefill and of all decode steps together, for the architecture of ``config``, quantized or not.

    Of the decode steps the first and the last are counted, and the others lie on the line between them. Raises PTQError where ``config``
    does not name layers, heads and width.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the one way of attention that is made of products that can be counted
    twin = build_on_meta(config)
    steps = new_tokens - 1
    multiplied = sum(linear_weight(module).numel() for module in twin.modules() if is_linear(module))  # N
    attended = 4 * _attention_width(config)  # 4 L H Q
    prefill = batch * prompt * (2 * multiplied + attended * prompt)
    contexts = steps * prompt + steps * (steps + 1) // 2  # sum of prompt + 1, ..., prompt + steps
    decode = batch * (2 * multiplied * steps + attended * contexts)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            twin.to_empty(device="cpu")  # tensors with a shape and no data
            whole, first = _counted_pass(twin, batch, prompt)
            _, last = _counted_pass(twin, batch, prompt + steps - 1)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return Operations(prefill, None), Operations(decode, None)
    return Operations(prefill, whole), Operations(decode, steps * (first + last) / 2)


def _attention_width(config: Any) -> int:
    """L H Q: layers, times heads, times channels of a head."""
    text = config.get_text_config()
    layers, heads, width = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        raise PTQError(f"the config of a model of type {config.model_type} does not name its layers, heads and width")
    return layers * heads * (getattr(text, "head_dim", None) or width // heads)


def _counted_pass(twin: nn.Module, batch: int, prompt: int) -> tuple[int, int]:
    """Operations of one prefill over ``prompt`` tokens, and of the decode step behind it."""
    options = {"use_cache": True, **_last_logits_only(twin)}
    ids = torch.zeros(batch, prompt, dtype=torch.long)
    with FlopCounterMode(display=False) as prefill:
        output = twin(input_ids=ids, **options)
    with FlopCounterMode(display=False) as step:
        twin(input_ids=ids[:, :1], past_key_values=output.past_key_values, **options)
    return prefill.get_total_flops(), step.get_total_flops()


# Memory


def peak_memory(load: Callable[[], Any], batch: int, prompt: int, new_tokens: int, device: torch.device) -> int:
    """Most bytes that a process of its own holds while it calls ``load`` for a model and makes ``new_tokens``.

    load: can be pickled, such as a ``functools.partial`` of a function at the top of a module. CUDA: most bytes that torch allocated
    on ``device``. CPU: the most that was resident, Python and its libraries and the pages read of the files included.
    Raises PTQError when the process cannot do it, most likely because memory is short.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    work = (load, batch, prompt, new_tokens, device)
    child = context.Process(target=_tell_peak, args=(theirs, torch.get_num_threads(), *work), daemon=True)
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError as error:
        raise PTQError("the process that measures memory ended early, most likely because memory ran out") from error
    finally:
        child.kill()
        child.join()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, int)
    return answer


def _tell_peak(
    answer: Connection, threads: int, load: Callable[[], Any], batch: int, prompt: int, new_tokens: int, device: torch.device
) -> None:
    """Body of the child process: sends the number of bytes, or the error that a user is to see."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says that it was interrupted, and ends this process
    torch.set_num_threads(threads)
    try:
        model = load()
        generate(model, torch.zeros(batch, prompt, dtype=torch.long, device=device), new_tokens)
        answer.send(_peak_bytes(device))
    except PTQError as error:
        answer.send(error)
    except (RuntimeError, MemoryError, OSError) as error:
        short = ran_out(error)
        said = "memory ran out" if short else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        answer.send(PTQError(f"{said}; choose a smaller batch or prompt" if short else said))


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def peak_resident() -> int:
    """Most bytes of this process that were ever in memory at once."""
    if sys.platform == "linux":
        # Not getrusage: its mark is handed down by the process that started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    elif sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
