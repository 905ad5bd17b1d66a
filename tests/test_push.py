"""``ptq push`` against a stand-in for the hub on this machine, which speaks as much of its protocol as a commit takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commandline import Ptq, one_line
from packed import everything, llama, random_model, write_checkpoint
from tiny import byte_tokenizer

from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.publishing import plan_publication
from ptqcli.pipeline.report import REPORT_NAME

# of httpx2, in the way in which the hub's library calls it
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO, TOKEN = "somebody/small", "hf_secret"


class Hub:
    """files: what has arrived. repos: whether each is private."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repos: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by their SHA-256
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        route = path.partition("?")[0]
        if token != f"Bearer {TOKEN}" and not route.startswith("/put/"):
            return 401, {"error": "Invalid username or password."}
        answers: dict[str, Callable[[str, bytes], tuple[int, Any]]] = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda _route, _body: (200, {"errors": [], "warnings": []}),
            f"/api/models/{REPO}/preupload/": self.modes,
            f"/{REPO}.git/info/lfs/objects/batch": self.places,
            "/put/": self.put,
            f"/api/models/{REPO}/commit/": self.commit,
            f"/api/models/{REPO}/tree/": self.tree,
            f"/api/models/{REPO}": self.repository,
        }
        found = next((answer for begin, answer in answers.items() if route.startswith(begin)), None)
        return found(route, body) if found else (404, {"error": f"no {method} {path} here"})

    def tree(self, _route: str, _body: bytes) -> tuple[int, Any]:
        return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]

    def repository(self, _route: str, _body: bytes) -> tuple[int, Any]:
        return 200, {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": name} for name in self.files]}

    def create(self, _route: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name'].rpartition('/')[2]}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, asked.get("private") is True or asked.get("visibility") == "private")
        return status, {"url": f"{self.address}/{name}", "error": "You already created this model repo"}

    def modes(self, _route: str, body: bytes) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return 200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def places(self, _route: str, body: bytes) -> tuple[int, Any]:
        objects = json.loads(body)["objects"]
        return 200, {
            "transfer": "basic",
            "objects": [{**each, "actions": {"upload": {"href": f"{self.address}/put/{each['oid']}"}}} for each in objects],
        }

    def put(self, route: str, body: bytes) -> tuple[int, Any]:
        self.stored[route.removeprefix("/put/")] = body
        return 200, {}

    def commit(self, _route: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": "1", "pullRequestUrl": None, "success": True}


@contextmanager
def standing_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            status, said = hub.answer(self.command, self.path, body, self.headers.get("Authorization"))
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # names of the protocol

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "checkpoint"
    folder.mkdir(parents=True)
    write_checkpoint(folder, random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32")))
    byte_tokenizer().save_pretrained(folder)
    report = {
        "source": str(tmp_path / "home" / "original"),
        "ptqcli": "0.1",
        "recipe": {"algo": "rtn", "calib": f"{tmp_path}/a.txt"},
        "layers": [],
    }
    (folder / REPORT_NAME).write_text(json.dumps(report))
    (folder / "README.md").write_text("# Small\n")
    (folder / "LICENSE").write_text("Anything goes\n")
    (folder / "notes.txt").write_text("mine\n")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in() as here:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield here


def test_what_belongs_to_the_checkpoint_arrives_as_it_is(ptq: Ptq, hub: Hub, checkpoint: Path) -> None:
    done = ptq("push", checkpoint, REPO, "--private", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["address"] == f"{hub.address}/{REPO}"
    assert said["left_out"] == ["notes.txt"]
    assert hub.repos == {REPO: True}
    assert set(hub.files) == set(said["files"]) == {path.name for path in checkpoint.iterdir()} - {"notes.txt"}
    for name, content in hub.files.items():
        if name != REPORT_NAME:
            assert content == (checkpoint / name).read_bytes(), name
    assert hashlib.sha256(hub.files["model.safetensors"]).hexdigest() in hub.stored
    report = json.loads(hub.files[REPORT_NAME])
    assert (report["source"], report["recipe"]["calib"]) == ("original", "a.txt"), "no path of this machine"

    again = ptq("push", checkpoint, REPO)
    assert again.code == 2
    assert f"{REPO}: holds " in again.err
    assert "add a commit to this one with --overwrite" in again.err
    assert ptq("push", checkpoint, REPO, "--overwrite").code == 0


def test_without_a_token_it_says_how_to_log_in(ptq: Ptq, hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused = ptq("push", checkpoint, REPO, "--quiet")
    assert refused.code == 1
    assert "the hub does not take it" in one_line(refused)
    assert "hf auth login" in refused.err
    assert hub.files == {}


def test_nothing_is_sent_in_a_dry_run(ptq: Ptq, hub: Hub, checkpoint: Path) -> None:
    done = ptq("push", checkpoint, REPO, "--dry-run")
    assert done.code == 0, done.err
    assert "model.safetensors" in done.out
    assert (hub.files, hub.repos) == ({}, {})


def test_what_is_no_checkpoint_or_no_name_is_refused(ptq: Ptq, checkpoint: Path, tmp_path: Path) -> None:
    assert "is no name of a repository" in one_line(ptq("push", checkpoint, "a/b/c"))
    (tmp_path / "empty").mkdir()
    assert ptq("push", tmp_path / "empty", REPO).code in (1, 2)
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "LICENSE").unlink()
    (checkpoint / "LICENSE").symlink_to(tmp_path / "secret")
    assert "is a link that leads out of the model folder" in one_line(ptq("push", checkpoint, REPO))


def test_an_adapter_goes_along(checkpoint: Path) -> None:
    (checkpoint / "adapter").mkdir()
    (checkpoint / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter/adapter_config.json" in plan_publication(checkpoint, REPO).files
