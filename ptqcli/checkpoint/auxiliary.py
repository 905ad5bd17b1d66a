"""The files beside the weights that make a folder a model folder, each known by its name.

What is not known is not copied: to some reader it would mean another kind of folder (an adapter, a second copy of the weights), and nobody
would see that it no longer fits the weights. ``left_out`` names it. The modules that sentence-transformers runs behind a model do fit: they
pool what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ptqcli.checkpoint.directory import PIECE, Directory, named
from ptqcli.errors import PTQError
from ptqcli.untrusted import foreign

TEMPLATES = "additional_chat_templates"
ADAPTER = "adapter"  # folder in a checkpoint that holds an adapter for it
MODULES = "[0-9]_*"  # folders of sentence-transformers: 1_Pooling, 2_Dense

LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

# What transformers reads by these names, and mistral-common, for the tokenizer, processors, generation and chat templates; and the licence.
AUXILIARY_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "tokenizer.model", "tokenizer.model.v*", "tekken.json",
    "tiktoken.model", "*.tiktoken", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model",
    "source.spm", "target.spm", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "byte_maps.json",
    "emoji.json", "normalizer.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja",
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", f"{MODULES}/config.json", f"{MODULES}/model.safetensors",
    *LICENCES,
)  # fmt: skip

# What else a quantized model folder holds, finished or not. Anything of another name in one is somebody else's.
WRITTEN_FILES = (
    "README.md", "SHA256SUMS", "config.json", "quantize_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "shard-*.safetensors", "joined.safetensors", f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors",
    "*.gguf",
)  # fmt: skip

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")


def belongs_to_a_checkpoint(name: str) -> bool:
    """Whether a file of this name may have been written by `ptq quantize`, some under a temporary name first."""
    return _matches(name, AUXILIARY_FILES) or _matches(name.removesuffix(".tmp"), WRITTEN_FILES)


def is_folder_of_a_checkpoint(name: str) -> bool:
    """Whether a folder of this name may stand in what `ptq quantize` has written."""
    return any(fnmatch(name, pattern) for pattern in (TEMPLATES, ADAPTER, MODULES))


def left_out(folder: Path) -> list[str]:
    """What lies in a model folder and does not go along: neither weights nor a file that is known, sorted; a folder ends in ``/``.

    Hidden ones, which belong to no model, and the card, which is written anew, are not named.
    """
    found = []
    for path in sorted(folder.iterdir()):
        known = is_folder_of_a_checkpoint(path.name) if path.is_dir() else belongs_to_a_checkpoint(path.name)
        inside = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() and known else []
        if not known and not path.name.startswith("."):
            found.append(f"{path.name}/" if path.is_dir() else path.name)
        found += [name for entry in inside if not belongs_to_a_checkpoint(name := f"{path.name}/{entry.name}")]
    return found


def is_licence(name: str) -> bool:
    """Whether a file of this name says what may be done with the model."""
    return _matches(name, LICENCES)


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer in ``folder``. config: its configuration, None to read it from there. Raises PTQError when there is none, it is broken,
    or it needs code from the folder."""
    from transformers import AutoTokenizer

    with foreign(f"{folder}: cannot load a tokenizer", "; copy the model's tokenizer files into the folder"):
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)


def refuse_adapter(folder: Path) -> None:
    """Raise PTQError for a folder with an adapter: its weights are not the model's, and readers differ in whether they add it."""
    found = next((path.name for pattern in ADAPTER_FILES for path in sorted(folder.glob(pattern))), None)
    if found is not None:
        merge = f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained({f'{folder}-merged'!r})"
        raise PTQError(
            f"{folder}: holds an adapter ({found}); merge it into the weights and copy the tokenizer files beside them "
            f'(python -c "from peft import AutoPeftModelForCausalLM; {merge}"), or move it away to work on the base model alone'
        )


def auxiliary_files(folder: Path) -> list[str]:
    """The names of those in ``folder``, sorted. Raises PTQError for one that is a link to somewhere else.

    Their bytes go into the result, and whoever is handed a model folder does not look for links in it. What the cache of the hub holds
    is a link into the folder of blobs beside it.
    """
    candidates = [name for name in _files(folder) if _matches(name, AUXILIARY_FILES)]
    for name in ("config.json", "README.md", *candidates):
        target, home = (folder / name).resolve(), folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (target.is_relative_to(home) or target.is_relative_to(blobs.resolve())):
            raise PTQError(f"{folder / name}: is a link that leads out of the model folder, to {target}; put the file itself there")
    return candidates


def copy_auxiliary_files(source: Path, names: Sequence[str], target: Directory) -> None:
    """Copy tokenizer, generation config, chat template and the like."""
    for name in names:
        target.write(name, _pieces(source / name))


def _files(folder: Path) -> list[str]:
    places = [folder, folder / TEMPLATES, *folder.glob(MODULES)]
    found = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _pieces(path: Path) -> Iterator[bytes]:
    with named(path), open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
