"""``ptq generate``: let a checkpoint continue a text, shown word by word as it comes."""

from __future__ import annotations

import sys
from typing import Any

import click

from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import device_option, kernel_option, open_device
from ptqcli.errors import UsageError


@click.command()
@click.argument("checkpoint")
@click.argument("text")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Stop after N tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 always takes the likeliest token; higher draws more freely.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the draws, when the temperature is not 0."
)
@kernel_option
@device_option
def command(checkpoint: str, text: str, max_new_tokens: int, temperature: float, seed: int, kernel: str, device: str) -> None:
    """Let CHECKPOINT continue TEXT.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any model folder or hub id.
    """
    import torch
    from transformers import TextStreamer

    from ptqcli.errors import printable
    from ptqcli.runtime.models import load_model, load_tokenizer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end)

    silence_transformers()
    place = open_device(device)
    folder = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer(text, return_tensors="pt").to(place)
    if prompt["input_ids"].numel() == 0:
        raise UsageError("the text is empty; give at least one character")
    model = load_model(folder, place, kernel)
    room = _room(model, prompt["input_ids"].numel())
    torch.manual_seed(seed)
    model.generate(
        **prompt,
        max_new_tokens=min(max_new_tokens, room),
        do_sample=temperature > 0,
        temperature=temperature or None,
        pad_token_id=tokenizer.eos_token_id,
        streamer=Shown(tokenizer),
    )


def _room(model: Any, used: int) -> int:
    """Tokens that fit behind a text of ``used`` tokens. Raises UsageError when there are none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if used >= positions:
        raise UsageError(f"the text has {used} tokens and the model {positions} positions; give a shorter text")
    return int(positions) - used
