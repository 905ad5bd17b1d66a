"""The files beside the weights that make a folder a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError

# Text files that make a folder of weights a model folder; weights and config.json are written anew.
AUXILIARY_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "additional_chat_templates/*.jinja")

NOT_AUXILIARY = ("config.json", "*.index.json", "ptq_report.json", "quantize_config.json")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``. Raises PTQError when there is none or it needs code from the folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PTQError(f"{folder}: cannot load a tokenizer ({reason}); copy the model's tokenizer files into the folder") from error


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template and the like."""
    for pattern in AUXILIARY_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not any(file.match(unwanted) for unwanted in NOT_AUXILIARY):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
