"""config.json, and the model without weights that it describes."""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ptqcli.checkpoint.auxiliary import refuse_adapter
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.kinds import kind_of

# What transformers raises, depending on the model type, for a value in config.json that makes no sense.
CONFIG_ERRORS = (ValueError, KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError, StrictDataclassError)


def load_config(folder: Path) -> Any:
    """The transformers configuration in ``folder``.

    Raises PTQError when it is missing, broken, needs code from the folder, or stands beside an adapter.
    """
    from transformers import AutoConfig

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such model folder")
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise PTQError(f"{folder}: has no config.json, so it is not a transformers model folder")
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, *CONFIG_ERRORS) as error:
        if "trust_remote_code" in str(error):
            raise PTQError(f"{folder}: the model needs Python code from its folder, which is never run") from error
        raise PTQError(f"{folder / 'config.json'}: transformers cannot read it ({first_line(error)})") from error
    return config


# While accelerate builds without weights it replaces a method of all modules; two threads at once would leave it replaced.
BUILDING = threading.Lock()


def build_on_meta(config: Any) -> nn.Module:
    """The model of ``config`` with parameters on the meta device and its constant buffers computed on the CPU."""
    import transformers

    kind = kind_of(config)
    auto_class = getattr(transformers, kind.auto_class)
    return _build(config, kind.name, lambda wanted: auto_class.from_config(wanted, trust_remote_code=False))


def build_named_class(config: Any, name: str) -> nn.Module | None:
    """As ``build_on_meta``, in the class ``name`` of transformers, the one that config.json names; None if there is no such model class.

    It can hold more than the model that is quantized: images, say. Raises PTQError if transformers cannot build it.
    """
    import transformers

    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    wanted: Any = found.config_class  # type: ignore[attr-defined]
    return _build(config, name, found) if wanted is not None and isinstance(config, wanted) else None


def _build(config: Any, what: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with BUILDING, init_empty_weights(include_buffers=False), _quiet_transformers():
            model = make(config)
    except (ImportError, RuntimeError, *CONFIG_ERRORS) as error:
        raise PTQError(f"transformers cannot build a {what} from this config: {first_line(error)}") from error
    return model.eval()


def first_line(error: BaseException) -> str:
    """An error's message as one line of bounded length."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


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
