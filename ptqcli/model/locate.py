"""Which folder a model's name means: a local folder, a hub id, or the demo model of the package."""

from __future__ import annotations

import re
from pathlib import Path

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.suggest import did_you_mean_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

GGUF = ".gguf"

# Weights as safetensors and what belongs to them as text. Nothing that holds a pickle or code is ever fetched.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
UNWANTED_FILES = ("consolidated*", "*/*")  # a second copy of the same weights; other formats in subfolders


def find_model(name: str | None) -> Path:
    """The folder of MODEL: a local folder, a GGUF file, a hub id ``owner/name`` (fetched), or None for the demo model of the package.

    Raises UsageError when it is none of these, PTQError when the hub cannot deliver it.
    """
    if name is None:
        return demo_model()
    if not name:  # an unset variable of a shell, and Path("") is the working directory
        raise UsageError("the model's name is empty; give a folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return only_file(folder) or folder
    if folder.is_file() and folder.suffix == GGUF:
        return folder
    if folder.is_file():
        raise UsageError(f"{name} is a file; give the folder that holds it")
    if not HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise UsageError(f"{name}: no such folder (a model on the hub is named owner/name){did_you_mean_folder(folder)}")
    return _fetch(name)


def only_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one and no other model; None for any other folder. Raises UsageError if it holds several."""
    files = sorted(path for path in folder.glob(f"*{GGUF}") if path.is_file())
    if not files or any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        return None
    if len(files) > 1:
        raise UsageError(f"{folder}: holds {len(files)} GGUF files; name one, such as {files[0]}")
    return files[0]


def hub_id(folder: Path | None) -> str | None:
    """``owner/name`` of a model that lies in the hub's cache: ``models--owner--name/snapshots/REVISION``; None for any other."""
    if folder is None:
        return None
    found = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.resolve().parent.parent.name)
    return f"{found[1]}/{found[2]}" if found and folder.resolve().parent.name == "snapshots" else None


def model_name(folder: Path | None) -> str:
    """What a model is called: on the hub, or by its folder or file, without the owner and with nothing that no file name holds."""
    base = hub_id(folder)
    found = base.partition("/")[2] if base else "" if folder is None else folder.resolve().name.removesuffix(GGUF)
    return re.sub(r"[^\w .+-]", "_", found) or "a model in memory"


def demo_model() -> Path:
    """The folder of the demo model that the package carries."""
    folder = Path(ptqcli.__file__).parent / "demo"
    if not (folder / "model.safetensors").is_file():
        raise PTQError(f"{folder}: the demo model is missing from this installation; reinstall ptqcli, or name a model")
    return folder


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED_FILES), ignore_patterns=list(UNWANTED_FILES)))
    except HFValidationError as error:
        raise UsageError(f"{name}: neither a folder nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise PTQError(f"{name}: no such folder here, and the hub cannot be reached; fetch the model first") from error
    except HfHubHTTPError as error:
        raise PTQError(f"{name}: no such folder here, and the hub refuses it: {str(error).splitlines()[0]}") from error
