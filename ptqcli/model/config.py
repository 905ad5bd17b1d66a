"""config.json, and the model without weights that it describes."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ptqcli.checkpoint.auxiliary import refuse_adapter
from ptqcli.checkpoint.gguf_file import SUFFIX
from ptqcli.checkpoint.tensors import FLOATING, INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from ptqcli.checkpoint.unfinished import unfinished_run
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.kinds import kind_of
from ptqcli.temporary import written_file
from ptqcli.untrusted import foreign, read_json, shown

CONFIG_FILE = "config.json"
# In which AutoGPTQ and AutoAWQ told of the quantization before it stood in config.json.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
CODES = ".qweight"  # the end of what both called codes

# Keys with which a file tells transformers what code to run or to fetch, beside those that ``_selects_code`` tells by their form.
CODE_KEYS = {
    "auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "use_kernels", "kernel_config", "allow_all_kernels",
    "compile_config",
}  # fmt: skip

# What of generation_config.json must be a token or several, and what a number.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
NUMBER_KEYS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_beams", "num_return_sequences",
)  # fmt: skip

# How transformers writes what JSON has no number for; state-space models have such a limit of a time step.
INFINITIES: tuple[dict[str, str], ...] = ({"__float__": "Infinity"}, {"__float__": "-Infinity"})

# Counts, by the form of their names. transformers makes a kind for each layer, a name for each label and the like while it reads the file.
COUNTS = re.compile(r"num_|n_(layer|head|label)|(.*_)?(layers|depths?)$")
MOST_COUNT = 100_000

# Real models store a tensor for every second module or so. One that has this many times more modules than the file has tensors is not
# the model in the file, and building it could take hours.
MODULES_PER_TENSOR = 16
FEWEST_MODULES = 1_000
# What a model computes for itself rather than store: tables of positions, masks. They can grow with the square of a number in the config.
MOST_BUFFER_BYTES = 1 << 30


def read_config(folder: Path) -> dict[str, Any]:
    """What stands in config.json, without keys that select code, which transformers would fetch or run as the file asks: attention and
    expert kernels, Python files of the folder, its own private state.

    Raises PTQError or UsageError, naming the file, if it is missing, is no JSON, or stands beside an adapter.
    """
    from transformers import PreTrainedConfig

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such model folder")
    refuse_adapter(folder)
    if not (folder / CONFIG_FILE).is_file():
        unfinished = unfinished_run(folder)
        if unfinished is not None:
            raise PTQError(f"{folder}: {unfinished}")
        raise PTQError(f"{folder}: has no config.json, so it is not a transformers model folder")
    values: dict[str, Any] = _data(read_json(folder / CONFIG_FILE), PreTrainedConfig)
    beside = next((folder / name for name in QUANTIZATION_FILES if (folder / name).is_file()), None)
    if beside is not None and "quantization_config" not in values and _holds_codes(folder):
        values["quantization_config"] = read_json(beside)
    _check_numbers(values, folder / CONFIG_FILE)
    return values


def _holds_codes(folder: Path) -> bool:
    """Whether the weights in ``folder`` are such as a file in QUANTIZATION_FILES tells of; one may be left there beside any others.

    Weights under no usual name are: that file says what they are called.
    """
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return any(folder.glob("*.safetensors"))
    return any(name.endswith(CODES) for name in SafetensorsFolder(folder).names)


def _check_numbers(values: dict[str, Any], file: Path) -> None:
    """Refuse, at any depth, what is no number and what would keep transformers busy for hours."""
    for key, value in values.items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                _check_numbers(entry, file)
            elif isinstance(entry, float) and math.isnan(entry):
                raise PTQError(f"{file}: {shown(key)} is NaN, not a number; write the right one")
            elif isinstance(entry, (int, float)) and entry > MOST_COUNT and COUNTS.match(key):
                raise PTQError(f"{file}: {shown(key)} is {shown(entry)}, more than any model has; write the right number")


def _data(value: Any, config_class: type) -> Any:
    """``value`` without keys that select code, at any depth."""
    if isinstance(value, list):
        return [_data(entry, config_class) for entry in value]
    if not isinstance(value, dict) or value in INFINITIES:
        return value
    return {
        key: entry if key == "quantization_config" else _data(entry, config_class)
        for key, entry in value.items()
        if not _selects_code(key, config_class)
    }


def _selects_code(key: str, config_class: type) -> bool:
    # transformers sets every key as an attribute: one with the name of a method would take its place.
    return key.startswith("_") or key.endswith("_implementation") or key in CODE_KEYS or callable(getattr(config_class, key, None))


def load_config(folder: Path) -> Any:
    """The transformers configuration in ``folder``, of ``read_config``, or of a GGUF file. Raises PTQError when it is missing, broken, or
    needs code from the folder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if folder.suffix == SUFFIX and folder.is_file():
        from ptqcli.model import gguf  # which builds models of configurations

        return gguf.load_config(folder)

    values = read_config(folder)
    file, model_type = folder / CONFIG_FILE, values.get("model_type")
    if not isinstance(model_type, str):
        raise PTQError(f"{file}: model_type is {shown(model_type)}; transformers needs the name of an architecture there")
    if model_type not in CONFIG_MAPPING and "auto_map" in read_json(file):
        raise PTQError(f"{folder}: the model needs Python code from its folder, which is never run")
    # transformers reads a file, not values, and looks for others beside it.
    with foreign(f"{file}: transformers cannot read it"), written_file(json.dumps(values).encode()) as alone, _quiet_transformers():
        config = AutoConfig.from_pretrained(alone, local_files_only=True, trust_remote_code=False)
        config.name_or_path = str(folder)
    _check_read_here(config, file)
    return config


