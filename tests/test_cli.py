"""The commands as a person meets them: what they print, what they refuse, and their exit codes."""

from __future__ import annotations

import errno
import fnmatch
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from commandline import Answer, Ptq, one_line
from rich.console import Console
from tiny import make_model, write_text

import ptqcli
from ptqcli.algorithms import declarations, parts
from ptqcli.cli import COMMANDS, app, doctor, run
from ptqcli.cli.console import size_text, time_text
from ptqcli.cli.progress import LineTracker, track
from ptqcli.cli.quantize import command as quantize_command
from ptqcli.cli.quantize_flags import FLAGS
from ptqcli.cli.quantize_values import parse_override
from ptqcli.model.locate import UNWANTED_FILES, WANTED_FILES, find_model
from ptqcli.numerics.scheme import AUTO_GROUP, WHOLE_ROW, Scheme
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.report import REPORT_NAME
from ptqcli.recipe import ACTIVATION_SCALES, Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.shipped import find_recipe

HEAVY = ("torch", "transformers", "numpy", "datasets", "pyarrow")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a checkpoint of the model, and some files that are not what they seem."""
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", "llama", torch.bfloat16)
    write_text(folder / "text.txt")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    (folder / "empty").mkdir()
    (folder / "recipe.yaml").write_text("algo: rtn\nwbits: 8\ngroup_size: 32\n")
    (folder / "typo.yaml").write_text("algo: rtn\nwbit: 8\n")
    (folder / "broken.yaml").write_text("algo: [rtn\n")
    (folder / "pickled").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shutil.copytree(folder / "model", folder / "truncated")
    os.truncate(folder / "truncated" / "model.safetensors", 5000)
    assert (
        run(["quantize", str(folder / "model"), "--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "done"), "--quiet"]) == 0
    )
    return folder


# What is refused

REFUSED = [
    # command line, exit code, what the line says
    ("frobnicate", 2, "No such command 'frobnicate'"),
    ("quantize model --wbit 4", 2, "No such option '--wbit'"),
    ("quantize model --wbits four", 2, "'four' is not a valid integer"),
    ("quantize model --wbits 9", 2, "9 bits per weight is not supported; choose one of"),
    ("quantize model --group-size 0", 2, "one scale for the whole matrix (group size 0) needs 8-bit activations"),
    ("quantize model --group-size -2", 2, "group size -2 is not valid"),
    ("quantize model --group-size 48", 2, "does not divide the 64 input features of model.layers.0"),
    ("quantize model --algo magic", 2, "algorithm 'magic' is unknown; choose one of awq, smoothquant"),
    ("quantize model --algo awq+magic", 2, "algorithm 'magic' is unknown"),
    ("quantize model --algo awq+", 2, "algorithm '' is unknown"),
    ("quantize model --algo rtn+gptq", 2, "rtn and gptq are both solvers"),
    ("quantize model --algo gptq+awq", 2, "the solver comes last; write awq+gptq"),
    ("quantize model --algo awq+awq", 2, "awq stands twice"),
    ("quantize model --abits 4", 2, "4 bits per activation is not supported"),
    ("quantize model --algo rtn --abits 8 --group-size 32", 2, "8-bit activations need one scale for a whole row"),
    ("quantize model --algo rtn --abits 8 --asym", 2, "8-bit activations need symmetric weights"),
    ("quantize model --act-scales token", 2, "activations stay in 16 bit"),
    ("quantize model --algo smoothquant --act-scales row", 2, "activation scales 'row' are unknown; use token, tensor, static"),
    ("quantize model --algo smoothquant --smooth-alpha 1.5", 2, "smooth alpha 1.5 is not valid"),
    ("quantize model --algo smoothquant --smooth-alpha much", 2, "smooth alpha 'much' is not valid; give a number from 0 to 1, or auto"),
    ("quantize model --algo smoothquant --smooth-level O4", 2, "smooth level 'O4' is unknown"),
    ("quantize model --algo smoothquant --smooth-level O1 --act-scales token", 2, "leave those out"),
    ("quantize model --smooth-level O1", 2, "smooth level belongs to smoothquant, not to gptq"),
    ("quantize model --outliers static", 2, "outlier columns are split off from 8-bit activations"),
    ("quantize model --algo llm-int8 --outliers some", 2, "outliers 'some' is unknown; use none, dynamic, static"),
    ("quantize model --algo llm-int8 --act-scales static", 2, "an outlier split needs activation scales computed at run time"),
    ("quantize model --algo llm-int8 --outlier-threshold 0", 2, "outlier threshold 0.0 is not valid"),
    ("quantize model --algo llm-int8 --outlier-threshold nan", 2, "outlier threshold nan is not valid"),
    ("quantize model --outlier-threshold 3", 2, "an outlier threshold has no effect without an outlier split"),
    ("quantize model --no-awq-clip", 2, "awq clip belongs to awq, not to gptq"),
    ("quantize model --smooth-alpha auto", 2, "smooth alpha belongs to smoothquant, not to gptq"),
    ("quantize model --algo llm-int8 --abits 16", 2, "llm-int8 splits 8-bit activations; leave --abits out"),
    ("quantize model --algo smoothquant --override mlp:abits=4", 2, "override 'mlp': 4 bits per activation"),
    ("quantize model --algo smoothquant --override mlp:group=32", 2, "override 'mlp': 8-bit activations need"),
    ("quantize model --scale-search best", 2, "use auto, minmax or mse"),
    ("quantize model --group-size 32 --seqlen 4096", 2, "longer than the model's 128 positions"),
    ("quantize model --nsamples 0", 2, "nsamples 0"),
    ("quantize model --device tpu0", 2, "device 'tpu0' is unknown"),
    ("quantize model --device cuda:99", 2, "device 'cuda:99' is not on this machine"),
    ("quantize model --activation-budget nan", 2, "--activation-budget nan is not a size"),
    ("quantize model --activation-budget inf", 2, "--activation-budget inf is not a size"),
    ("quantize model --seed 9999999999999999999", 2, "seed 9999999999999999999 is too large"),
    ("quantize model --device meta", 2, "device 'meta' is not supported"),
    ("quantize model --device cuda:99", 2, "device 'cuda:99' is not on this machine"),
    ("quantize model --batch-size 0", 2, "0 is not in the range"),
    ("quantize model --override q_proj", 2, "has no colon"),
    ("quantize model --override :skip", 2, "has no pattern"),
    ("quantize model --override q_proj:", 2, "has nothing after the colon"),
    ("quantize model --override q_proj:bit=8", 2, "bit=8 in 'q_proj:bit=8' is not understood"),
    ("quantize model --override q_proj:bits=x", 2, "is not understood"),
    ("quantize model --override q_proj:bits=9", 2, "9 bits"),
    ("quantize model --group-size 32 --override (:skip", 2, "not a regular expression"),
    ("quantize model --group-size 32 --override nothing:skip", 2, "matches no linear"),
    ("quantize model --group-size 32 --ignore nothing", 2, "matches no linear"),
    ("quantize model --group-size 32 --ignore .", 2, "nothing is left to quantize"),
    ("quantize model --no-static-groups --group-size 32 --calib text.txt", 2, "use static groups"),
    ("quantize model --blocks nowhere", 2, "nowhere"),
    ("quantize model --scheme w4", 2, "w4"),
    ("quantize model --scheme w4a16 --wbits 4", 2, "scheme w4a16 says what the numbers are, so leave wbits out"),
    ("quantize model --recipe w4a16-aqw", 2, "did you mean 'w4a16-awq'?"),
    ("quantize model --recipe nowhere", 2, "recipe 'nowhere' is neither a file nor one of those that come along; `ptq recipes` lists them"),
    ("quantize model --recipe nowhere.yaml", 2, "nowhere.yaml: cannot be read: No such file"),
    ("quantize model --recipe empty", 2, "empty: cannot be read: Is a directory"),
    ("quantize model --recipe binary.txt", 2, "binary.txt: is not UTF-8 text"),
    ("quantize model --recipe typo.yaml", 2, "typo.yaml: unknown key 'wbit'"),
    ("quantize model --recipe broken.yaml", 2, "broken.yaml: is not valid YAML"),
    ("quantize model --group-size 32 --calib nowhere.txt", 2, "nowhere.txt"),
    ("quantize model --group-size 32 --calib wikitext3", 2, "wikitext2"),
    ("quantize model --group-size 32 --calib binary.txt", 1, "binary.txt: not UTF-8"),
    ("quantize model --group-size 32 --calib text.txt --nsamples 100000", 2, "100000"),
    ("quantize model --group-size 32 --calib wikitext2 --data-dir nowhere", 2, "nowhere"),
    ("quantize nowhere", 2, "nowhere: no such folder"),
    ("quantize ./no/where", 2, "./no/where: no such folder"),
    ("quantize model/nowhere", 2, "model/nowhere: no such folder"),
    ("quantize text.txt", 2, "text.txt is a file"),
    ("quantize some-owner/some-model", 1, "some-owner/some-model: no such folder here, and the hub cannot be reached"),
    ("quantize empty", 1, "has no config.json"),
    ("quantize pickled", 1, "pickle"),
    ("quantize truncated --group-size 32", 1, "model.safetensors"),
    ("quantize done", 2, "quantized already ('compressed-tensors')"),
    ("quantize model --recipe recipe.yaml --output done", 2, "done: already exists"),
    ("quantize model --recipe recipe.yaml --output model --overwrite", 2, "is the model itself"),
    ("quantize model --recipe recipe.yaml --output text.txt --overwrite", 2, "is a file"),
    ("quantize model --recipe recipe.yaml --output pickled --overwrite", 2, "was not written by ptq quantize"),
    ("quantize model --recipe recipe.yaml --output text.txt/inside", 1, "cannot write there"),
    ("eval nowhere", 2, "nowhere: no such folder"),
    ("eval empty", 1, "has no config.json"),
    ("eval done --baseline model --no-baseline", 2, "exclude each other"),
    ("eval done --baseline nowhere", 2, "nowhere: no such folder"),
    ("eval done --ppl nowhere.txt", 2, "nowhere.txt"),
    ("eval done --ppl binary.txt", 1, "binary.txt: not UTF-8"),
    ("eval done --ppl text.txt --seqlen 0", 2, "--seqlen"),
    ("eval done --ppl text.txt --seqlen 1", 2, "--seqlen"),
    ("eval truncated --ppl text.txt", 1, "model.safetensors is truncated"),
    ("eval pickled --ppl text.txt", 1, "tokenizer"),
    ("eval done --ppl text.txt --seqlen 129", 2, "128 positions"),
    ("eval done --ppl text.txt --seqlen 64 --stride 65", 2, "stride 65"),
    ("eval done --ppl wikitext2", 1, "PTQ_DATA_DIR"),
    ("inspect empty", 1, "has no config.json"),
    ("inspect truncated", 1, "model.safetensors"),
    ("generate done hello --max-new-tokens 0", 2, "0 is not in the range"),
    ("generate done " + "x" * 128, 2, "the text has 128 tokens and the model 128 positions"),
    ("generate done hello --temperature -1", 2, "-1.0 is not in the range"),
    ("generate done hello --kernel triton", 2, "q_proj: kernel triton cannot run it: it needs a CUDA device; use --kernel auto"),
    ("generate model hello --kernel triton", 2, "is not quantized, so it cannot run on --kernel triton; leave the flag out"),
    ("eval done --kernel marlin --no-baseline", 2, "'marlin' is not one of 'auto', 'triton', 'torch', 'reference'"),
    ("doctor --jason", 2, "No such option '--jason'"),
]


@pytest.mark.parametrize(("line", "code", "says"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_refusals_are_one_clear_line(ptq: Ptq, at_work: Path, line: str, code: int, says: str) -> None:
    before = sorted(at_work.iterdir())
    answer = ptq(*line.split())
    assert says in one_line(answer)
    assert answer.code == code
    assert sorted(at_work.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--group-size 32", "model-gptq-w4a16-g32"),
        ("--algo awq+gptq --wbits 3 --group-size -1", "model-awq+gptq-w3a16-row"),
        ("--algo smoothquant", "model-smoothquant-w8a8"),
        ("--quality balanced", "model-gptq-w4a16-target-original"),
        ("--algo gptq --finish kl", "model-gptq-w4a16-finish-kl"),
        ("--algo smoothquant --act-scales static", "model-smoothquant-w8a8-static"),
        ("--algo smoothquant --smooth-level O2", "model-smoothquant-w8a8-tensor-act-tensor"),
        ("--algo rtn --wbits 8 --abits 8 --group-size 0", "model-rtn-w8a8-tensor"),
        ("--algo llm-int8", "model-llm-int8-w8a8-outliers6"),
        ("--algo llm-int8 --outliers static", "model-llm-int8-w8a8-outliers6-static"),
        ("--recipe w8a8-llm-int8", "model-llm-int8-w8a8-outliers6-static"),
        ("--recipe w8a8-llm-int8 --scheme llm-int8", "model-llm-int8-w8a8-outliers6"),
    ],
)
def test_runs_that_differ_write_to_folders_that_differ(ptq: Ptq, at_work: Path, flags: str, name: str) -> None:
    answer = ptq("quantize", "model", "--dry-run", *flags.split())
    assert re.search(rf"^output +{re.escape(name)}$", answer.out + answer.err, flags=re.MULTILINE)


def test_folds_are_reported(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    calibration = ("--calib", "text.txt", "--nsamples", "4", "--seqlen", "32")
    done = ptq("quantize", "model", "--algo", "awq", "--group-size", "32", "--output", tmp_path / "awq", *calibration)
    assert done.code == 0
    assert "8 found and proved; they reach 14 of 14 linears" in done.out
    shown = ptq("inspect", tmp_path / "awq")
    assert re.search(r"model\.layers\.1\.mlp\.up_proj +mlp\.down_proj +awq: (alpha|no scaling)", shown.out)


def test_an_empty_prompt_is_refused(ptq: Ptq, at_work: Path) -> None:
    assert "the text is empty" in one_line(ptq("generate", "done", ""))


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_no_checkpoint_here(ptq: Ptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ptq(command)
    assert "no checkpoint in this folder yet" in one_line(answer)
    assert answer.code == 2


def test_a_damaged_report(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "done", tmp_path / "done")
    (tmp_path / "done" / REPORT_NAME).write_text("{")
    assert f"{REPORT_NAME}: is not valid JSON" in one_line(ptq("inspect", tmp_path / "done"))


def test_a_report_of_another_program(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "done", tmp_path / "done")
    (tmp_path / "done" / REPORT_NAME).write_text('{"layers": []}')
    assert "not a report of ptq quantize" in one_line(ptq("inspect", tmp_path / "done"))


CONFIGS = {
    "heads": ({"num_attention_heads": 7}, "transformers cannot read it"),
    "no heads": ({"num_attention_heads": 0}, "transformers cannot"),
    "text for a number": ({"hidden_size": "big"}, "transformers cannot read it"),
    "vocabulary": ({"vocab_size": 200}, "transformers cannot build"),
    "dtype": ({"dtype": "float99"}, "transformers cannot"),
    "quantization": ({"quantization_config": "yes"}, "transformers cannot read it"),
    "code": ({"model_type": "its_own", "auto_map": {"AutoConfig": "own.Config"}}, "Python code from its folder, which is never run"),
    "no language model": ({"model_type": "vit"}, "type vit is neither a causal language model, with or without images, nor an encoder"),
    "encoder-decoder": ({"model_type": "whisper"}, "type whisper is an encoder with a decoder, which is not supported"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_makes_no_sense(ptq: Ptq, workshop: Path, tmp_path: Path, kind: str) -> None:
    changes, says = CONFIGS[kind]
    shutil.copytree(workshop / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
    answer = ptq("quantize", tmp_path / "model", "--group-size", "32", "--output", tmp_path / "out")
    assert says in one_line(answer)
    assert len(one_line(answer)) < 500
    assert answer.code == 1


def test_a_tensor_of_another_shape_is_named(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    answer = ptq("eval", tmp_path / "model", "--ppl", workshop / "text.txt")
    assert "model.layers.0.mlp.down_proj.weight is stored as [64, 128], but config.json asks for [64, 64]" in one_line(answer)


def test_a_missing_tensor_is_not_made_up(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    """transformers would give it random numbers; so it is with a checkpoint whose quantization_config is lost."""
    shutil.copytree(workshop / "done", tmp_path / "done")
    config = json.loads((tmp_path / "done" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "done" / "config.json").write_text(json.dumps(config))
    answer = ptq("eval", tmp_path / "done", "--ppl", workshop / "text.txt", "--no-baseline")
    assert "hold no tensor for model.layers.0.mlp.down_proj.weight, 14 missing in all" in one_line(answer)
    assert answer.code == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0)
    assert "model.safetensors" in one_line(ptq("quantize", tmp_path / "model", "--group-size", "32"))


# What fails on the way


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/part"), 1, "error: out/part: No space left on device"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out"), 1, "error: out: Permission denied"),
        (OSError("a message of its own"), 1, "error: a message of its own"),
        (MemoryError(), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("out is complete"), 130, "interrupted; out is complete"),
        (RuntimeError("two\n  lines"), 1, "internal error: RuntimeError: two lines; run `ptq --debug ...`"),
    ],
)
def test_failures_are_one_line(ptq: Ptq, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "_python", fail)
    answer = ptq("doctor")
    assert answer.code == code
    assert answer.out == ""
    assert answer.err.strip().startswith(says)
    assert len(answer.err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("--debug", "quantize", "nowhere")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert answer.err.strip().splitlines()[-1].startswith("error: nowhere: no such folder")


def test_an_interrupted_run_leaves_nothing(ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptqcli.cli.quantize_report.QuantizeProgress.block_done", interrupt)
    answer = ptq("quantize", "model", "--recipe", "recipe.yaml", "--output", tmp_path / "out")
    assert answer.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_run_that_is_told_to_end_leaves_nothing(at_work: Path, tmp_path: Path, name: str) -> None:
    code = (
        "import os, signal, sys, ptqcli.cli, ptqcli.cli.quantize as q; "
        f"q.QuantizeProgress.block_done = lambda *_: os.kill(os.getpid(), signal.{name}); ptqcli.cli.main()"
    )
    line = ["quantize", "model", "--recipe", "recipe.yaml", "--output", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 130
    assert done.stderr.strip().endswith("interrupted; nothing of it is left on disk")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error() -> None:
    ptq = f'"{sys.executable}" -c "from ptqcli.cli import main; main()"'
    script = f"{{ {ptq} --help; {ptq} doctor; }} | true"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr == ""


# Help


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from ptqcli.cli import run; code = run(['--help']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], [n for n in sys.modules if n.startswith('ptqcli.cli.')], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    *help_lines, last = done.stdout.strip().splitlines()
    assert last == "[] ['ptqcli.cli.signals', 'ptqcli.cli.streams'] 0"
    for name, (_, summary) in COMMANDS.items():
        assert any(name in line and summary in line for line in help_lines)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"quantize"}))  # whose flags come from the parts
def test_help_of_a_command_needs_nothing_heavy(name: str) -> None:
    code = f"import sys; from ptqcli.cli import run; run([{name!r}, '--help']); print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_in_the_list_are_those_of_the_commands(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    assert (command.help or "").splitlines()[0] == COMMANDS[name][1]


def test_version(ptq: Ptq) -> None:
    assert ptq("--version").out.strip() == f"ptq, version {importlib.metadata.version('ptqcli')}"


def test_both_names_are_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert {entry.name for entry in scripts if entry.value == "ptqcli.cli:main"} == {"ptq", "ptqcli"}


def test_kernels_on_offer_are_those_of_the_runtime() -> None:
    from ptqcli import runtime
    from ptqcli.cli import options

    assert options.KERNELS == runtime.KERNELS


def test_the_kernel_is_a_choice(ptq: Ptq, at_work: Path) -> None:
    expected = ptq("generate", "done", "a scale and", "--max-new-tokens", "5")
    assert ptq("generate", "done", "a scale and", "--max-new-tokens", "5", "--kernel", "reference") == expected


def test_shown_defaults_are_the_recipes() -> None:
    options = {option.name: option for option in quantize_command.params if isinstance(option, click.Option)}
    for entry in fields(Recipe):
        if entry.name not in options or entry.name in ("seqlen", "overrides", "ignore", "blocks", "options"):
            continue
        option, default = options[entry.name], entry.default
        if default is None:
            continue  # follows from other fields, see below
        if isinstance(default, bool):
            shown = (option.opts if default else option.secondary_opts)[0].removeprefix("--")
        else:
            shown = str(default)
        assert option.show_default == shown, entry.name


def test_shown_defaults_that_follow_from_others_do() -> None:
    shown = {option.name: str(option.show_default) for option in quantize_command.params if isinstance(option, click.Option)}
    plain, eight_bits = Recipe().default_scheme, Recipe(algo="smoothquant").default_scheme
    assert eight_bits.activations is not None
    assert shown["wbits"] == f"{plain.bits}; smoothquant, llm-int8: {eight_bits.bits}"
    assert (shown["group_size"], plain.group_size, eight_bits.group_size) == ("auto", AUTO_GROUP, WHOLE_ROW)
    assert shown["abits"] == f"16; smoothquant, llm-int8: {eight_bits.activations.bits}"
    assert ACTIVATION_SCALES[shown["act_scales"]] == eight_bits.activations
    split = Recipe(algo="llm-int8").default_scheme.outliers
    assert split is not None
    assert shown["symmetric"] == ("sym" if plain.symmetric else "asym")
    assert shown["outlier_threshold"] == str(split.threshold)
    assert shown["outliers"] == f"none; llm-int8: {'dynamic' if split.dynamic else 'static'}"


def test_every_recipe_flag_is_a_field_of_the_recipe() -> None:
    run_flags = {"model", "recipe", "output", "overwrite", "data_dir", "device", "dtype", "batch_size", "activation_budget"}
    run_flags |= {"memory", "restart", "allow_requantize", "processes", "dry_run", "as_json", "quiet", "log_format"}
    names = {param.name for param in quantize_command.params} - run_flags - {"quality"}  # which stands for several fields
    assert names == {entry.name for entry in fields(Recipe)}


def test_every_option_of_a_part_has_a_flag_that_names_its_parts(ptq: Ptq) -> None:
    shown = " ".join(ptq("quantize", "--help").out.split())
    owners = "gptq, obq, autoround, flexround"
    assert f"Algorithm: options of {owners}: --damp X Damping, as a share of the Hessian's mean diagonal. [default: (0.01)]" in shown
    assert "Algorithm: options of gptq: --act-order / --no-act-order Most active columns first." in shown
    for declared in declarations():
        of_part = shown.partition(f"Algorithm: options of {', '.join(declared.parts)}:")[2].partition("Algorithm: ")[0]
        assert f"--{declared.option.flag} " in of_part


def test_the_help_of_quantize_is_in_groups(ptq: Ptq) -> None:
    groups = re.findall(r"^(\w.*):$", ptq("quantize", "--help").out, flags=re.MULTILINE)
    assert [group for group in groups if "options of" not in group] == list(FLAGS)
    assert len(set(groups)) == len(groups)
    shown = ptq("quantize", "--help").out
    for option in quantize_command.params:
        assert isinstance(option, click.Argument) or shown.count(f"\n  {option.opts[0]} ") == 1


def test_algorithms(ptq: Ptq) -> None:
    shown = ptq("algorithms")
    listed = {part["name"]: part for part in json.loads(ptq("algorithms", "--json").out)["parts"]}
    assert shown.code == 0
    assert list(listed) == list(parts())
    assert re.search(r"gptq +solver +GPTQ: error feedback .* ptqcli\n", shown.out)
    assert re.search(r"gptq\.act_order +--act-order/--no-act-order +true\|false +true +most active columns first", shown.out)
    assert "Broken" not in shown.out
    assert listed["llm-int8"]["scheme"] == {"bits": 8, "abits": 8, "outliers": "dynamic"}
    (clip,) = listed["awq"]["options"]
    assert (clip["name"], clip["flag"], clip["type"], clip["default"]) == ("clip", "--awq-clip/--no-awq-clip", "bool", True)
    assert {part["from"] for part in listed.values()} == {"ptqcli"}


def test_recipes(ptq: Ptq, at_work: Path) -> None:
    shown = ptq("recipes")
    listed = {row["name"]: row for row in json.loads(ptq("recipes", "--json").out)["recipes"]}
    assert shown.code == 0
    for name, row in listed.items():
        assert re.search(rf"^{name} +{re.escape(row['algo'])} ", shown.out, flags=re.MULTILINE)
        plan = plan_run(Path(ptqcli.__file__).parent / "demo", load_recipe(find_recipe(name)), Resources())[1]
        assert plan.recipe.algo == row["algo"]
        assert str(Scheme.parse(row["scheme"]).resolved(128)) in {str(linear.scheme) for linear in plan.linears}
    assert listed["w4a16-gptq"]["summary"].startswith("4-bit weights, 16-bit activations: the usual choice.")


# What works


def test_quantize_to_json(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    answer = ptq("quantize", "model", "--recipe", "recipe.yaml", "--wbits", "4", "--output", tmp_path / "out", "--json")
    report = json.loads(answer.out)
    assert answer.code == 0
    assert report["recipe"]["wbits"] == 4  # the flag wins over the file
    assert report["recipe"]["group_size"] == 32
    assert {layer["scheme"] for layer in report["layers"]} == {"w4a16-g32"}
    assert "Worst layers" in answer.err
    assert "block 2/2" in answer.err


def test_quantize_tells_what_it_did(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    command = ("quantize", "model", "--group-size", "64", "--nsamples", "4", "--calib", "text.txt", "--output", tmp_path / "out")
    answer = ptq(*command, "--override", r"down_proj:bits=8,group=32,asym", "--override", r"\.0\.self_attn:skip")
    assert answer.code == 0
    assert re.search(r"linears +w4a16-g64 x 8, w8a16-g32-asym x 2", answer.out)
    assert re.search(r"left as they are +model\.layers\.0\.self_attn\.q_proj, \S+ and 2 more \(skipped\)", answer.out)
    assert re.search(r"calibration +4 windows of 128 tokens from text\.txt", answer.out)
    assert "Worst layers by relative output error" in answer.out
    assert re.search(r"size +\S+ KiB before, \S+ KiB after", answer.out)
    assert re.search(r"bits per weight +5\.\d+", answer.out)
    assert re.search(r"peak memory +\S+ [MG]iB", answer.out)
    assert not re.search(r"[ \t]$", answer.out, re.MULTILINE)


def test_quiet_is_silent(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    quantized = ptq("quantize", "model", "--recipe", "recipe.yaml", "--output", tmp_path / "out", "--quiet")
    assert quantized == Answer(0, "", "")
    measured = ptq("eval", tmp_path / "out", "--ppl", "text.txt", "--quiet", "--json")
    assert (measured.code, measured.err) == (0, "")
    assert json.loads(measured.out)["results"]


def test_dry_run_writes_nothing(ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ptq("quantize", at_work / "model", "--group-size", "32", "--dry-run", "--json")
    plan = json.loads(answer.out)
    assert answer.code == 0
    assert len(plan["linears"]) == 14
    assert plan["bytes_after"] < plan["bytes_before"]
    assert plan["disk_bytes"] >= 2 * plan["bytes_after"]
    assert "memory needed" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_default_output_and_newest_checkpoint(ptq: Ptq, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ptq("quantize", workshop / "model", "--algo", "rtn", "--group-size", "32").code == 0
    assert ptq("quantize", workshop / "model", "--algo", "rtn", "--group-size", "-1", "--wbits", "8").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-rtn-w4a16-g32", "model-rtn-w8a16-row"]
    assert ptq("inspect").out.startswith("checkpoint    model-rtn-w8a16-row\n")
    os.utime(tmp_path / "model-rtn-w4a16-g32" / REPORT_NAME, (2e9, 2e9))
    assert ptq("inspect").out.startswith("checkpoint    model-rtn-w4a16-g32\n")
    again = ptq("quantize", workshop / "model", "--algo", "rtn", "--group-size", "32")
    assert "--output" in one_line(again)
    assert "--overwrite" in one_line(again)
    assert ptq("quantize", workshop / "model", "--algo", "rtn", "--group-size", "32", "--overwrite").code == 0


def test_an_output_below_home(ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ptq("quantize", "model", "--recipe", "recipe.yaml", "--output=~/out").code == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_generate_stops_at_the_last_position(ptq: Ptq, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "gpt2", eos_token_id=None)
    answer = ptq("generate", tmp_path / "model", "x" * 120, "--max-new-tokens", "50")
    assert answer.code == 0


def test_inspect(ptq: Ptq, at_work: Path) -> None:
    shown = ptq("inspect", "done")
    facts = json.loads(ptq("inspect", "done", "--json").out)
    assert shown.code == 0
    assert re.search(r"w8a16-g32 +14 ", shown.out)
    assert facts["source"] == str(at_work / "model")
    layer = facts["layers"][0]
    assert (layer["name"], layer["scheme"], layer["shape"]) == ("model.layers.0.self_attn.q_proj", "w8a16-g32", [64, 64])
    assert layer["bytes"] == 64 * 64 + 64 * 2 * 2 + 16  # codes, bfloat16 scales, the shape
    assert 0 < layer["relative_error"] < 0.02


def test_inspect_of_an_unquantized_model(ptq: Ptq, at_work: Path) -> None:
    assert re.search(r"quantized +nothing", ptq("inspect", "model").out)


def test_eval_beside_the_original(ptq: Ptq, at_work: Path) -> None:
    shown = ptq("eval", "done", "--ppl", "text.txt", "--seqlen", "64")
    facts = json.loads(ptq("eval", "done", "--ppl", "text.txt", "--seqlen", "64", "--json").out)
    alone = json.loads(ptq("eval", "model", "--ppl", "text.txt", "--seqlen", "64", "--json").out)
    result = facts["results"][0]
    assert shown.code == 0
    assert "same top-1" in shown.out
    assert f"{result['perplexity']:.4f}" in shown.out
    assert facts["baseline"] == str(at_work / "model")
    assert result["baseline_perplexity"] == pytest.approx(alone["results"][0]["perplexity"], rel=1e-6)
    assert result["perplexity"] != result["baseline_perplexity"]
    assert 0 < result["mean_kl"] < 0.1
    assert alone["baseline"] is None


def test_eval_without_the_original(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "model", tmp_path / "model")
    out = tmp_path / "out"
    assert ptq("quantize", tmp_path / "model", "--recipe", workshop / "recipe.yaml", "--output", out).code == 0
    shutil.rmtree(tmp_path / "model")
    answer = ptq("eval", out, "--ppl", workshop / "text.txt")
    assert answer.code == 0
    assert "is gone; name it with --baseline" in answer.out
    assert "same top-1" not in answer.out
    assert "is gone" not in ptq("eval", out, "--ppl", workshop / "text.txt", "--no-baseline").out
    assert "same top-1" in ptq("eval", out, "--ppl", workshop / "text.txt", "--baseline", workshop / "model").out


def test_eval_on_several_texts(ptq: Ptq, at_work: Path) -> None:
    write_text(at_work / "empty" / "other.txt", seed=1)
    facts = json.loads(ptq("eval", "done", "--ppl", "text.txt", "--ppl", "empty", "--no-baseline", "--json").out)
    (at_work / "empty" / "other.txt").unlink()
    assert [result["text"] for result in facts["results"]] == ["text.txt", "empty"]


def test_generate(ptq: Ptq, at_work: Path) -> None:
    first = ptq("generate", "done", "a scale and", "--max-new-tokens", "5")
    drawn = [ptq("generate", "done", "a scale and", "--temperature", "2", "--seed", seed).out for seed in ("1", "1", "2")]
    assert first.code == 0
    assert first.out.startswith("a scale and")
    assert first.err == ""
    assert drawn[0] == drawn[1] != drawn[2]


def test_doctor(ptq: Ptq, tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("text")
    shown = ptq("doctor", "--data-dir", tmp_path)
    facts = {check["name"]: check for check in json.loads(ptq("doctor", "--json", "--data-dir", tmp_path).out)["checks"]}
    assert shown.code == 0
    assert facts["torch"]["found"] == torch.__version__
    assert facts["wikitext2"]["status"] == "ok"
    assert all(name in shown.out for name in facts)


def test_doctor_names_what_is_missing(ptq: Ptq, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [f'triton>=99; extra == "{extra}"' for extra in ("triton", "test")]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["no-such-package>=3", "click>=999", *twice])
    answer = ptq("doctor")
    assert answer.code == 1
    assert re.search(r"no-such-package +MISSING +not installed +pip install 'no-such-package>=3'", answer.out)
    assert re.search(r"click +MISSING +\S+ is out of range +pip install 'click>=999'", answer.out)
    assert len(re.findall(r"triton +not there", answer.out)) == 1


# Parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj:skip", Override("q_proj", skip=True)),
        ("(?:a|b):bits=8", Override("(?:a|b)", bits=8)),
        ("x:bits=8,group=-1,asym", Override("x", bits=8, group_size=-1, symmetric=False)),
        ("x: group=64, sym", Override("x", group_size=64, symmetric=True)),
    ],
)
def test_overrides(text: str, expected: Override) -> None:
    assert parse_override(text) == expected


def test_the_demo_model_is_the_default() -> None:
    assert (find_model(None) / "config.json").is_file()


def test_only_weights_and_text_are_fetched() -> None:
    repository = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "pytorch_model.bin"]
    repository += ["model.pkl", "modeling_own.py", "consolidated.safetensors", "onnx/model.safetensors", "training_args.pt"]
    fetched = [
        name
        for name in repository
        if any(fnmatch.fnmatch(name, pattern) for pattern in WANTED_FILES)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in UNWANTED_FILES)
    ]
    assert fetched == ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]


def test_sizes_and_times() -> None:
    assert [size_text(count) for count in (0, 1023, 1536, 5 * 1024**3)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [time_text(seconds) for seconds in (0.84, 75, 720, 7500)] == ["0.8 s", "75 s", "12 min", "2 h 05 min"]


def test_lines_of_progress() -> None:
    stream = io.StringIO()
    tracker = LineTracker(Console(file=stream), "block", pause=0.0)
    tracker.say("working")
    tracker.note("a detail")
    tracker.step(1, 2, "first")
    tracker.step(2, 2, "second")
    assert re.fullmatch(r"working\nblock 1/2: first, 0\.\d s left\nblock 2/2: second\n", stream.getvalue())


def test_lines_come_not_too_often() -> None:
    stream = io.StringIO()
    tracker = LineTracker(Console(file=stream), "window", pause=60.0)
    for done in range(1, 11):
        tracker.step(done, 10, "text")
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("ptqcli.cli.progress.open_console", lambda **_: Console(file=stream, force_terminal=True, width=100))
    with track("block") as tracker:
        tracker.say("working")
        tracker.step(1, 2, "first")
        tracker.note("a detail")
    assert "block" in stream.getvalue()
    assert "1/2" in stream.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix closes the stream")
@pytest.mark.parametrize(
    "line, code, told",
    [
        ("recipes >&-", 0, ""),
        ("recipes >&- 2>&-", 0, ""),
        ("recipes nonsense >&-", 2, "error: "),
        ("quantize absent >&-", 2, "error: absent"),
    ],
)
def test_a_closed_stream_is_written_to_without_a_word(line: str, code: int, told: str) -> None:
    command = f"{sys.executable} -c 'from ptqcli.cli import main; main()' {line}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(told)
    assert bool(done.stderr) == bool(told)


def test_an_activation_budget_beyond_all_numbers_is_refused(ptq: Ptq) -> None:
    answer = ptq("quantize", "--dry-run", "--activation-budget", "1e300")
    assert answer.code == 2
    assert "--activation-budget 1e+300 is not a size" in one_line(answer)
