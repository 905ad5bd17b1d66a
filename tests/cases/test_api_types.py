"""Kind: plain TypeErrors from a public function. An argument of a wrong type is told in one line, by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, make_model

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Override, Recipe
from ptqcli.resources import Resources
from ptqcli.solvers.rtn import RTN

WEIGHT = torch.randn(8, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model(folder, num_hidden_layers=1)
    return folder


CALLS: list[tuple[Callable[[Path, Path], Any], str]] = [
    (lambda model, out: ptqcli.quantize(model, output=None), "output is a path, not NoneType"),
    (lambda model, out: ptqcli.quantize(model, output=""), "output '' is no path"),
    (lambda model, out: ptqcli.quantize(model, output="a\0b"), "is no path"),
    (lambda model, out: ptqcli.quantize(model, output=out, data_dir=3), "data_dir is a path, not int"),
    (lambda model, out: ptqcli.quantize(model, output=out, overwrite="no"), "overwrite must be bool, not 'no'"),
    (lambda model, out: ptqcli.quantize(model, output=out, seqlen="3"), "'seqlen' must be int, not '3'"),
    (lambda model, out: ptqcli.quantize(model, output=out, batch_size="3"), "batch size '3' is not valid"),
    (lambda model, out: ptqcli.quantize(model, output=out, dtype="bfloat16"), "dtype 'bfloat16' is not valid"),
    (lambda model, out: ptqcli.quantize(model, output=out, device=3.5), "device 3.5 is unknown"),
    (lambda model, out: ptqcli.quantize(model, output=out, group_size=1.5), "'group_size' must be int or str, not 1.5"),
    (lambda model, out: ptqcli.quantize(None, output=out), "a model is a folder, a hub id or a model of transformers, not NoneType"),
    (lambda model, out: ptqcli.quantize(model, 3, output=out), "a recipe is a Recipe, a name or a YAML file, not int"),
    (lambda model, out: ptqcli.evaluate(model, "builtin", seqlen="3"), "seqlen must be int, or None, not '3'"),
    (lambda model, out: ptqcli.evaluate(model, "builtin", seqlen=True), "seqlen must be int, or None, not True"),
    (lambda model, out: ptqcli.evaluate(model, "builtin", stride=1.5), "stride must be int, or None, not 1.5"),
    (lambda model, out: ptqcli.evaluate(model, None), "texts must be str or Path or Sequence, not None"),
    (lambda model, out: ptqcli.evaluate(model, [3]), "a text must be str or Path, not 3"),
    (lambda model, out: ptqcli.evaluate(model, "builtin", data_dir=3), "data_dir is a path, not int"),
    (lambda model, out: ptqcli.evaluate(model, "builtin", bos=True), "bos True is unknown"),
    (lambda model, out: ptqcli.compare(3), "checkpoints must be Sequence, not 3"),
    (lambda model, out: ptqcli.compare([3]), "a checkpoint is a path, not int"),
    (lambda model, out: ptqcli.compare([]), "checkpoints are a list of folders; give one or more"),
    (lambda model, out: ptqcli.compare([model], tokens="3", baseline=model), "tokens must be int, or None, not '3'"),
    (lambda model, out: ptqcli.compare([model], speed=1, baseline=model), "speed must be bool, not 1"),
    (lambda model, out: ptqcli.open_checkpoint(None), "a checkpoint is a path, not NoneType"),
    (lambda model, out: ptqcli.open_checkpoint(out, dtype="float16"), "dtype must be dtype, or None, not 'float16'"),
    (lambda model, out: ptqcli.load_quantized(3), "a checkpoint is a path, not int"),
    (lambda model, out: ptqcli.solve(WEIGHT, 4), "scheme must be str or Scheme, not 4"),
    (lambda model, out: ptqcli.solve(WEIGHT, "w4a16-g32", None), "solver must be str, not None"),
    (lambda model, out: ptqcli.solve(WEIGHT, "w4a16-g32", "rtn", options=3), "options must be Mapping, or None, not 3"),
    (
        lambda model, out: ptqcli.solve(WEIGHT, "w4a16-g32", "rtn", scale_dtype="bfloat16"),
        "scale_dtype must be dtype, or None, not 'bfloat16'",
    ),
    (lambda model, out: Recipe(nsamples="3"), "recipe: 'nsamples' must be int, not '3'"),
    (lambda model, out: Recipe(wbits=True), "recipe: 'wbits' must be int, not True"),
    (lambda model, out: Recipe(overrides=["x"]), "recipe: 'overrides' must be"),
    (lambda model, out: Override("x", bits="8"), "override: 'bits' must be int, not '8'"),
]


@pytest.mark.parametrize("call, message", CALLS, ids=[message for _, message in CALLS])
def test_a_wrong_type_is_told_by_the_name_of_the_argument(call: Callable[..., Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        call(model, tmp_path / "out")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_fits_is_taken(model: Path, tmp_path: Path) -> None:
    loaded = make_model(tmp_path / "again", num_hidden_layers=1)
    report = ptqcli.quantize(loaded, output=str(tmp_path / "out"), tokenizer=byte_tokenizer(), algo="rtn", group_size="auto")
    assert Path(report.output) == tmp_path / "out"
    assert ptqcli.open_checkpoint(str(tmp_path / "out")).schemes


@pytest.mark.parametrize("window", [0, -1, 1.5, None])
def test_a_solver_without_a_window_is_refused_before_any_work(window: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Windowless:
        needs, moves_groups = None, staticmethod(lambda scheme: False)

    Windowless.window = window
    monkeypatch.setattr(Recipe, "solver", lambda self: Windowless())
    with pytest.raises(PTQError, match=f"the solver of rtn works on {window!r} blocks at once; its window must be a whole number"):
        plan_run(model, Recipe(algo="rtn"), Resources())
    assert not hasattr(RTN, "window")
