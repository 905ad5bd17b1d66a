"""Kind: output for machines that has another form than elsewhere. Every command's --json prints one object on stdout
and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import Ptq

from ptqcli.bench import machine
from ptqcli.bench.machine import Machine
from ptqcli.cli import COMMANDS

# command line -> keys that its object must have
LINES = {
    "quantize model --algo rtn --group-size 32 --output new": {"recipe", "layers", "output"},
    "quantize model --group-size 32 --dry-run": {"recipe", "linears", "memory_bytes"},
    "sensitivity model --candidates w2g32,w4g32 --calib text.txt --nsamples 2 --seqlen 16": {"groups", "candidates", "seconds"},
    "eval done --ppl text.txt --seqlen 64": {"checkpoint", "results"},
    "eval done --ppl text.txt --seqlen 64 --tokens 128": {"checkpoint", "conditions", "calibration_overlap"},
    "compare done --ppl text.txt --seqlen 64": {"baseline", "conditions", "checkpoints", "pairs", "fronts", "failures"},
    "bench --shapes 128x32 --tokens 1 --seconds 0.0001": {"kernels", "machine"},
    "tune model --max-kl 9 --algo rtn --group-size 32 --ppl text.txt --tokens 64 --max-trials 1 --output goal": {"best", "trials", "holds"},
    "tune-scales done --calib text.txt --nsamples 4 --seqlen 16 --steps 1 --output tuned": {"output", "tuning"},
    "convert done --to gptq --requantize w4a16-g32 --output converted": {"output", "relative_error"},
    "push done owner/name --dry-run": {"repository", "files"},
    "inspect done": {"checkpoint", "layers"},
    "inspect done --verify": {"checkpoint", "sound", "files", "differences", "flaws"},
    "generate done hello --max-new-tokens 2": {"checkpoint", "answer"},
    "algorithms": {"parts"},
    "recipes": {"recipes"},
    "doctor": {"checks"},
}
NOT_FOR_MACHINES = {"completion"}  # prints a script


def test_every_command_is_here() -> None:
    assert {line.split()[0] for line in LINES} == set(COMMANDS) - NOT_FOR_MACHINES


@pytest.mark.parametrize("line", LINES)
def test_one_object(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    limits = Machine(
        name="a processor", device="cpu", threads=1, cache_bytes=1, bandwidth=1e10, arithmetic={"bfloat16": 1e11, "float32": 1e11}
    )
    monkeypatch.setattr(machine, "measure", lambda device: limits)
    answer = ptq(*line.split(), "--json")
    found = json.loads(answer.out)
    assert answer.code == 0
    assert isinstance(found, dict)
    assert found.keys() >= LINES[line]
