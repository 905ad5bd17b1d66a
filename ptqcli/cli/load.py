"""A model folder, packed or not, as a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.errors import PTQError

if TYPE_CHECKING:
    import torch


def load_model(folder: Path, device: torch.device) -> Any:
    """The transformers model of a folder, in evaluation mode: packed weights stay packed, any others load as they are.

    Raises PTQError for a folder that holds no model that can be loaded.
    """
    from ptqcli.model import load_config
    from ptqcli.runtime import load_quantized

    config = load_config(folder)
    _hush_transformers()
    if getattr(config, "quantization_config", None) is not None:
        return load_quantized(folder, device=device)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise PTQError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises PTQError for a folder that is no model's, or has no tokenizer."""
    from ptqcli import pipeline
    from ptqcli.model import load_config

    load_config(folder)
    return pipeline.load_tokenizer(folder)


def _hush_transformers() -> None:
    """A command's output is its own: no bars and no notices of the library between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
