"""A model folder, packed or not, as a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    import torch


def load_model(folder: Path, device: torch.device, kernel: str = "auto") -> Any:
    """The transformers model of a folder, in evaluation mode: packed weights stay packed, any others load as they are.

    kernel: one of ``options.KERNELS``, for packed weights. Raises PTQError for a folder that holds no model that can be loaded, UsageError
    for a layer that cannot run on ``kernel``, or a kernel that is named for a model that is not packed.
    """
    from ptqcli.model.config import load_config
    from ptqcli.runtime import load_quantized

    config = load_config(folder)
    hush_transformers()
    if getattr(config, "quantization_config", None) is not None:
        return load_quantized(folder, device=device, kernel=kernel)
    if kernel != "auto":
        raise UsageError(f"{folder}: is not quantized, so it cannot run on --kernel {kernel}; leave the flag out")
    return _load_plain(folder, config).to(device).eval()


def _load_plain(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from ptqcli.checkpoint.tensors import SafetensorsFolder
    from ptqcli.model.kinds import kind_of

    kind_of(config)
    SafetensorsFolder(folder)  # says of a damaged file what is wrong with it
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of here, with names and shapes
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise PTQError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise PTQError(f"{folder}: {name} is stored as {list(stored)}, but config.json asks for {list(wanted)}")
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with random numbers, and whatever were measured would mean nothing
        raise PTQError(f"{folder}: the safetensors files hold no tensor for {missing[0]}, {len(missing)} missing in all")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises PTQError for a folder that is no model's, or has no tokenizer."""
    from ptqcli.checkpoint import auxiliary
    from ptqcli.model.config import load_config

    load_config(folder)
    return auxiliary.load_tokenizer(folder)


def hush_transformers() -> None:
    """A command's output is its own: no bars and no notices of the library between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
