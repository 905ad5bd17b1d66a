"""``ptq generate``: let a checkpoint answer or continue a text, shown word by word as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import device_option, json_option, kernel_option, open_device
from ptqcli.cli.streams import output_failure
from ptqcli.errors import PTQError, UsageError, printable


@click.command(
    epilog=examples(
        'ptq generate small "What is the capital of France?"',
        'ptq generate small "Once upon a time" --raw --max-new-tokens 200',
        "cat question.txt | ptq generate small --json",
    )
)
@click.argument("checkpoint", shell_complete=completion.checkpoint)
@click.argument("text", required=False)
@click.option("--raw", is_flag=True, help="Continue TEXT as it stands, also where the model has a chat template.")
@click.option("--system", metavar="TEXT", help="What the chat template is given as the system's message.")
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
@json_option
def command(
    checkpoint: str,
    text: str | None,
    raw: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    kernel: str,
    device: str,
    as_json: bool,
) -> None:
    """Let CHECKPOINT answer or continue TEXT.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any model folder, GGUF file or hub id. A
    model with a chat template answers TEXT, any other
    continues it. TEXT is read from standard input where it is - or left out.
    """
    from ptqcli.calibration.tokens import read_tokens
    from ptqcli.runtime.models import load_model, load_tokenizer

    if raw and system is not None:
        raise click.UsageError("--raw and --system exclude each other: the system's message is part of the chat template")
    if temperature and not 1e-4 <= temperature <= 1e4:  # not a number, too; beyond these the probabilities leave float32
        raise UsageError(f"--temperature {temperature} is out of range; give 0, or a number from 0.0001 to 10000")
    text = _checked(_standard_input() if text in (None, "-") else text)
    silence_transformers()
    place = open_device(device)
    folder = find_checkpoint(checkpoint)
    _refuse_encoder(folder)
    tokenizer = load_tokenizer(folder)
    chat = not raw and tokenizer.chat_template is not None
    if system is not None and not chat:
        raise UsageError(f"{folder}: has no chat template, so there is no place for --system; leave it out")
    prompt = _in_chat(tokenizer, text, system) if chat else text
    encoded = read_tokens(tokenizer, prompt, add_special_tokens=not chat, return_tensors="pt")  # a template writes special tokens itself
    if encoded["input_ids"].numel() == 0:
        raise UsageError("the text is empty; give at least one character")
    model = load_model(folder, place, kernel)
    used = encoded["input_ids"].numel()
    sequence = model.generate(
        input_ids=encoded["input_ids"].to(place),
        attention_mask=encoded["attention_mask"].to(place),
        max_new_tokens=min(max_new_tokens, _room(model, used)),
        streamer=None if as_json else _streamer(tokenizer, chat),
        **_choice(temperature, seed),
        pad_token_id=tokenizer.eos_token_id,
    )[0]
    Output(as_json=as_json).result(
        {
            "checkpoint": str(folder),
            "text": text,
            "chat": chat,
            "prompt_tokens": used,
            "new_tokens": sequence.numel() - used,
            "answer": tokenizer.decode(sequence[used:], skip_special_tokens=True),
        }
    )


def _refuse_encoder(folder: Path) -> None:
    from ptqcli.model.config import load_config
    from ptqcli.model.kinds import is_encoder

    if is_encoder(load_config(folder)):
        raise UsageError(f"{folder}: is an encoder, which writes no text; measure it with ptq eval {folder}")


def _standard_input() -> str:
    """All of it, without the line break at its end. Raises UsageError where nobody has put anything there."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no text is given; write it behind the checkpoint, or send it to standard input")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PTQError(f"standard input: is not {error.encoding} text; convert it") from error


def _checked(text: str) -> str:
    if not text:
        raise UsageError("the text is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        raise UsageError("the text is not UTF-8; convert it") from error
    return text


def _in_chat(tokenizer: Any, text: str, system: str | None) -> str:
    """What the model sees of a conversation that ``text`` opens. Raises PTQError for a template that does not take it."""
    from ptqcli.calibration.chat import written_out
    from ptqcli.untrusted import one_line

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    try:
        return written_out(tokenizer, messages, add_generation_prompt=True)
    except PTQError:
        raise
    except Exception as error:  # a template is a program
        reason = one_line(error)
        raise PTQError(f"the model's chat template does not take this conversation: {reason}; give --raw to continue the text") from error


def _choice(temperature: float, seed: int) -> dict[str, Any]:
    """How the next token is chosen, whatever the model's generation_config.json says of several continuations."""
    import torch

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None}
    return {**sampling, "num_beams": 1, "num_return_sequences": 1}


def _streamer(tokenizer: Any, chat: bool) -> Any:
    """Shows words as they come; in a chat only the answer, otherwise the text and how it goes on."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end)
            if output_failure() is not None:  # nobody reads on
                raise click.exceptions.Exit(0)

    return Shown(tokenizer, skip_prompt=chat, skip_special_tokens=True)


def _room(model: Any, used: int) -> int:
    """Tokens that fit behind a text of ``used`` tokens. Raises UsageError when there are none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if used >= positions:
        raise UsageError(f"the text has {used} tokens and the model {positions} positions; give a shorter text")
    return int(positions) - used
