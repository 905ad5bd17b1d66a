"""What is known of the programs that read GGUF files: llama.cpp and what is built on it, transformers, vLLM.

llama.cpp multiplies blocks as they are, ``tests/loaders`` runs it. transformers decodes all of them when it loads the file. vLLM has had no
loader of such files since 0.33.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.formats import LinearSpec, Reader


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    return ["embedding and output head are rounded to the types that the mix has for them, without calibration"]


def readers(auto_class: str) -> list[Reader]:
    """How the programs load such a file, the only one of its kind in the folder. auto_class: of transformers, which builds the model."""
    file = "next(Path({folder}).glob('*.gguf'))"
    load = f"model = {auto_class}.from_pretrained({{folder}}, gguf_file={file}.name)"
    code = f"from pathlib import Path\n\nfrom transformers import {auto_class}\n\n{load}"
    python = f"from pathlib import Path\n\nfrom llama_cpp import Llama\n\nmodel = Llama(str({file}))"
    return [
        Reader(name="llama.cpp", code="llama-cli -m {folder}/*.gguf", language="sh"),
        Reader(name="llama-cpp-python", needs=("llama-cpp-python",), code=python),
        Reader(name="transformers", needs=("transformers", "gguf"), code=code),
        Reader(name="vLLM", refusal="it has no loader of GGUF files since 0.33"),
    ]
