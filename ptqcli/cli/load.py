"""What the commands do before they load a model."""

from __future__ import annotations

from pathlib import Path

from ptqcli.cli.console import Output


def tell_decoded(path: Path, output: Output) -> None:
    """Say of a GGUF file which of its types do not run packed."""
    if path.is_file():
        from ptqcli.formats.gguf import decoded_note

        note = decoded_note(path)
        if note is not None:
            output.say(note)


def silence_transformers() -> None:
    """A command's output is its own: no bars and no notices of the library between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
