"""Draw docs/terminal.svg, the picture of the README: what the demo's commands print, as they print it.

python scripts/make_terminal_picture.py [--output docs/terminal.svg]
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

import ptqcli

DEMO = Path(ptqcli.__file__).parent / "demo"
PICTURE = Path(__file__).parent.parent / "docs" / "terminal.svg"
COMMANDS = ("ptq quantize demo --algo gptq --wbits 4", "ptq eval --ppl builtin")
COLUMNS = 104
# rich's own form fetches a font from the network.
FORM = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code", "ui-monospace, Menlo, Consolas")


def printed(command: str, folder: str) -> str:
    """What ``command`` prints in ``folder``; progress, which goes by in a terminal, left out."""
    code = f"import sys; from ptqcli.cli import main; sys.argv = {shlex.split(command)!r}; main()"
    environment = {"COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout.strip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what the demo's commands print.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    output = parser.parse_args().output.resolve()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEMO, Path(folder) / "demo")
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text(printed(command, folder)), end="\n\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(console.export_svg(title="ptq", code_format=FORM, unique_id="ptq"), encoding="utf-8")


if __name__ == "__main__":
    main()
