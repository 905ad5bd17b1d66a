"""Kind: inputs of today that are not read. Chats, tables with nulls, columns of any name, Markdown.

Every chat is written out by a small template whose result is known by hand; every row is one document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commandline import Ptq, one_line
from tiny import byte_tokenizer, make_model
from transformers import PreTrainedTokenizerFast

from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.text import documents, evaluation_ids
from ptqcli.errors import PTQError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('role ' ~ m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.name }}]{% endfor %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def said(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


CHATS = [
    said(("system", "Be brief."), ("user", "2020-01-01?"), ("assistant", "A date, é.")),
    said(("user", "one"), ("assistant", "two\n\nthree")),
]
WRITTEN = ["<system>Be brief.<user>2020-01-01?<assistant>A date, é.", "<user>one<assistant>two\n\nthree"]


def sharegpt(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(message["role"], message["role"]), "value": message["content"]} for message in chat]


def lines(rows: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "a.jsonl"

    return write


def array(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([{"id": 1, "messages": chat} for chat in CHATS], indent=1))
    return folder / "a.json"


def table(name: str, column: str = "messages") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table({"id": [1, 2], column: CHATS}), folder / name)
        return folder / name

    return write


def arrow(folder: Path) -> Path:
    made = pa.table({"conversations": [sharegpt(chat) for chat in CHATS]})
    with pa.ipc.new_file(str(folder / "a.arrow"), made.schema) as file:
        file.write_table(made)
    return folder / "a.arrow"


def saved(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def csv(folder: Path) -> Path:
    cells = ['"' + json.dumps(chat).replace('"', '""') + '"' for chat in CHATS]
    (folder / "a.csv").write_text("id,messages\n" + "".join(f"{number},{cell}\n" for number, cell in enumerate(cells)))
    return folder / "a.csv"


SOURCES = {
    "jsonl": lines([{"id": "x", "messages": chat, "source": "y"} for chat in CHATS]),
    "sharegpt": lines([{"conversations": sharegpt(chat)} for chat in CHATS]),
    "one string": lines([{"messages": json.dumps(chat)} for chat in CHATS]),
    "lists": lines([{"conversations": {"role": [m["role"] for m in chat], "content": [m["content"] for m in chat]}} for chat in CHATS]),
    "parts": lines([{"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]} for chat in CHATS]),
    "json": array,
    "csv": csv,
    "parquet": table("a.parquet"),
    "arrow": arrow,
    "saved": saved,
}


def read(source: Path | str, rows: Rows | None = None, part: Any = "calibration") -> list[str]:
    return documents(str(source), part, None, rows or Rows(write_chat=chat_writer(tokenizer())))


@pytest.mark.parametrize("kind", SOURCES)
def test_chats_are_written_out_by_the_template_a_document_a_row(kind: str, tmp_path: Path) -> None:
    assert read(SOURCES[kind](tmp_path)) == WRITTEN


def test_a_column_is_named_behind_the_file(tmp_path: Path) -> None:
    path = table("a.parquet", "dialogue")(tmp_path)
    assert read(f"{path}:dialogue") == WRITTEN
    rows = lines([{"prompt": "p", "response": "r"}, {"prompt": "q", "response": None}])(tmp_path)
    assert read(f"{rows}:prompt") == ["p", "q"]
    assert read(f"{rows}:response") == ["r"]
    (tmp_path / "a:b.txt").write_text("the file itself")
    assert read(tmp_path / "a:b.txt") == ["the file itself"]


@pytest.mark.parametrize(
    "rows, texts, skipped",
    [
        ([{"text": None}, {"text": "a"}, {"text": "b"}, {}, {"other": 1}, None, {"text": " \n"}], ["a", "b"], 5),
        ([{"id": 3, "body": None}, {"id": 4, "body": "a"}], ["a"], 1),
        ([{"title": "t", "body": None}, {"body": "a"}], ["a"], 1),  # the first row does not say which column holds the text
        ([{"body": "a", "note": None}, {"body": "b", "note": None}], ["a", "b"], 0),
        ([{"messages": CHATS[0]}, {"messages": None}, {"messages": []}, {"messages": CHATS[1]}], WRITTEN, 2),
        ([{"text": [1, 2], "body": "a"}], ["a"], 0),
    ],
)
def test_rows_without_text_are_left_out_and_counted(rows: list[Any], texts: list[str], skipped: int, tmp_path: Path) -> None:
    reading = Rows(write_chat=chat_writer(tokenizer()))
    assert read(lines(rows)(tmp_path), reading) == texts
    assert reading.skipped == skipped


def test_nulls_in_tables_are_left_out_and_blank_rows_stay_in_a_text_that_is_joined(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    reading = Rows()
    assert read(tmp_path / "a.parquet", reading, "evaluation") == ["a", "", "b"]
    assert reading.skipped == 1
    reading = Rows()
    assert read(tmp_path / "a.parquet", reading) == ["a", "b"]
    assert reading.skipped == 2


CHAT = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [CHAT, "x"]}, "line 2, column 'messages', message 2: is not an object with role and content"),
        ({"messages": [{"content": "x"}]}, "line 2, column 'messages', message 1: has no role"),
        ({"messages": [{"role": "user"}]}, "line 2, column 'messages', message 1: has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: its content is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "message 1: its content is no text"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "the tokenizer's chat template refuses the chat (role pirate)"),
        ({"messages": "hello"}, "line 2, column 'messages': holds neither messages nor JSON of them"),
        ({"messages": "3"}, "line 2, column 'messages': is no list of messages but int"),
        ({"messages": 3}, "line 2: no text in column 'messages' but int"),
        ({"messages": [{"role": "user", "content": "a \ud800 b"}]}, "line 2: half a surrogate pair in column 'messages'"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = lines([{"messages": [CHAT]}, row])(tmp_path)
    with pytest.raises(PTQError, match=re.escape(message)) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}, ")
    assert "\n" not in str(refused.value)


def test_calls_of_tools_are_left_to_the_template(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {**CHAT, "tool_calls": None}]}]
    assert read(lines(rows)(tmp_path)) == ["<assistant>[f]<user>x"]


@pytest.mark.parametrize(
    "source, message",
    [
        ("a.jsonl", "which column holds the text is not clear (columns: prompt, response, n); name it 'text', or name the one to read"),
        ("a.jsonl", "as in a.jsonl:prompt"),
        ("a.jsonl:promt", "has no column 'promt' (columns: prompt, response, n); did you mean 'prompt'?"),
        ("a.jsonl:n", "line 1: no text in column 'n' but int"),
        ("b.parquet:mesages", "has no column 'mesages' (columns: id, messages); did you mean 'messages'?"),
    ],
)
def test_a_column_that_is_not_clear_is_told_with_what_to_write(source: str, message: str, tmp_path: Path) -> None:
    lines([{"prompt": "a", "response": "b", "n": 1}])(tmp_path)
    table("b.parquet")(tmp_path)
    with pytest.raises(PTQError, match=re.escape(message)):
        read(tmp_path / source)


def test_without_a_template_or_a_tokenizer_chats_are_refused(tmp_path: Path) -> None:
    path = lines([{"messages": [CHAT]}])(tmp_path)
    with pytest.raises(PTQError, match="line 1, column 'messages': holds a chat, and the tokenizer has no chat template"):
        evaluation_ids(str(path), byte_tokenizer())
    with pytest.raises(PTQError, match="holds chats, which are written out by a tokenizer"):
        read(path, Rows())


def test_markdown_is_text_and_beside_other_kinds_it_describes_them(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes")
    assert read(tmp_path / "notes.md") == read(tmp_path) == ["# Notes"]
    lines([{"text": "row"}])(tmp_path)
    assert read(tmp_path) == ["row"]


def test_a_run_and_an_evaluation_tell_and_keep_what_was_left_out(ptq: Ptq, tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1)
    tokenizer().save_pretrained(tmp_path / "model")
    path = lines([{"messages": said(("user", "w" * 200), ("assistant", "v" * 100))}] * 20 + [{"messages": None}] * 3)(tmp_path)
    flags = ("--calib", path, "--nsamples", "8", "--seqlen", "32", "--output", tmp_path / "out")
    done = ptq("quantize", tmp_path / "model", *flags)
    assert done.code == 0, done.err
    assert "3 rows without text are left out" in done.out + done.err
    assert json.loads((tmp_path / "out" / "ptq_report.json").read_text())["calibration"]["skipped_rows"] == 3
    shown = ptq("eval", tmp_path / "out", "--ppl", path, "--seqlen", "32")
    assert shown.code == 0, shown.err
    assert "3 rows without text are left out" in shown.out
    refused = ptq("eval", tmp_path / "out", "--ppl", f"{path}:mesages")
    assert "did you mean 'messages'?" in one_line(refused)
