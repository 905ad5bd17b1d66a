"""What the commands do before they load a model."""

from __future__ import annotations


def silence_transformers() -> None:
    """A command's output is its own: no bars and no notices of the library between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
