"""Every language model of transformers, tiny and random: quantized, loaded by every reader, compared with the dequantized model.

    python scripts/sweep_architectures.py [TYPE ...] [--jobs 2] [--results sweep.jsonl] [--write] [--seconds 180] [--gib 8]

For each model type of transformers' mappings for causal language models, for models with images or sound, for masked language models
(``TYPE encoder``) and for encoders with decoders (``TYPE encoder-decoder``) a small configuration is made (``tiny_config``) and a random
model of it is saved in the class that a file of that type names: the one with images where there is one. It is quantized by ``rtn``, by
``gptq``, by ``awq+gptq`` and in two schemes. The truth is a third folder, in which every packed matrix is replaced by what the
compressed-tensors library itself reads from the file. Its logits, from transformers, must be those of the quantized folder loaded by
transformers, in the class that config.json names and in the one that the auto class builds, and by ``ptqcli.load_quantized``. What the
plan says of readers must be what happens.

Each type runs in a process of its own, with limits of time and memory. Finished ones stand in the results file and are not run again.
--write: put the table into docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from packaging.version import Version
from safetensors.torch import save_file
from sweep_page import Outcome, Row, read, summary, table
from tiny_config import tiny_configs
from transformers import AutoConfig, CompressedTensorsConfig
from transformers.models.auto import modeling_auto

import ptqcli
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError
from ptqcli.model.classes import build_classes
from ptqcli.model.kinds import is_encoder, kind_of
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architectures.md"
TOKENS = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
VERSIONS = {
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "compressed-tensors": compressed_tensors.__version__,
    "ptqcli": ptqcli.__version__,
}
TOLERANCE = 1e-3  # of the largest logit: two orders of adding up in float32 differ by less, a wrong matrix by far more
TOO_LARGE = 20_000_000  # parameters
ENCODER = " encoder"  # behind a type: its class for masked words
BOTH = " encoder-decoder"  # behind a type: its class for texts or sound made to texts
# What each type is put through. Two schemes are told apart by names alone, which every reader has to find in its own model.
REQUESTS: dict[str, dict[str, Any]] = {
    "rtn": {"algo": "rtn"},
    "gptq": {"algo": "gptq"},
    "awq": {"algo": "awq+gptq"},
    "two schemes": {"algo": "rtn", "overrides": [{"pattern": r"\.0\.", "bits": 8}]},
}


def sweep(kind: str, folder: Path, requests: Mapping[str, Mapping[str, Any]] = REQUESTS) -> Row:
    """Everything about one model type, in ``folder``."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    file = file_class(kind)
    row = Row(kind, file.__name__ if file else "", "", {})
    try:
        built, seen = make_model(kind, file, folder / "model")
    except Exception as error:  # noqa: BLE001  transformers' own failure, or this script's
        refusal = refused_config(kind)
        outcome = Outcome("refused", refusal) if refusal else Outcome("not tried", f"no tiny model: {one_line(error)}")
        row.outcomes = dict.fromkeys(requests, outcome)
        return row
    row.built = built
    for request, changes in requests.items():
        try:
            row.outcomes[request] = quantized(folder, changes, file, seen)
        except PTQError as error:
            row.outcomes[request] = Outcome("refused", str(error).replace(f"{folder}/", ""))
        except Exception as error:  # noqa: BLE001  what this script is looking for
            row.outcomes[request] = Outcome("crash", f"{one_line(error)} {place(error)}")
        for made in ("out", "dequantized"):
            shutil.rmtree(folder / made, ignore_errors=True)
    return row


