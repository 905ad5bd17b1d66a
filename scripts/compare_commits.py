"""What another commit writes for the same model and flags, tensor by tensor: whether a change has changed a single byte.

    python scripts/compare_commits.py COMMIT [--model FOLDER] [--only REGEX] [--nsamples 16] [--seqlen 256]

Checks COMMIT out into a temporary folder and runs `ptq quantize` of both, this tree's and the other's, one after the other in this Python
environment, with one thread, for every line of CASES: every algorithm in every scheme, and what changes the codes beside. The names,
dtypes, shapes and bytes of all tensors, and config.json are compared; how they are spread over files is not. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "ptqcli" / "demo"
# Runs the command lines that stand on its input, a JSON list of lists, and prints a line with the exit code of each.
RUN = """
import json, os, sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)  # before the finder of an editable installation
import ptqcli
from ptqcli.cli import run
assert ptqcli.__file__.startswith(os.environ["PYTHONPATH"]), ptqcli.__file__
for arguments in json.load(sys.stdin):
    print(run(arguments), flush=True)
"""
WIDTHS = ("--wbits 2 --group-size 64", "--wbits 3 --group-size 128", "--wbits 4 --group-size 32", "--wbits 8 --group-size -1")

WEIGHT_ONLY = [
    *(
        f"--wbits {bits} --group-size {group} {zero}"
        for bits, group in ((2, 64), (3, 128), (4, 32), (8, -1))
        for zero in ("--sym", "--asym")
    ),
    "--wbits 4 --group-size 128",
]
EIGHT_BITS = [
    *(f"--wbits 8 --abits 8 --act-scales {scales}" for scales in ("token", "tensor", "static")),
    "--wbits 8 --abits 8 --group-size 0",
    "--wbits 4 --abits 8",
]
CASES = [
    *(f"--algo {algo} {scheme}" for algo in ("rtn", "gptq", "awq", "awq+gptq") for scheme in WEIGHT_ONLY),
    *(f"--algo {algo} {scheme}" for algo in ("rtn", "gptq", "smoothquant", "smoothquant+gptq") for scheme in EIGHT_BITS),
    *(f"--algo obq --wbits {bits} --group-size 64" for bits in (2, 4)),
    "--algo awq+obq --wbits 3",
    *(f"--algo smoothquant --smooth-level O{level}" for level in (1, 2, 3)),
    "--algo smoothquant+gptq --smooth-alpha auto --act-scales static",
    "--algo awq+smoothquant --wbits 4 --abits 16 --group-size 128",
    "--algo llm-int8",
    "--algo llm-int8 --outliers static --outlier-threshold 4",
    "--algo llm-int8+gptq --outliers static",
    "--algo gptq --no-act-order --wbits 2 --group-size 64",
    "--algo gptq --no-act-order --wbits 3 --asym",
    "--algo gptq --scale-search minmax --damp 0.05 --wbits 3",
    "--algo rtn --scale-search minmax --wbits 3",
    "--algo awq --no-awq-clip --wbits 3",
    "--algo gptq --no-sequential --wbits 3",
    "--algo awq+gptq --no-sequential --wbits 3",
    "--algo gptq --activation-budget 0 --wbits 3",
    "--algo gptq --override down_proj:bits=8,group=64 --override layers.0.self_attn:skip --ignore layers.1.mlp",
    "--algo gptq --seed 7 --batch-size 3 --dtype float32 --wbits 3",
]


def main() -> None:
    """Every case of both commits; one line each."""
    options = arguments()
    cases = [case for case in CASES if re.search(options.only, case)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = {"other": check_out(options.commit, folder / "other"), "here": linked(ROOT, folder / "here")}
        outputs = {name: quantize_all(cases, tree, folder / f"{name}-output", options) for name, tree in trees.items()}
        changed = sum(not compare(*parts) for parts in zip(cases, outputs["other"], outputs["here"], strict=True))
    print(f"{len(cases) - changed} of {len(cases)} cases equal")
    sys.exit(int(changed > 0))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose flags match")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    return parser.parse_args()


def check_out(commit: str, folder: Path) -> Path:
    """The files of ``commit``, importable from the folder that is returned."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "ptqcli", "kernels"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return linked(folder, folder / "importable")


def linked(tree: Path, folder: Path) -> Path:
    """A folder with nothing but the two packages of ``tree``: ``kernels`` itself must not be importable."""
    folder.mkdir()
    (folder / "ptqcli").symlink_to(tree / "ptqcli")
    (folder / "ptq_kernels").symlink_to(tree / "kernels" / "ptq_kernels")
    return folder


def quantize_all(cases: list[str], tree: Path, folder: Path, options: argparse.Namespace) -> list[Path | None]:
    """The checkpoint of each case, made by the package in ``tree``, None where it failed; all in one process, with one thread."""
    folder.mkdir()
    outputs = [folder / str(number) for number in range(len(cases))]
    shared = ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen), "--quiet"]
    lines = [
        ["quantize", str(options.model.resolve()), *case.split(), *shared, "--output", str(output)]
        for case, output in zip(cases, outputs, strict=True)
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [sys.executable, "-c", RUN]
    done = subprocess.run(started, input=json.dumps(lines), env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    codes = done.stdout.split()
    return [output if code == "0" else None for output, code in zip(outputs, codes, strict=True)]


def compare(case: str, other: Path | None, here: Path | None) -> bool:
    """Print how two checkpoints compare; both refused is equal, too."""
    if other is None or here is None:
        print(f"{case}: {'refused by both' if other is here else 'refused by one only'}")
        return other is here
    differences = [*different_tensors(other, here), *different_config(other, here)]
    print(f"{case}: {'equal' if not differences else ', '.join(differences[:5])}")
    return not differences


def different_tensors(one: Path, other: Path) -> list[str]:
    """What is not the same in both, by name."""
    first, second = tensors(one), tensors(other)
    alone = [f"{name} in one only" for name in sorted(first.keys() ^ second.keys())]
    return alone + [name for name in sorted(first.keys() & second.keys()) if first[name] != second[name]]


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of each tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it cannot be iterated
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape(), save({"": opened.get_tensor(name)}))
    if not found:
        raise SystemExit(f"{folder} holds no tensors")
    return found


def different_config(one: Path, other: Path) -> list[str]:
    """``config.json`` if its contents differ."""
    first, second = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (one, other))
    return [] if first == second else ["config.json"]


if __name__ == "__main__":
    main()
