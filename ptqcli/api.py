"""What a program imports from ``ptqcli``: the whole tool in a few functions. Arguments that are not the subject are given by keyword."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptqcli.algorithms import find_algorithm
from ptqcli.api_measuring import check_model, refuse_tokenizer
from ptqcli.arguments import as_path, check_argument
from ptqcli.budget import METHODS, MOST_BITS
from ptqcli.calibration.statistics import InputStatistics
from ptqcli.errors import PTQError, UsageError
from ptqcli.finishing.tune_scales import TuneScales
from ptqcli.formats.sources import open_source
from ptqcli.model.locate import find_model
from ptqcli.model.source import ModelInMemory, ModelSource
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.pipeline import converting, exporting, pipeline, tuning
from ptqcli.pipeline.converting import Converted
from ptqcli.pipeline.exporting import GGUF, Exported
from ptqcli.pipeline.progress import NoProgress, Progress
from ptqcli.pipeline.report import Report
from ptqcli.pipeline.sensitivities import measure_sensitivities
from ptqcli.pipeline.tuning import TunedCheckpoint
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources, open_device
from ptqcli.sensitivity.table import SensitivityTable
from ptqcli.shipped import find_recipe
from ptqcli.solvers import LinearTask, Stage, ignore_progress
from ptqcli.solvers.per_matrix import PerMatrix, StageWork, as_block_solver, statistics_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | str | Path | None = None,
    *,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    activation_budget: int | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Report:
    """Quantize ``model`` into the new checkpoint folder ``output``, as `ptq quantize` does.

    model: a local folder, a GGUF file, a hub id, or a transformers model in memory, which stays as it is; its tokenizer is then given by
    ``tokenizer``. allow_requantize: one whose weights are quantized already is taken, too; FP8 always is.
    output: where the checkpoint goes; what is there is kept, but for an earlier checkpoint if ``overwrite``. A run that was ended is gone
    on from by the same call, unless ``restart``; not one of a model in memory.
    recipe: a ``Recipe``, the name of a shipped one (`ptq recipes`), or a YAML file; None for the defaults.
    changes: keys as in a YAML file, which win over the recipe: ``algo="awq+gptq"``, ``scheme="w4a16-g64-asym"``, ``calib="c4"``,
    ``damp=0.1``, ``gptq={"damp": 0.1}``.
    device, dtype, batch_size, memory, activation_budget: see ``Resources``.
    data_dir: where files of known corpora are looked for first.
    progress: is told how far the work is.

    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    target = as_path(output, "output")
    for name, switch in (("overwrite", overwrite), ("restart", restart), ("allow_requantize", allow_requantize)):
        check_argument(switch, name, bool)
    return pipeline.quantize(
        _source(model, tokenizer, allow_requantize),
        _recipe(recipe, changes),
        target,
        overwrite=overwrite,
        restart=restart,
        resources=Resources(
            device=open_device(device), dtype=dtype, batch_size=batch_size, memory=memory, activation_budget=activation_budget
        ),
        data_dir=None if data_dir is None else as_path(data_dir, "data_dir"),
        progress=progress,
    )


