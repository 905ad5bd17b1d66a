"""Post-training quantization of language models from the command line.

``load_quantized`` is the one function for programs: a checkpoint folder as a transformers model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptqcli.runtime import load_quantized

__all__ = ["load_quantized"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the runtime, and with it torch, only for who asks for it: ``ptq --help`` must not wait."""
    if name == "load_quantized":
        from ptqcli.runtime import load_quantized

        return load_quantized
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