def file_class(kind: str) -> Any:
    """The class that a file of this type names: with images, sound or an encoder where the type has one."""
    tables = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    if kind.endswith(ENCODER):
        tables = (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,)
    if kind.endswith(BOTH):
        tables = (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    kind = type_of(kind)
    name = next(table[kind] for table in tables if kind in table)
    return getattr(transformers, name if isinstance(name, str) else name[0], None)


def type_of(kind: str) -> str:
    """What config.json calls it."""
    return kind.removesuffix(ENCODER).removesuffix(BOTH)


def make_model(kind: str, file: Any, folder: Path) -> tuple[str, torch.Tensor]:
    """Save a random model; return the name of the class that the auto class builds of it, and the logits of the file's own class.

    An encoder with a decoder is not run: it is to be refused before it would be.
    """
    last: Exception = RuntimeError("no configuration is accepted")
    for config in tiny_configs(transformers.CONFIG_MAPPING[type_of(kind)], **TOKENS):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in file(config).parameters())
            if size > TOO_LARGE:
                raise RuntimeError(f"the configuration does not get smaller than {size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = file(config).float().eval()
            draw(model)
            if kind.endswith(BOTH):
                model.save_pretrained(folder)
                return file.__name__, torch.zeros(1)
            logits = run(model)
            if not torch.isfinite(logits).all():
                model = file(config).float().eval()
                logits = run(model)
        except Exception as error:  # noqa: BLE001  the next configuration may do
            last = error
            continue
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            built = type(build(config)).__name__
        return built, logits
    raise last


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Wider weights than transformers draws, so that the logits depend on every layer."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith("weight"):
            parameter.normal_(std=0.5 if id(parameter) in embeddings else 1.5 / parameter.shape[1] ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # as in trained models; some classes set it to zero whenever they load


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    """Logits of 24 tokens in two windows, float32 [2, 24, words]."""
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    encoder = is_encoder(model.config)
    logits: torch.Tensor = model(input_ids=ids)[0] if encoder else model(input_ids=ids, use_cache=False).logits
    return logits.float()


def auto_class(config: Any) -> Any:
    """The class of transformers that builds what ptqcli builds of a configuration."""
    return getattr(transformers, kind_of(config).auto_class)


def build(config: Any) -> Any:
    """A model of ``auto_class``."""
    found = auto_class(config)
    return found.from_config(config) if hasattr(found, "from_config") else found(config)


def quantized(folder: Path, request: Mapping[str, Any], file: Any, before: torch.Tensor) -> Outcome:
    """Quantize the model in ``folder`` and compare what every reader makes of it. before: logits of the original."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"{number} models weigh {number * 7 % 31}" for number in range(600)))
    changes = {**request, "calib": str(text), "nsamples": 4, "seqlen": 32, "group_size": 16}
    try:
        report = ptqcli.quantize(folder / "model", output=folder / "out", **changes)
    except PTQError as error:
        if "does not divide" not in str(error):
            raise
        changes["group_size"] = -1
        report = ptqcli.quantize(folder / "model", output=folder / "out", **changes)
    notes = plan_run(folder / "model", load_recipe(flags=changes), Resources())[1].notes
    dequantize(folder / "out", folder / "dequantized", file)
    truths = {file: run(load(file, folder / "dequantized"))}
    if relative(truths[file], before) < TOLERANCE:
        return Outcome("wrong", "nothing that the logits depend on was quantized")
    config = AutoConfig.from_pretrained(folder / "model")
    with torch.device("meta"):
        built = type(build(config))
    readers = [file] if built is file else [file, auto_class(config)]
    wrong = compared(folder, readers, truths, {})
    ours = ours_compared(folder, readers[-1], built, truths)
    if ours:
        return Outcome("wrong", ours)
    said = next((note for note in notes if "dequantize=True" in note or "transformers does not" in note), "")
    if not wrong:
        return Outcome("wrong", f"transformers reads it, but the plan says: {said}") if said else Outcome("right", unscaled(report))
    if not said:
        return Outcome("wrong", f"{wrong}, and no note says so")
    first = re.search(r"from version (\S+) on", said)
    if "needs CompressedTensorsConfig(dequantize=True)" not in said or (first and Version(transformers.__version__) < Version(first[1])):
        return Outcome("refused by transformers", said)
    still = compared(folder, readers, truths, {"quantization_config": CompressedTensorsConfig(dequantize=True)})
    return Outcome("wrong", f"{still}, although the plan says: {said}") if still else Outcome("dequantize only", said)


def unscaled(report: Any) -> str:
    """Why a transform of the run has scaled nothing, or nothing if it has, or if there was none."""
    if not report.folds or any(fold.choices for fold in report.folds):
        return ""
    return f"awq scales nothing: {next(fold.left_alone for fold in report.folds)}"


def compared(folder: Path, readers: list[Any], truths: dict[Any, torch.Tensor], choice: dict[str, Any]) -> str:
    """What the first of transformers' classes does wrong, or nothing. Each is compared with its own reading of the dequantized folder."""
    for kind in readers:
        name = f"transformers ({kind.__name__})"
        try:
            truth = truth_of(kind, folder, truths)
        except RuntimeError:
            if kind.__name__.startswith("Auto"):
                continue  # of some types it does not find the tensors, quantized or not
            raise
        try:
            found = run(load(kind, folder / "out", **choice))
        except Exception as error:  # noqa: BLE001  a reader's failure is a result
            return f"{name}: {one_line(error)} {place(error)}"
        if not relative(found, truth) < TOLERANCE:
            return f"{name}: relative error {relative(found, truth):.2g}"
    return ""


def ours_compared(folder: Path, auto: Any, built: Any, truths: dict[Any, torch.Tensor]) -> str:
    """What ptqcli does wrong, or nothing. auto: the class of transformers that builds a model of the class ``built``."""
    try:
        model: Any = ptqcli.load_quantized(folder / "out")
        found = run(model)
    except Exception as error:  # noqa: BLE001  a reader's failure is a result
        return f"ptqcli: {one_line(error)} {place(error)}"
    truth = truth_of(auto if type(model) is built else type(model), folder, truths)
    return "" if relative(found, truth) < TOLERANCE else f"ptqcli: relative error {relative(found, truth):.2g}"


def truth_of(kind: Any, folder: Path, truths: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Logits of the dequantized folder, read by a class of transformers."""
    if kind not in truths:
        truths[kind] = run(load(kind, folder / "dequantized"))
    return truths[kind]


def load(kind: Any, folder: Path, **choice: Any) -> Any:
    """A folder as transformers loads it. Raises RuntimeError for tensors that do not find their place."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **choice)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"missing {sorted(info['missing_keys'])[:2]}, mismatched {sorted(info['mismatched_keys'])[:2]}")
    return model.eval()


def dequantize(folder: Path, target: Path, file: Any) -> None:
    """Write the folder again with every packed matrix as compressed-tensors reads it. Its scheme is told by the shapes, not by names."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    reader = SafetensorsFolder(folder)
    stored = {name: reader.read(name) for name in reader.names}
    with torch.device("meta"):  # GPT-2's own class holds its matrices the other way round
        turned = {name for name, module in file(AutoConfig.from_pretrained(folder)).named_modules() if type(module).__name__ == "Conv1D"}
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        parts = {leaf: stored.pop(f"{name}.{leaf}") for leaf in ("weight_packed", "weight_scale", "weight_shape")}
        columns, groups = int(parts["weight_shape"][1]), parts["weight_scale"].shape[1]
        size = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": columns // groups}
        weights = QuantizationArgs(num_bits=parts["weight_packed"].shape[1] * 32 // columns, symmetric=True, **size)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
        weight = library.decompress(parts, scheme)["weight"]
        stored[f"{name}.weight"] = weight.t() if name in turned else weight
    restack(stored, folder.parent / "model")
    target.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))


def restack(stored: dict[str, torch.Tensor], model: Path) -> None:
    """Put matrices that were cut out of a stack of the model's files, as experts are, back into it."""
    tensors, config = SafetensorsFolder(model), AutoConfig.from_pretrained(model)
    for name, part in build_classes(config, tensors.names, config.architectures).cut.items():
        if part.stack not in stored:
            stored[part.stack] = tensors.read(part.stack)
        matrix = stored[part.stack][part.index]
        (matrix.t() if part.turned else matrix)[part.start : part.stop] = stored.pop(name)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest logit."""
    return float((found - truth).abs().max() / truth.abs().max())


def refused_config(kind: str) -> str:
    """What ptqcli says of the type's default configuration, or nothing if it would go on."""
    try:
        kind_of(transformers.CONFIG_MAPPING[type_of(kind)]())
    except PTQError as error:
        return str(error)
    except Exception:  # noqa: BLE001
        return ""
    return ""


def one_line(error: BaseException) -> str:
    """An error as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def place(error: BaseException) -> str:
    """Where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(last.filename).name}:{last.lineno})"


def in_child(kind: str, seconds: float, gib: float) -> Row:
    """``sweep`` in a process of its own."""
    context = multiprocessing.get_context("fork")  # the libraries are imported already
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        process = context.Process(target=_child, args=(kind, Path(folder), gib, sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(seconds):
                return receiver.recv()
            outcome = Outcome("crash", f"not done after {seconds:.0f} s")
        except EOFError:
            outcome = Outcome("crash", "the process died")
        finally:
            process.kill()
            process.join()
    return Row(kind, "", "", dict.fromkeys(REQUESTS, outcome))


def _child(kind: str, folder: Path, gib: float, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30),) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sender.send(sweep(kind, folder))


def all_types() -> list[str]:
    """Every model type, those of encoders, alone or with decoders, marked."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    encoders = [f"{kind}{ENCODER}" for kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    names_of_both = {**modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    both = [f"{kind}{BOTH}" for kind in names_of_both if getattr(transformers.CONFIG_MAPPING[kind](), "is_encoder_decoder", False)]
    return [*names, *(kind for kind in with_images if kind not in names), *encoders, *both]


def main() -> None:
    """Run what is not known yet, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="model types; all when none is named")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"), help="one line a finished type")
    parser.add_argument("--seconds", type=float, default=180, help="limit of time for each type")
    parser.add_argument("--gib", type=float, default=16, help="limit of address space for each type")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    rows = read(options.results)
    wanted = [kind for kind in options.kinds or all_types() if kind not in rows]
    with ThreadPoolExecutor(options.jobs) as pool, options.results.open("a") as log:
        for number, row in enumerate(pool.map(lambda kind: in_child(kind, options.seconds, options.gib), wanted), 1):
            rows[row.kind] = row
            log.write(json.dumps(asdict(row)) + "\n")
            log.flush()
            print(f"{number}/{len(wanted)} {row.kind}:", *summary(row), flush=True)
    page = table(rows, VERSIONS)
    print(page.partition("\n| type |")[0])
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(page)


if __name__ == "__main__":
    main()
