"""A model folder, packed or not, as a model that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError


def is_packed(folder: Path) -> bool:
    """True if the folder's config.json says that its weights are quantized. Raises PTQError if it has none or it is broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PTQError(f"{folder}: has no config.json, so it is not a model folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PTQError(f"{path}: not valid JSON; copy or write the folder again") from error
    return isinstance(config, dict) and "quantization_config" in config


def load_model(folder: Path, device: str) -> Any:
    """The transformers model of a folder, in evaluation mode: packed weights stay packed, any others load as they are."""
    packed = is_packed(folder)
    _hush_transformers()
    if packed:
        from ptqcli.runtime import load_quantized

        return load_quantized(folder, device=device)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise PTQError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises PTQError if it has none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PTQError(f"{folder}: no tokenizer that transformers can read ({str(error).splitlines()[0]})") from error


def _hush_transformers() -> None:
    """A command's output is its own: no bars and no notices of the library between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
