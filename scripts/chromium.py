"""A headless Chromium, driven over two pipes (its --remote-debugging-pipe), to see a page as a person would: nothing but Python is needed.

Looked for by the names that it has on the PATH, or where the environment variable PTQ_CHROMIUM says.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 300.0  # for an answer; a busy machine takes its time


def find_chromium() -> str | None:
    """The program, None where there is none."""
    return os.environ.get("PTQ_CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """A browser with one page. problems: what the page has written to the console, and what went wrong in it."""

    def __init__(self, program: str) -> None:
        self.problems: list[str] = []
        self._number, self._session, self._waiting = 0, "", b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run"]
        # Chromium reads from the descriptor 3 and writes to 4.
        shell = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        line = ["bash", "-c", shell, "bash", str(theirs_in), str(theirs_out), program, *flags, f"--user-data-dir={self._profile.name}"]
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(line, pass_fds=(theirs_in, theirs_out), stdout=devnull, stderr=devnull, stdin=devnull)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Show a file in a window of so many pixels, in light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG, also what is below the window."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            piece = os.read(self._in, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError("the browser does not answer")
            self._waiting += piece
        message, _, self._waiting = self._waiting.partition(b"\0")
        answer = json.loads(message)
        method, given = answer.get("method", ""), answer.get("params", {})
        if method == "Log.entryAdded":
            self.problems.append(given["entry"]["text"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed"):
            self.problems.append(f"{method}: {json.dumps(given)[:500]}")
        elif method == "Network.requestWillBeSent" and not given["request"]["url"].startswith("file:"):
            self.problems.append(f"asks for {given['request']['url']}")
        return answer
