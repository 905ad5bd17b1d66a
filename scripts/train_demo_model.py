"""Train the demo model that the package carries, from the text that every Python installation carries.

    python scripts/train_demo_model.py --minutes 60 --output ptqcli/demo

Trains a byte-level BPE tokenizer and a Llama on the calibration part of the built-in corpus, never on the evaluation part, and
writes a folder that transformers loads, with a model card of measured values. A usable snapshot is written every few minutes.
The learning rate falls to zero over the given time, so a faster machine takes more steps and ends with a better model.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptqcli.calibration.builtin import EVALUATION_SHARE, EXCLUDED, documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
SNAPSHOT_TOKENS = 16_384  # held-out tokens that a snapshot is measured on; the final model sees all

# Muon's update has the same size whatever the gradient, so its rate needs little tuning; both rates are the usual ones for
# models of this width.
MUON_RATE = 0.02
ADAMW_RATE = 0.004
WEIGHT_DECAY = 0.05
WARMUP = 0.01  # share of the time
DECAY_FROM = 0.35  # share of the time after which the rate falls, linearly, to zero


@dataclass(frozen=True)
class Progress:
    """What has been done so far, for the log and the model card."""

    minutes: float
    steps: int
    tokens_seen: int
    corpus_tokens: int


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    texts = documents("calibration")
    tokenizer = train_tokenizer(texts)
    encoded = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    held_out = torch.tensor(tokenizer.encode("\n\n".join(documents("evaluation"))))
    model = build_model(tokenizer.eos_token_id, options.layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(texts)} documents, {sum(map(len, encoded)):,} tokens; {len(held_out):,} held out; {parameters:,} parameters")
    train(model, tokenizer, encoded, held_out, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("ptqcli/demo"))
    parser.add_argument("--minutes", type=float, default=60.0, help="training time")
    parser.add_argument("--snapshot-minutes", type=float, default=4.0, help="time between two snapshots")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text can be encoded and there is no unknown token."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(end_of_text: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list[list[int]],
    held_out: Tensor,
    options: argparse.Namespace,
) -> None:
    optimizers = build_optimizers(model)
    corpus_tokens = sum(map(len, encoded))
    batches = endless_batches(encoded, options.batch, options.seed)
    start = last_snapshot = time.monotonic()
    steps, smooth_loss, done = 0, math.log(VOCABULARY), 0.0
    while done < 1.0:
        set_rates(optimizers, done)
        loss = train_step(model, next(batches), optimizers)
        steps += 1
        smooth_loss += 0.05 * (loss - smooth_loss)
        now = time.monotonic()
        done = (now - start) / (60 * options.minutes)
        tokens_seen = steps * options.batch * CONTEXT
        progress = Progress((now - start) / 60, steps, tokens_seen, corpus_tokens)
        if steps % 20 == 0:
            rate = tokens_seen / (now - start)
            print(f"step {steps}  {progress.minutes:5.1f} min  loss {smooth_loss:.3f}  {rate:,.0f} tokens/s", flush=True)
        if now - last_snapshot > 60 * options.snapshot_minutes and done < 1.0:
            save(model, tokenizer, held_out[:SNAPSHOT_TOKENS], progress, options)
            last_snapshot = time.monotonic()
    save(model, tokenizer, held_out, progress, options)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if "layers" in name and parameter.ndim == 2]
    embedding = [parameter for name, parameter in named if "layers" not in name and parameter.ndim == 2]
    norms = [parameter for _, parameter in named if parameter.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=ADAMW_RATE,
        betas=(0.9, 0.95),
    )
    optimizers = [torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY), adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], done: float) -> None:
    """Warm up, stay, fall to zero. ``done`` is the share of the time that has passed."""
    factor = min(1.0, (done + 1e-3) / WARMUP, (1.0 - done) / (1.0 - DECAY_FROM))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def endless_batches(encoded: list[list[int]], batch: int, seed: int) -> Iterator[Tensor]:
    """Windows of CONTEXT + 1 tokens, int64 [batch, CONTEXT + 1], documents and cuts in a new order each time round."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(encoded, len(encoded))
        stream = torch.tensor([token for document in shuffled for token in document])
        stream = stream[order.randrange(CONTEXT) :]
        windows = stream[: len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        windows = windows[order.sample(range(len(windows)), len(windows))]
        yield from windows[: len(windows) // batch * batch].split(batch)


def train_step(model: LlamaForCausalLM, windows: Tensor, optimizers: list[torch.optim.Optimizer]) -> float:
    """One update on ``windows`` [batch, CONTEXT + 1]; returns the mean loss of a token in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(model, windows).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_((p for o in optimizers for g in o.param_groups for p in g["params"]), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def token_losses(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Loss of every token but the first, [batch * (length - 1)]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, window: int) -> float:
    """exp of the mean loss of a token over windows that do not overlap, the rest at the end dropped. tokens: int64 [n]."""
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    losses = [token_losses(model, some) for some in windows.split(8)]
    return math.exp(torch.cat(losses).double().mean().item())


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Tensor,
    progress: Progress,
    options: argparse.Namespace,
) -> None:
    """Measure the bfloat16 model and put its files in place one by one, each complete when it appears."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    measured = {window: perplexity(stored, held_out, window) for window in (256, 512)}
    print(f"snapshot at {progress.minutes:.1f} min, held-out perplexity {measured}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent) as name:
        folder = Path(name)
        stored.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(stored, progress, measured, len(held_out), options), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            file.replace(options.output / file.name)


def model_card(
    model: LlamaForCausalLM,
    progress: Progress,
    measured: dict[int, float],
    held_out_tokens: int,
    options: argparse.Namespace,
) -> str:
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The ptqcli demo model

A small language model of English documentation and Python code, trained from nothing for one purpose: to be quantized and
measured on a machine without a network. It is of no use as an assistant.

| | |
|---|---|
| architecture | Llama: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, intermediate size \
{config.intermediate_size}, {config.num_attention_heads} heads with {config.num_key_value_heads} key-value heads, context \
{config.max_position_embeddings}, tied embeddings |
| parameters | {parameters:,}, stored as bfloat16 |
| tokenizer | byte-level BPE, {config.vocab_size:,} entries, trained on the same text |
| training text | {progress.corpus_tokens:,} tokens |
| training | {progress.steps:,} steps of {options.batch} windows of {CONTEXT} tokens: {progress.tokens_seen:,} tokens, \
{progress.tokens_seen / progress.corpus_tokens:.1f} times the text |
| time | {progress.minutes:.0f} minutes on {options.threads} CPU cores ({platform.machine()}) |
| method | Muon for the matrices (rate {MUON_RATE}), AdamW for the embedding and norms (rate {ADAMW_RATE}), weight decay \
{WEIGHT_DECAY}, bfloat16 autocast, linear decay to zero, seed {options.seed} |
| held-out perplexity | {measured[256]:.3f} in windows of 256, {measured[512]:.3f} in windows of 512 |

## Data

The text that Python {platform.python_version()} carries: the topics of `help()` (`pydoc_data.topics`), the sources of the
standard library with their docstrings, and the docstrings of modules written in C. Left out:
{", ".join(f"`{name}`" for name in sorted(EXCLUDED - {"site-packages", "__pycache__"}))}, any folder of these names, and what is not \
part of the standard library.

The text was split before training: a module or topic is held out when a hash of its name falls in the lowest \
{EVALUATION_SHARE:.0%}
(`ptqcli/calibration/builtin.py`). The model and its tokenizer saw none of the held-out part.

## Held-out perplexity

The held-out documents are joined with blank lines and encoded once ({held_out_tokens:,} tokens were used here), then cut into windows
that do not overlap; the perplexity is exp of the mean loss over every token but the first of each window. The model is the
bfloat16 one in this folder, computed in bfloat16.

## Again

    python scripts/train_demo_model.py --minutes {options.minutes:g} --batch {options.batch} --layers {options.layers}\
 --threads {options.threads} --seed {options.seed}

The schedule follows the clock, so another run takes a different number of steps and gives slightly different weights: fewer
steps where other work shares the cores.
Trained with torch {torch.__version__.split("+")[0]} and transformers {transformers.__version__}.

## Licence

The weights: Apache-2.0, like the rest of ptqcli. The text they were trained on: Python's documentation and standard library,
© Python Software Foundation and contributors, under the PSF License Agreement.
"""


if __name__ == "__main__":
    main()