def _check_read_here(config: Any, file: Path) -> None:
    """The values that are read in this package, which transformers takes as they come."""
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PTQError(f"{file}: architectures is {shown(names)}, not a list of names")
    if config.dtype is not None and config.dtype not in FLOATING:
        raise PTQError(f"{file}: dtype is {shown(config.dtype)}, not float32, float16 or bfloat16")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and not (type(positions) is int and 0 < positions < 2**31):
        raise PTQError(f"{file}: max_position_embeddings is {shown(positions)}, not a number of tokens")


def read_generation_config(folder: Path) -> Any:
    """What generation_config.json in ``folder`` says of tokens and sampling, without keys that select code; None where there is no such
    file. Raises PTQError, naming the key, if it is broken."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    values = _data(read_json(file), GenerationConfig)
    for key in TOKEN_KEYS:
        tokens = values.get(key)
        if tokens is not None and not all(type(token) is int and 0 <= token < 2**31 for token in _as_list(tokens)):
            raise PTQError(f"{file}: {key} is {shown(tokens)}, not a token or a list of tokens")
    for key in NUMBER_KEYS:
        if not isinstance(values.get(key), (int, float, type(None))):
            raise PTQError(f"{file}: {key} is {shown(values[key])}, not a number")
    with foreign(f"{file}: transformers cannot read it"), _quiet_transformers():
        return GenerationConfig.from_dict(values)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# While accelerate builds without weights it replaces a method of all modules; two threads at once would leave it replaced.
BUILDING = threading.Lock()


def build_on_meta(config: Any, stored: int | None = None) -> nn.Module:
    """The model of ``config`` with parameters on the meta device and its constant buffers computed on the CPU.

    stored: how many tensors its file holds, where there is one. Raises PTQError for a config that transformers cannot build, or that asks
    for far more modules than ``stored`` tensors can fill.
    """
    import transformers

    kind = kind_of(config)
    found = getattr(transformers, kind.auto_class)
    if issubclass(found, transformers.PreTrainedModel):
        return _build(config, kind.auto_class, found, stored)
    return _build(config, kind.name, lambda wanted: found.from_config(wanted, trust_remote_code=False), stored)


def build_named_class(config: Any, name: str, stored: int) -> nn.Module | None:
    """As ``build_on_meta``, in the class ``name`` of transformers, the one that config.json names; None if there is no such model class.

    It can hold more than the model that is quantized: images, say. Raises PTQError if transformers cannot build it.
    """
    import transformers

    with foreign(f"{config.name_or_path}: the class {name} cannot be imported"):
        found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    wanted: Any = found.config_class  # type: ignore[attr-defined]
    return _build(config, name, found, stored) if wanted is not None and isinstance(config, wanted) else None


def _build(config: Any, what: str, make: Callable[[Any], nn.Module], stored: int | None) -> nn.Module:
    from accelerate import init_empty_weights

    config, where = copy.deepcopy(config), config.name_or_path or "the model in memory"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with BUILDING, foreign(f"{where}: transformers cannot build a {what} from this config"), _quiet_transformers():
        if stored is not None:
            _check_size(copy.deepcopy(config), make, stored, where)
        with init_empty_weights(include_buffers=False):
            return make(config).eval()


def _check_size(config: Any, make: Callable[[Any], nn.Module], stored: int, where: str) -> None:
    """Build a model that takes no memory at all, to learn whether one that does is that of the file."""
    try:
        with torch.device("meta"), _modules_for(stored, where):
            buffers = sum(buffer.nbytes for buffer in make(config).buffers())
    except PTQError:
        raise
    except Exception:  # noqa: BLE001 - code that looks at values, of which there are none; what is wrong besides, the real one will say
        return
    if buffers > MOST_BUFFER_BYTES:
        raise PTQError(f"{where}: config.json asks for constants of {buffers >> 20} MiB, as no model has; some number in it is too large")


@contextmanager
def _modules_for(stored: int, where: str) -> Iterator[None]:
    """Stop this thread with a PTQError when it has put together far more modules than ``stored`` tensors can fill."""
    thread, made = threading.get_ident(), 0
    most = max(MODULES_PER_TENSOR * stored, FEWEST_MODULES)

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise PTQError(f"{where}: config.json asks for more than {most} modules, far more than the tensors of the file can fill")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers warns on its logger about token ids of tiny or unusual configs; what matters is raised by us."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
