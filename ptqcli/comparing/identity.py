"""Which files, texts and versions a number belongs to.

A checkpoint may take hundreds of gigabytes, which nobody reads once more for a hash. One that ptqcli wrote has the SHA-256 of each of its
files in SHA256SUMS already, and the hash of that list stands for all of them. Of any other folder or file the names, the sizes and the
first MiB of each file are hashed (of safetensors and GGUF that holds the header: every name, shape and dtype), which tells models apart but
not every change of a weight.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

import ptqcli
from ptqcli.checkpoint.auxiliary import belongs_to_a_checkpoint
from ptqcli.checkpoint.checksums import CHECKSUMS_NAME, read_checksums
from ptqcli.errors import PTQError

BEGINNING = 1 << 20  # bytes of a file
PARTIAL = "names, sizes and first MiB of its files"


@dataclass(frozen=True)
class Digest:
    """sha256: 64 hexadecimal digits. of: what was hashed, in words."""

    sha256: str
    of: str


def checkpoint_digest(checkpoint: Path) -> Digest:
    """Of a folder, or of a model that is one file. Raises PTQError for files that cannot be read."""
    if checkpoint.is_dir() and _listed(checkpoint):
        return Digest(_file_digest(checkpoint / CHECKSUMS_NAME, None), CHECKSUMS_NAME)
    files = [checkpoint] if checkpoint.is_file() else sorted(path for path in checkpoint.iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        if len(files) == 1 or belongs_to_a_checkpoint(path.name) or path.suffix == ".safetensors":
            digest.update(f"{path.name}\n{path.stat().st_size}\n{_file_digest(path, BEGINNING)}\n".encode(errors="surrogateescape"))
    return Digest(digest.hexdigest(), PARTIAL)


def _listed(folder: Path) -> bool:
    """Whether there is a list of ours; others have files of that name, too."""
    try:
        return bool(read_checksums(folder))
    except PTQError:
        return False


def _file_digest(path: Path, most: int | None) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read() if most is None else file.read(most)).hexdigest()
    except OSError as error:
        raise PTQError(f"{path}: cannot be read: {error.strerror}") from error


def text_digest(text: str) -> str:
    """SHA-256 of the text as UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def ids_digest(ids: Tensor) -> str:
    """SHA-256 of token ids, 8 bytes each, the lowest first."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {
        "ptqcli": ptqcli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
