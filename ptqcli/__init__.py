"""Post-training quantization of language models: a model in, a small packed checkpoint out, its quality measured.

    import ptqcli

    report = ptqcli.quantize("model", "w4a16-gptq", output="small")       # a folder, a hub id, or a model in memory
    [result] = ptqcli.evaluate("small", "wikitext2")                       # perplexity, KL divergence from the original
    ptqcli.compare(["small", "smaller"]).to_json()                          # several, on the same tokens, with errors
    model = ptqcli.load_quantized("small", device="cuda")                  # a transformers model on this package's kernels

``open_checkpoint`` looks into a quantized folder without loading it, ``solve`` chooses codes for a single matrix. Requests are made of
``Recipe`` and ``Scheme``, a ``Report`` says what was done, and what goes wrong is a ``PTQError``, or a ``UsageError`` where the request
itself cannot work. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptqcli.api import convert, measure_sensitivity, quantize, solve, tune_scales
    from ptqcli.api_measuring import compare, evaluate
    from ptqcli.errors import PTQError, UsageError
    from ptqcli.formats.packed_checkpoint import open_checkpoint
    from ptqcli.numerics.scheme import Scheme
    from ptqcli.pipeline.report import Report
    from ptqcli.recipe import Recipe
    from ptqcli.runtime import load_quantized

__all__ = [
    "PTQError",
    "Recipe",
    "Report",
    "Scheme",
    "UsageError",
    "compare",
    "convert",
    "evaluate",
    "load_quantized",
    "measure_sensitivity",
    "open_checkpoint",
    "quantize",
    "solve",
    "tune_scales",
]
__version__ = "0.1.0"

_HOMES = {
    "PTQError": "ptqcli.errors",
    "Recipe": "ptqcli.recipe",
    "Report": "ptqcli.pipeline.report",
    "Scheme": "ptqcli.numerics.scheme",
    "UsageError": "ptqcli.errors",
    "compare": "ptqcli.api_measuring",
    "convert": "ptqcli.api",
    "evaluate": "ptqcli.api_measuring",
    "load_quantized": "ptqcli.runtime",
    "measure_sensitivity": "ptqcli.api",
    "open_checkpoint": "ptqcli.formats.packed_checkpoint",
    "quantize": "ptqcli.api",
    "solve": "ptqcli.api",
    "tune_scales": "ptqcli.api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and with it torch as a rule, only then: ``ptq --help`` must not wait."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
