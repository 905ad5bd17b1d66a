"""Kind: a run that tells nothing of itself once its terminal is gone. Its folder holds a log for people and one for programs, a line for
each event as it happens, of all runs that it took; nothing that is promised to be the same bytes depends on them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commandline import Ptq, one_line
from forked import ForkedPtq
from tiny import make_model, write_text

import ptqcli
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import PTQError
from ptqcli.pipeline.log import EVENTS, read_log
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOG_JSON, LOG_TEXT, FoldReport, LayerReport, read_report

BLOCKS = 3
DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    make_model(folder / "model", "llama", num_hidden_layers=BLOCKS)
    write_text(folder / "text.txt")
    run(folder, folder / "done")
    return folder


def run(room: Path, output: Path, **more: Any) -> ptqcli.Report:
    given = {"algo": "awq+gptq", "group_size": 32, "calib": str(room / "text.txt"), "nsamples": 2, "seqlen": 16, "batch_size": 2, **more}
    return ptqcli.quantize(room / "model", output=output, **given)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_JSON).read_text().splitlines()]


def of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == kind]


class Ended(NoProgress):
    def __init__(self, behind: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.behind, self.error = behind, error

    def block_started(self, index: int, count: int) -> None:
        if index == self.behind:
            raise self.error


def test_every_event_is_there_with_its_keys(room: Path) -> None:
    found = events(room / "done")
    assert Counter(event["event"] for event in found)["layer"] == 7 * BLOCKS
    assert [event["block"] for event in of(room / "done", "block_done")] == [1, 2, 3]
    assert (found[0]["event"], found[-1]["event"]) == ("begin", "finished")
    own = {"layer": LayerReport, "fold": FoldReport}
    for event in found:
        fields = set(own[event["event"]].__dataclass_fields__) if event["event"] in own else set()
        assert event.keys() == {"time", "event", *EVENTS[event["event"]], *fields}, event
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)


def test_what_it_says_of_layers_is_what_the_report_says(room: Path) -> None:
    report = read_report(room / "done") or {}
    volatile = ("time", "event", *EVENTS["layer"])
    told = [{key: value for key, value in event.items() if key not in volatile} for event in of(room / "done", "layer")]
    assert sorted(told, key=lambda layer: layer["name"]) == sorted(report["layers"], key=lambda layer: layer["name"])
    assert all(event["seconds"] >= 0 and event["peak_memory_bytes"] > 1 << 20 for event in of(room / "done", "layer"))
    assert len(of(room / "done", "fold")) == len(report["folds"])


def test_the_text_is_for_people(room: Path) -> None:
    lines = (room / "done" / LOG_TEXT).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in lines)
    text = "\n".join(lines)
    for said in (
        f"begins: model {room / 'model'}, ptqcli",
        "algorithm: awq+gptq; linears: w4a16-g32 x 21",
        "block 2 of 3 begins",
        "model.layers.0.mlp.down_proj: w4a16-g32, error 0.",
        "block 3 of 3 is finished: 7 linears, largest error 0.",
        "finished: ",
    ):
        assert said in text


def test_the_docs_list_every_event_and_key() -> None:
    text = (DOCS / "logs.md").read_text()
    for kind, keys in EVENTS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{kind}` |")]
        assert all(f"`{key}`" in row for key in keys), row


def test_a_run_that_goes_on_appends(room: Path, tmp_path: Path) -> None:
    """How each was ended, and where the next went on; by a kill, too, in the middle of a line."""
    for behind, error in ((1, KeyboardInterrupt), (2, OSError)):
        with pytest.raises((KeyboardInterrupt, PTQError)):
            run(room, tmp_path / "out", progress=Ended(behind, error))
        assert of(tmp_path / "out.partial", "ended")
    for name, half in ((LOG_JSON, '{"time": "20'), (LOG_TEXT, "2026-01-0")):
        with (tmp_path / "out.partial" / name).open("a") as file:
            file.write(half)
    run(room, tmp_path / "out")
    lines = (tmp_path / "out" / LOG_JSON).read_text().splitlines()
    kept = [line for line in lines if line != '{"time": "20']
    assert len(kept) == len(lines) - 1
    found = [json.loads(line) for line in kept]
    kinds = [event["event"] for event in found]
    assert (kinds.count("begin"), kinds.count("ended"), kinds.count("finished")) == (3, 2, 1)
    assert [event["blocks"] for event in found if event["event"] == "goes_on"] == [1, 2]
    assert next(event["why"] for event in found if event["event"] == "ended") == "interrupted"
    assert [event["block"] for event in found if event["event"] == "block_done"] == [1, 2, 3]
    assert "\n2026-01-0\n" in (tmp_path / "out" / LOG_TEXT).read_text()
    past = read_log(tmp_path / "out")
    assert past is not None
    assert (past.runs, past.ended, len(past.layers)) == (3, ["interrupted", "OSError"], 7 * BLOCKS)


def test_a_run_that_begins_anew_begins_its_log_anew(room: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", progress=Ended(1))
    run(room, tmp_path / "out", restart=True)
    assert len(of(tmp_path / "out", "begin")) == 1


class WrongError(PTQError):
    def __init__(self) -> None:
        super().__init__("wrong")


def test_a_run_that_fails_leaves_nothing(room: Path, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="wrong"):
        run(room, tmp_path / "out", progress=Ended(1, WrongError))
    assert [*tmp_path.iterdir()] == []


def test_links_in_the_place_of_a_log_are_not_followed(room: Path, tmp_path: Path) -> None:
    for name in ("precious", "linked"):
        (tmp_path / name).write_text("years of work")
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", progress=Ended(1))
    work = tmp_path / "out.partial"
    for name in (LOG_TEXT, LOG_JSON):
        (work / name).unlink()
    (work / LOG_TEXT).symlink_to(tmp_path / "precious")
    os.link(tmp_path / "linked", work / LOG_JSON)
    run(room, tmp_path / "out")
    assert [(tmp_path / name).read_text() for name in ("precious", "linked")] == ["years of work"] * 2
    assert of(tmp_path / "out", "goes_on")


def test_a_log_that_cannot_be_written_ends_nothing(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Directory, name: str) -> int:
        raise OSError(28, "No space left on device", str(self.path / name))

    monkeypatch.setattr(Directory, "append", full)
    said: list[str] = []

    class Told(NoProgress):
        def remark(self, text: str) -> None:
            said.append(text)

    run(room, tmp_path / "out", progress=Told())
    assert said[0].startswith("the log cannot be written: ")
    assert said[0].endswith(f"{LOG_TEXT}: No space left on device")
    assert not (tmp_path / "out" / LOG_JSON).exists()


LINE = ("--algo", "rtn", "--group-size", "32", "--output")


def test_lines_for_machines(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    answer = ptq("quantize", room / "model", *LINE, tmp_path / "out", "--log-format", "json")
    assert (answer.code, answer.out) == (0, "")
    assert [json.loads(line) for line in answer.err.splitlines()] == events(tmp_path / "out")
    both = ptq("quantize", room / "model", *LINE, tmp_path / "both", "--log-format", "json", "--json")
    assert json.loads(both.out)["output"] == str(tmp_path / "both")
    assert all(json.loads(line)["event"] in EVENTS for line in both.err.splitlines())
    quiet = ptq("quantize", room / "model", *LINE, tmp_path / "quiet", "--log-format", "json", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert of(tmp_path / "quiet", "finished")


def test_a_rehearsal_is_in_words(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    answer = ptq("quantize", room / "model", *LINE, tmp_path / "out", "--log-format", "json", "--dry-run")
    assert (answer.code, "memory needed" in answer.out) == (0, True)


# What `ptq inspect` shows of it


def test_inspect_shows_times_and_how_often_it_was_ended(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", progress=Ended(2))
    run(room, tmp_path / "out")
    shown = ptq("inspect", tmp_path / "out")
    assert re.search(r"took +\S+ \w+ in 2 runs; ended and gone on from: interrupted \(ptq_log\.txt\)", shown.out)
    assert len(re.findall(r"w4a16-g32 +\d+\.\d+ +0\.\d{4} +\d+\.\d s", shown.out)) == 7 * BLOCKS
    found = json.loads(ptq("inspect", tmp_path / "out", "--json").out)
    assert found["log"]["runs"] == 2
    assert all(layer["seconds"] >= 0 and layer["peak_memory_bytes"] > 0 for layer in found["layers"])


def test_without_a_log_there_are_no_times(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    run(room, tmp_path / "out", algo="rtn")
    (tmp_path / "out" / LOG_JSON).unlink()
    assert not re.search(r"\d s\b", ptq("inspect", tmp_path / "out").out)
    assert json.loads(ptq("inspect", tmp_path / "out", "--json").out)["log"] is None


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"[]", b"3", b"null", b"{", b"[" * 50_000, b'{"event": 3}', b'{"time": 1, "event": "begin"}', b"9" * 5_000,
        b'{"time": "2026-01-01T00:00:00.000Z", "event": ["begin"]}',
        b'{"time": "2026-01-01T00:00:00.000Z", "event": "layer", "name": "x", "seconds": "long", "peak_memory_bytes": -1}',
        b'{"time": "2026-01-01T00:00:00.000Z", "event": "layer", "name": {"a": 1}, "seconds": NaN}',
        b'{"time": "2026-01-01T00:00:00.000Z", "event": "ended", "why": "' + b"x" * 100_000 + b'"}',
        b'{"time": "0001-01-01T00:00:00.000Z", "event": "begin"}',
    ],
)  # fmt: skip
def test_lines_that_are_none_are_passed_over(ptq: Ptq, room: Path, tmp_path: Path, line: bytes) -> None:
    (tmp_path / LOG_JSON).write_bytes(line + b"\n" + (room / "done" / LOG_JSON).read_bytes() + line)
    past, whole = read_log(tmp_path), read_log(room / "done")
    assert past is not None
    assert whole is not None
    assert {name: past.layers[name] for name in whole.layers} == whole.layers


def bars(text: str, mark: str) -> dict[str, int]:
    return {name: len(bar) for name, bar in re.findall(rf"^(\S+) +0\.\d{{4}} ({mark}+)$", text, flags=re.MULTILINE)}


def test_the_plot(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    """As many bars as layers, as long as their errors; plain where there is no terminal."""
    answer = ptq("inspect", room / "done", "--plot", "--svg", tmp_path / "errors.svg")
    errors = {layer["name"]: layer["relative_error"] for layer in (read_report(room / "done") or {})["layers"]}
    drawn, worst = bars(answer.out, "#"), max(errors.values())
    assert drawn == {name: max(round(40 * error / worst), 1) for name, error in errors.items()}
    assert max(drawn.values()) == 40
    picture = ElementTree.parse(tmp_path / "errors.svg").getroot()
    rectangles = [float(each.get("width") or 0) for each in [*picture.iter("{http://www.w3.org/2000/svg}rect")][1:]]
    assert rectangles == [pytest.approx(480 * error / worst, abs=0.06) for error in errors.values()]
    assert {each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")} >= errors.keys()


def test_the_plot_of_what_has_no_errors(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    assert "no error of a layer is known" in one_line(ptq("inspect", room / "model", "--plot"))
    assert "choose such a name" in one_line(ptq("inspect", room / "done", "--svg", tmp_path / "errors.png"))


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedPtq]:
    server = ForkedPtq()
    yield server
    server.close()


def test_the_plot_in_a_terminal(forked: ForkedPtq, room: Path) -> None:
    for columns in (20, 100):
        answer = forked("inspect", "done", "--plot", folder=room, columns=columns)
        assert answer.code == 0
        assert answer.out.count("\u2588" * 10) >= 1
    plain = forked("inspect", "done", "--plot", folder=room, columns=80, TERM="dumb")
    assert "#" * 10 in plain.out
