"""The files beside the weights that make a folder a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ptqcli.untrusted import foreign

# Text files that make a folder of weights a model folder; weights and config.json are written anew.
AUXILIARY_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "additional_chat_templates/*.jinja")

NOT_AUXILIARY = ("config.json", "*.index.json", "ptq_report.json", "quantize_config.json")


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer in ``folder``. config: its configuration, None to read it from there. Raises PTQError when there is none, it is broken,
    or it needs code from the folder."""
    from transformers import AutoTokenizer

    with foreign(f"{folder}: cannot load a tokenizer", "; copy the model's tokenizer files into the folder"):
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template and the like."""
    for pattern in AUXILIARY_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not any(file.match(unwanted) for unwanted in NOT_AUXILIARY):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
