"""A claim about a reader is tried for each architecture, not guessed.

What the plan says of transformers must be what transformers does: where a model's own code asks packed linears for their weights while
it loads, it needs ``dequantize=True``, and where it would expand several schemes as one, it reads nothing.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from sweep_architectures import file_class, make_model, relative, run
from tiny import write_text
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import ptqcli
from ptqcli.formats import LinearSpec
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources

EXPANDS_FIRST = Version(transformers.__version__) >= Version("5.23")  # with dequantize=True, before anything asks for weights
TWO_SCHEMES = {"overrides": [{"pattern": r"\.0\.", "bits": 8}]}
ASYMMETRIC = {"symmetric": False}


def readers(folder: Path, kind: str, **changes: Any) -> tuple[list[str], str, str]:
    """What the plan says of transformers, and how it reads the result by itself and with ``dequantize=True``."""
    make_model(kind, file_class(kind), folder / "model")
    changes = {"algo": "rtn", "group_size": 16, **changes}
    ptqcli.quantize(folder / "model", output=folder / "out", **changes)
    notes = plan_run(folder / "model", load_recipe(flags=changes), Resources())[1].notes
    truth = run(ptqcli.load_quantized(folder / "out"))
    return [note for note in notes if "transformers" in note], *(read(folder / "out", truth, expand) for expand in (False, True))


def read(folder: Path, truth: torch.Tensor, expand: bool) -> str:
    choice = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if expand else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **choice)
    except (AttributeError, ValueError, RuntimeError):
        return "fails"
    with torch.no_grad():
        return "right" if not info["missing_keys"] and relative(run(model.eval()), truth) < 1e-3 else "wrong"


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_nothing_is_said_of_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    assert readers(tmp_path, kind) == ([], "right", "right")


@pytest.mark.parametrize("kind", ["mamba", "modernbert-decoder", "nanochat", "falcon"])
def test_a_model_that_asks_packed_linears_for_their_weight(kind: str, tmp_path: Path) -> None:
    [note], packed, expanded = readers(tmp_path, kind)
    assert "does not take packed weights" in note
    assert note.endswith("transformers needs CompressedTensorsConfig(dequantize=True), from version 5.23 on")
    assert (packed, expanded) == ("fails", "right" if EXPANDS_FIRST else "fails")


@pytest.mark.parametrize(("kind", "changes"), [("modernbert-decoder", TWO_SCHEMES), ("llama", {**TWO_SCHEMES, **ASYMMETRIC})])
def test_what_must_be_expanded_may_have_one_scheme(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    [note], packed, expanded = readers(tmp_path, kind, **changes)
    assert "since its dequantize=True expands all schemes as the first" in note
    assert "right" not in (packed, expanded) or (not EXPANDS_FIRST and "from 5.23 on" in note)


@pytest.mark.parametrize("kind", ["modernbert-decoder", "falcon"])
def test_bytes_are_stored_under_the_name_of_the_weight(kind: str, tmp_path: Path) -> None:
    """With activations of 8 bits, so the same models load, which used to be denied."""
    text = str(write_text(tmp_path / "text.txt"))
    static = {"wbits": 8, "abits": 8, "group_size": -1, "act_scales": "static", "calib": text, "nsamples": 2, "seqlen": 32}
    notes, packed, _ = readers(tmp_path, kind, **static)
    assert (notes, packed) == ([], "right")


class Holder(nn.Module):
    """Asks for its linear's weight when transformers hands it to its code for initial values; ``broken``: fails by itself there."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.linear, self.broken = nn.Linear(32, 32), broken

    def initialize_weights(self) -> None:
        if self.broken:
            raise RuntimeError("with any weights")
        assert self.linear.weight is not None


@pytest.mark.parametrize(("broken", "said"), [(False, 1), (True, 0)])
def test_a_failure_that_packing_does_not_cause_says_nothing(broken: bool, said: int) -> None:
    spec = LinearSpec(name="linear", scheme=Scheme(4, 32), out_features=32, in_features=32, scale_dtype=torch.float32)
    model = Holder(broken)
    assert len(COMPRESSED_TENSORS.trial([model], [spec])) == said
    assert isinstance(model.linear.weight, nn.Parameter)
    assert COMPRESSED_TENSORS.trial([model, model], [LinearSpec(**{**vars(spec), "name": "other"})]) == []
