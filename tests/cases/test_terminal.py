"""Kind: what a person sees depends on where it is shown, the work does not. Every command is run in terminals of several widths and
kinds, and with closed, full and broken pipes in the place of stdout and stderr: the work goes on, what it made is kept, nothing is cut
off, and the exit code is 0 unless a result that nothing else holds is lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Answer
from forked import ForkedPtq

from ptqcli.cli import COMMANDS

# command -> a line of it, and what it shows at every width, blanks left out
LINES = {
    "quantize": ("quantize model --algo rtn --group-size 32 --output new --overwrite", "writtennew"),
    "sensitivity": (
        "sensitivity model --candidates w2g32,w4g32 --sensitivity output --calib text.txt --nsamples 2 --seqlen 16",
        "Lossesbyoutput,relativesquarederror",
    ),
    "eval": ("eval done --ppl text.txt --seqlen 64 --no-baseline", "checkpointdone"),
    "compare": ("compare done --ppl text.txt --seqlen 64", "model(baseline)"),
    "bench": ("bench --shapes 128x32 --tokens 1 --seconds 0.0001", "w4a16-g128:mediantimeofacall"),
    "tune": (
        "tune model --max-kl 9 --algo rtn --group-size 32 --ppl text.txt --tokens 64 --max-trials 1 --output goal --overwrite",
        "writtengoal",
    ),
    "tune-scales": (
        "tune-scales done --model model --calib text.txt --nsamples 2 --seqlen 16 --steps 1 --output tuned --overwrite",
        "writtentuned",
    ),
    "convert": ("convert done --to gptq --requantize w4a16-g32 --output converted --overwrite", "writtenconverted"),
    "push": ("push done owner/name --dry-run", "repositoryowner/name"),
    "inspect": ("inspect done", "Layers(error:relative,weight)"),
    "generate": ("generate done hello --max-new-tokens 2", "hello"),
    "algorithms": ("algorithms", "Options"),
    "recipes": ("recipes", "Recipes"),
    "doctor": ("doctor", "ok"),
    "completion": ("completion bash", "_PTQ_COMPLETE"),
}
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])m")
# columns, what the environment says
TERMINALS = {
    "80": (80, {}),
    "20": (20, {}),
    "200": (200, {}),
    "0": (0, {}),
    "COLUMNS=0": (80, {"COLUMNS": "0"}),
    "COLUMNS=1": (80, {"COLUMNS": "1"}),
    "NO_COLOR": (80, {"NO_COLOR": "1"}),
    "dumb": (80, {"TERM": "dumb"}),
    "ascii": (80, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
}
ONLY_KEPT = {"quantize", "tune", "tune-scales", "convert"}  # what these make lies in a folder; the others' result is what they show


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedPtq]:
    server = ForkedPtq()
    yield server
    server.close()


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_every_command_is_here() -> None:
    assert list(LINES) == list(COMMANDS)


def in_terminal(forked: ForkedPtq, workshop: Path, command: str, terminal: str) -> str:
    """All that is shown, which must have the words that are expected, whole."""
    line, shows = LINES[command]
    columns, environment = TERMINALS[terminal]
    answer = forked(*line.split(), folder=workshop, columns=columns, **environment)
    assert answer.code == 0, answer.out
    assert shows in re.sub(r"\s|\x1b\[[0-9;?]*[a-zA-Z]", "", answer.out)
    assert not re.search("^(internal )?error:|Traceback", answer.out, re.MULTILINE)
    return answer.out


@pytest.mark.parametrize("terminal", [pytest.param("80", marks=pytest.mark.slow), "20", "200"])
@pytest.mark.parametrize("command", LINES)
def test_in_a_terminal(forked: ForkedPtq, workshop: Path, command: str, terminal: str) -> None:
    in_terminal(forked, workshop, command, terminal)


def test_calibration_in_a_terminal(forked: ForkedPtq, workshop: Path) -> None:
    line = "quantize model --calib text.txt --nsamples 2 --group-size 32 --output new --overwrite"
    answer = forked(*line.split(), folder=workshop, columns=80)
    assert (answer.code, "Worst layers by relative output error" in answer.out) == (0, True)


def test_models_are_timed_in_a_terminal(forked: ForkedPtq, workshop: Path) -> None:
    line = "bench done --only model --prompt 4 --new-tokens 2 --seconds 0.0001"
    answer = forked(*line.split(), folder=workshop, columns=80)
    assert (answer.code, "MFU" in answer.out) == (0, True)


@pytest.mark.parametrize("command", ["inspect", "algorithms", "recipes", "doctor"])
def test_nothing_is_cut_off_where_it_is_narrow(forked: ForkedPtq, workshop: Path, command: str) -> None:
    """The same characters in another arrangement, but for figures, such as those of free memory, and bold letters line by line."""
    narrow, wide = (sorted(re.sub(r"\x1b\[[\d;]*m|[\s\d]", "", in_terminal(forked, workshop, command, width))) for width in ("20", "200"))
    assert narrow == wide


@pytest.mark.parametrize("terminal", ["0", "COLUMNS=0", "COLUMNS=1", "ascii"])
@pytest.mark.parametrize("command", ["quantize", "recipes"])
def test_in_an_odd_terminal(forked: ForkedPtq, workshop: Path, command: str, terminal: str) -> None:
    in_terminal(forked, workshop, command, terminal)


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
def test_without_colour(forked: ForkedPtq, workshop: Path, command: str) -> None:
    assert not COLOUR.search(in_terminal(forked, workshop, command, "NO_COLOR"))
    dumb = in_terminal(forked, workshop, command, "dumb")
    assert "\x1b" not in dumb
    if command == "quantize":
        assert "block 2/2: 7 linears" in dumb  # a bar cannot be redrawn, so there are lines


def test_there_is_colour_to_leave_out(forked: ForkedPtq, workshop: Path) -> None:
    assert COLOUR.search(in_terminal(forked, workshop, "quantize", "80"))


@pytest.mark.parametrize(("out", "err"), [("closed", "pipe"), ("full", "full"), ("head", "head"), ("pipe", "closed"), ("head", "closed")])
def test_a_checkpoint_is_written_whoever_looks(forked: ForkedPtq, workshop: Path, out: str, err: str) -> None:
    shutil.rmtree(workshop / "new", ignore_errors=True)
    line, _ = LINES["quantize"]
    answer = forked(*line.split(), folder=workshop, out=out, err=err)
    assert answer.code == 0
    assert "error" not in answer.err.replace("largest error", "")
    assert {"model.safetensors", "config.json", "ptq_report.json"} <= {file.name for file in (workshop / "new").iterdir()}


@pytest.mark.parametrize("command", LINES)
def test_a_reader_that_leaves(forked: ForkedPtq, workshop: Path, command: str) -> None:
    """``| head -1`` and ``>&-`` end quietly."""
    for out in ("head", "closed"):
        answer = forked(*LINES[command][0].split(), folder=workshop, out=out)
        assert (answer.code, "error:" in answer.err, "Traceback" in answer.err) == (0, False, False)


@pytest.mark.parametrize("command", LINES)
def test_a_full_disk(forked: ForkedPtq, workshop: Path, command: str) -> None:
    answer = forked(*LINES[command][0].split(), folder=workshop, out="full")
    lost = "error: standard output: No space left on device"
    assert (answer.code, lost in answer.err) == ((0, False) if command in ONLY_KEPT else (1, True))


@pytest.mark.parametrize("err", ["closed", "full", "head"])
def test_an_object_is_whole_though_nobody_hears_the_rest(forked: ForkedPtq, workshop: Path, err: str) -> None:
    line, _ = LINES["quantize"]
    answer = forked(*line.split(), "--json", folder=workshop, err=err)
    assert answer.code == 0
    assert answer.out.startswith("{")
    assert answer.out.endswith("}\n")


def test_an_object_that_is_lost_is_an_error(forked: ForkedPtq, workshop: Path) -> None:
    line, _ = LINES["quantize"]
    answer = forked(*line.split(), "--json", folder=workshop, out="full")
    assert answer.code == 1
    assert answer.err.endswith("error: standard output: No space left on device; what was to be shown is lost\n")


def test_an_error_keeps_its_exit_code(forked: ForkedPtq, workshop: Path) -> None:
    for streams in ({"out": "full"}, {"err": "full"}, {"out": "closed", "err": "closed"}, {"columns": 20}):
        assert forked("inspect", "nowhere", folder=workshop, **streams).code == 2


def test_text_from_a_pipe_and_from_a_terminal(forked: ForkedPtq, workshop: Path) -> None:
    generate = ("generate", "done", "--max-new-tokens", "2")
    assert forked(*generate, folder=workshop, stdin="hello\n").out.startswith("hello")
    asked = forked(*generate, folder=workshop, columns=80, stdin=None)
    assert (asked.code, "no text is given" in asked.out) == (2, True)


def test_help_at_every_width(forked: ForkedPtq, workshop: Path) -> None:
    for columns in (20, 80, 200):
        answer: Answer = forked("quantize", "--help", folder=workshop, columns=columns)
        assert (answer.code, "--damp" in answer.out) == (0, True)