def measure_sensitivity(
    model: str | Path | PreTrainedModel,
    methods: str | Sequence[str] | None = None,
    *,
    candidates: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> SensitivityTable:
    """What each scheme costs each group of linears of ``model``, as `ptq sensitivity` measures it; nothing is quantized.

    model, tokenizer: as in ``quantize``.
    methods: gradient, kl, hawq or output, one or several; None for the usual one. What ``table.write(path)`` writes is a ``sensitivity`` of
    ``quantize``.
    candidates: schemes, separated by commas, such as ``w2g64,w3g128,w4g128,w8``; None for those that go with the format.
    device, dtype, batch_size, memory: see ``Resources``.
    data_dir, progress: as in ``quantize``.
    changes: keys as in a YAML file: ``calib="c4"``, ``nsamples=32``, ``ignore=["layers.0"]``, ``format="gptq"``.

    Raises UsageError for a request that cannot work and PTQError for work that failed.
    """
    named = [] if methods is None else [methods] if isinstance(methods, str) else list(methods)
    for name in named:
        if name not in METHODS:
            raise UsageError(f"sensitivity {name!r} is unknown; use {', '.join(METHODS)}")
    asked = {"algo": "rtn", "target_bits": MOST_BITS, **({} if candidates is None else {"candidates": candidates}), **changes}
    return measure_sensitivities(
        _source(model, tokenizer, allow_requantize=False),
        load_recipe(None, asked),
        named,
        resources=Resources(device=open_device(device), dtype=dtype, batch_size=batch_size, memory=memory),
        data_dir=None if data_dir is None else as_path(data_dir, "data_dir"),
        progress=progress or NoProgress(),
    )


def tune_scales(
    checkpoint: str | Path,
    *,
    output: str | Path,
    model: str | Path | None = None,
    calib: str = Recipe.calib,
    nsamples: int | None = Recipe.nsamples,
    seqlen: int | None = None,
    bos: str = Recipe.bos,
    seed: int = Recipe.seed,
    steps: int = TuneScales.steps,
    lr: float = TuneScales.lr,
    norms: bool = TuneScales.norms,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    activation_budget: int | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> TunedCheckpoint:
    """Tune the scales of ``checkpoint`` end to end into the new folder ``output``, as `ptq tune-scales` does; codes stay as they are.

    model: the original, a folder or hub id; None for the one that the checkpoint was made from.
    calib, nsamples, seqlen, bos, seed: the windows, half of which are held out, see ``Recipe``; seqlen None: at most 512.
    steps, lr, norms: see ``finishing.tune_scales.TuneScales``.
    overwrite, device, dtype, batch_size, activation_budget, data_dir, progress: as in ``quantize``.

    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    for name, number, kind in (("steps", steps, int), ("lr", lr, float), ("norms", norms, bool), ("overwrite", overwrite, bool)):
        check_argument(number, name, *((int, float) if kind is float else (kind,)))
    windows = {"calib": calib, "nsamples": nsamples, "seqlen": seqlen, "bos": bos, "seed": seed}
    return tuning.tune_scales(
        find_model(str(checkpoint)),
        as_path(output, "output"),
        TuneScales(steps=steps, lr=lr, norms=norms),
        load_recipe(flags={"algo": "rtn", **windows}),
        model=None if model is None else find_model(str(model)),
        overwrite=overwrite,
        resources=Resources(device=open_device(device), dtype=dtype, batch_size=batch_size, activation_budget=activation_budget),
        data_dir=None if data_dir is None else as_path(data_dir, "data_dir"),
        progress=progress or NoProgress(),
    )


def convert(
    checkpoint: str | Path,
    to: str,
    *,
    output: str | Path,
    requantize: str | None = None,
    gguf_type: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted | Exported:
    """Write the quantized model in ``checkpoint`` into the new folder ``output`` in the format ``to``, as `ptq convert` does.

    checkpoint: a folder of `ptq quantize`, or any other that it reads. to: one of `ptq algorithms`' formats, or gguf, for which
    ``output`` is a file, and ``checkpoint`` may be a model that is not quantized.
    requantize: a scheme such as ``w4a16-g128`` for the linears that the format cannot hold as they are; None refuses them.
    gguf_type: block types as llama.cpp calls its mixes, see ``pipeline.exporting``.
    overwrite, progress: as in ``quantize``.
    Raises UsageError for what cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    for name, text in (("to", to), ("requantize", requantize), ("gguf_type", gguf_type)):
        check_argument(text, name, str, optional=name != "to")
    check_argument(overwrite, "overwrite", bool)
    if to == GGUF:
        if requantize is not None:
            raise UsageError("requantize does not go with gguf; codes that no block type holds become plain numbers")
        target = as_path(output, "output")
        return exporting.export(find_model(str(checkpoint)), target, mix=gguf_type, overwrite=overwrite, progress=progress or NoProgress())
    if gguf_type is not None:
        raise UsageError(f"gguf_type goes with gguf, not with {to}")
    return converting.convert(
        find_model(str(checkpoint)),
        to,
        as_path(output, "output"),
        requantize=requantize,
        overwrite=overwrite,
        progress=progress or NoProgress(),
    )


def solve(
    weight: Tensor,
    scheme: Scheme | str = "w4a16",
    solver: str = "gptq",
    *,
    inputs: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
    options: Mapping[str, object] | None = None,
) -> QuantizedWeight:
    """Codes for one matrix, for research: what the pipeline does with each linear, without a model around it.

    weight: floating [out, in].
    scheme: what the numbers are, such as w4a16-g64-asym or w8a8.
    solver: one of `ptq algorithms` that works on one matrix.
    inputs: what the linear receives, floating [..., in]; needed by solvers that look at it (gptq, obq) and by schemes with static
    activations or outliers.
    scale_dtype: of the scales; None: bfloat16, float32 for codebooks.
    options: of the solver, such as ``{"damp": 0.1}``.

    Raises UsageError for an unknown solver, option or scheme, a group size that does not divide ``in``, and inputs that are missing or of
    another width; PTQError for values that are not finite and for a Hessian that no damping makes positive definite.
    """
    _check_matrix(weight, inputs)
    check_argument(scheme, "scheme", str, Scheme)
    check_argument(solver, "solver", str)
    check_argument(options, "options", Mapping, optional=True)
    check_argument(scale_dtype, "scale_dtype", torch.dtype, optional=True)
    part = find_algorithm(solver)
    if part.transforms:
        raise UsageError(f"solver '{solver}': transforms work on blocks; name a solver alone")
    scheme = (Scheme.parse(scheme) if isinstance(scheme, str) else scheme).resolved(weight.shape[1])
    chosen = as_block_solver(Recipe(algo=solver, options={part.solver.name: dict(options or {})}).solver())
    if not isinstance(chosen, PerMatrix):
        raise UsageError(f"solver '{solver}' works on whole blocks, not on one matrix")
    needs = chosen.needs | statistics_for(scheme)
    if needs and inputs is None:
        raise UsageError(f"solver '{solver}' in {scheme} looks at the inputs of the linear; give inputs=")
    scheme.group_count(weight.shape[1])
    statistics = None
    if needs and inputs is not None:
        statistics = InputStatistics.empty(weight.shape[1], needs, inputs.numel() // inputs.shape[-1], weight.device)
        statistics.add(inputs.to(weight.device))
        statistics.check_finite("inputs")
    scale_dtype = scale_dtype or (torch.bfloat16 if scheme.codebook is None else torch.float32)
    if scheme.double and scale_dtype != torch.float32:
        raise UsageError(f"scales of {scheme} are float32 before they are rounded to 8 bits; leave scale_dtype out")
    task = LinearTask(name="weight", weight=weight.detach().float(), scheme=scheme, scale_dtype=scale_dtype)
    return StageWork(chosen.solver, Stage((task,), statistics)).solve(task, ignore_progress).weight


def _source(model: Any, tokenizer: Any, allow_requantize: bool) -> ModelSource:
    if isinstance(model, (str, Path)):
        refuse_tokenizer(tokenizer)
        return open_source(find_model(str(model)), allow_requantize)
    check_model(model)
    return ModelInMemory(model, tokenizer)


def _check_matrix(weight: Tensor, inputs: Tensor | None) -> None:
    for name, value in (("weight", weight), ("inputs", inputs)):
        if value is not None and not isinstance(value, Tensor):
            raise UsageError(f"{name} is a tensor, not {type(value).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UsageError(f"weight is {weight.dtype} {list(weight.shape)}; give a floating matrix [out, in]")
    if not weight.numel():
        raise UsageError(f"weight is {list(weight.shape)}, which holds nothing; give at least one row and one column")
    if inputs is not None and inputs.shape[-1:] != weight.shape[1:]:
        raise UsageError(f"inputs are {list(inputs.shape)}, but weight takes [..., {weight.shape[1]}]")
    if not torch.isfinite(weight).all():
        raise PTQError("weight holds NaN or infinity")


def _recipe(recipe: Recipe | str | Path | None, changes: Mapping[str, Any]) -> Recipe:
    if recipe is not None and not isinstance(recipe, (Recipe, str, Path)):
        raise UsageError(f"a recipe is a Recipe, a name or a YAML file, not {type(recipe).__name__}; give single keys by name, as wbits=4")
    return load_recipe(find_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe, changes)
