"""Numbers in config.json that transformers works through when it reads the file, and what is no number: refused at once.

Rows 32, 35. A list of the layers' kinds or a name for each label is made before any model is, so that no count of modules can stop it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_model

from ptqcli.errors import PTQError
from ptqcli.model.config import load_config


def with_values(folder: Path, **values: object) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("layer_types", None)
    file.write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("architecture", "key"), [("qwen2", "num_hidden_layers"), ("gemma3", "num_hidden_layers"), ("llama", "num_labels"), ("gpt2", "n_layer")]
)
def test_a_count_that_no_model_has(tmp_path: Path, architecture: str, key: str) -> None:
    make_model(tmp_path, architecture)
    with pytest.raises(PTQError, match=rf"config\.json: '{key}' is 1000000000, more than any model has"):
        load_config(with_values(tmp_path, **{key: 10**9}))


def test_a_count_in_the_config_of_a_part(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(PTQError, match="'num_hidden_layers' is 1e\\+300, more than"):
        load_config(with_values(tmp_path, parts=[{"text_config": {"num_hidden_layers": 1e300}}]))


def test_nan(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(PTQError, match="'rms_norm_eps' is NaN"):
        load_config(with_values(tmp_path, rms_norm_eps=float("nan")))


def test_what_models_have(tmp_path: Path) -> None:
    """Infinity is a limit that some state space models name, and positions go into the millions."""
    make_model(tmp_path)
    values = {"time_step_limit": [0.0, float("inf")], "max_position_embeddings": 10_485_760, "num_labels": 21_843, "n_positions": 1 << 21}
    assert load_config(with_values(tmp_path, **values)).num_labels == 21_843


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64"])
def test_a_dtype_that_no_weight_is_trained_in(tmp_path: Path, dtype: str) -> None:
    make_model(tmp_path)
    with pytest.raises(PTQError, match=rf"config\.json: dtype is torch\.{dtype}, not float32, float16 or bfloat16"):
        load_config(with_values(tmp_path, dtype=dtype))
