"""Kind: a number that leaves out the larger part. "memory needed" is the peak of the whole process, Python and torch with it.

Each run is a process of its own that compares what its plan told with the peak that the system measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model, write_text

RUN = """
import json, sys
from pathlib import Path
from ptqcli.cli.console import Output
from ptqcli.cli.quantize_report import show_plan
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import process_bytes

class Told(NoProgress):
    def planned(self, plan, output):
        self.plan, self.before = plan, process_bytes()

told = Told()
report = quantize(Path(sys.argv[1]), load_recipe(flags=json.loads(sys.argv[3])), Path(sys.argv[2]), progress=told)
show_plan(told.plan, Path(sys.argv[1]), Path(sys.argv[2]), Output(as_json=True))
print(json.dumps([told.before, told.plan.memory_bytes, report.peak_memory_bytes]))
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", dtype=torch.bfloat16, num_hidden_layers=2, hidden_size=768, intermediate_size=3072)
    write_text(folder / "text.txt", 3000)
    return folder


SLOW = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is that of /proc")
@pytest.mark.parametrize(
    "flags",
    [
        {"algo": "rtn"},
        pytest.param({"algo": "gptq"}, marks=SLOW),
        pytest.param({"algo": "smoothquant"}, marks=SLOW),
        pytest.param({"algo": "let", "let_iters": 3, "wbits": 8, "abits": 8}, marks=SLOW),
    ],
    ids=str,
)
def test_the_memory_that_is_told_is_the_peak_of_the_process(flags: dict[str, object], workshop: Path, tmp_path: Path) -> None:
    text = {} if flags["algo"] == "rtn" else {"calib": str(workshop / "text.txt"), "nsamples": 16, "seqlen": 128}
    command = [sys.executable, "-c", RUN, str(workshop / "model"), str(tmp_path / "out"), json.dumps({**flags, **text})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, told, peak = json.loads(done.stdout)
    assert peak - before > 0.1 * peak, "otherwise libraries alone would do for the number"
    assert 0.85 * peak < told < 1.5 * peak, (before, told, peak)
    size = f"{told / 2**20:.1f} MiB" if told < 2**30 else f"{told / 2**30:.1f} GiB"
    assert f"memory needed  about {size} in all" in done.stderr
