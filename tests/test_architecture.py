"""Imports point one way. This reads every import statement and fails on any edge that the design does not draw."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ptqcli.algorithms import all_parts
from ptqcli.formats import FORMATS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ptqcli"
KERNELS = ROOT / "kernels" / "ptq_kernels"

BASE = {"errors", "arguments", "untrusted", "temporary", "patterns", "numerics", "suggest", "yaml_file"}
ROOMS = BASE | {"checkpoint", "model", "calibration", "transforms", "solvers", "algorithms", "formats", "recipe", "resources"}
PLAN = ROOMS | {
    "plan",
    "plan_candidates",
    "plan_memory",
    "plan_notes",
    "plan_texts",
    "estimate",
    "adapters",
    "allocate",
    "budget",
    "sensitivity",
}

# Room -> what it may import of ptqcli. A dotted name allows that one module of a room. Below a line stands what is above it.
ALLOWED = {
    "__main__": {"cli"},
    "__init__": {"api", "api_measuring", "errors", "formats", "numerics", "pipeline", "recipe", "runtime"},  # handed on when asked for
    "errors": set(),
    "untrusted": {"errors"},
    "patterns": {"errors", "untrusted"},
    "suggest": set(),
    "temporary": set(),
    "arguments": {"errors"},
    "options": {"errors", "suggest"},
    "yaml_file": {"errors", "untrusted"},
    "recipe_file": {"errors", "yaml_file"},
    "shipped": {"errors", "suggest"},
    "quality": {"errors", "suggest"},
    "numerics": {"errors", "suggest"},
    "resources": {"errors"},
    "checkpoint": BASE,
    "formats": BASE | {"checkpoint", "model"},  # packed_checkpoint.py: a stored linear is one of the model's
    "model": BASE | {"checkpoint"},
    "calibration": BASE | {"model", "resources"},  # it records and replays the model's blocks
    "adapters": BASE | {"checkpoint", "solvers.damping"},
    "finishing": BASE | {"options", "calibration", "checkpoint", "formats", "model", "resources", "runtime"},
    "solvers": BASE | {"options", "calibration.statistics"},
    # which modules are linears, and how they lie in memory; what a rewritten tensor is made of
    # let learns OmniQuant's clipping beside its scales
    "transforms": BASE | {"options", "calibration.statistics", "model", "checkpoint.tensors", "solvers.omniquant", "solvers.rounding"},
    "allocate": {"errors"},
    "budget": BASE,
    "algorithms": BASE | {"options"},  # parts are named there, and imported when they are used
    "recipe_checks": BASE | {"options", "algorithms"},
    "recipe": BASE
    | {"options", "algorithms", "budget", "recipe_checks", "formats", "solvers", "transforms", "calibration.bos", "calibration.sources"},
    "recipe_loading": BASE | {"algorithms", "budget", "quality", "recipe", "recipe_checks", "recipe_file"},
    "plan_texts": ROOMS,
    "estimate": ROOMS | {"adapters", "finishing", "plan_texts"},
    "plan_notes": ROOMS,
    "plan_groups": ROOMS | {"budget", "estimate"},
    "plan_experts": ROOMS | {"estimate"},
    "plan_outside": ROOMS | {"estimate"},
    "plan_parallel": ROOMS | {"estimate"},
    "plan_specs": ROOMS,
    "plan_candidates": ROOMS | {"budget", "estimate", "plan", "plan_parallel", "plan_specs", "sensitivity"},
    "sensitivity": ROOMS | {"budget"},
    "plan_memory": ROOMS,
    "plan": ROOMS
    | {
        "estimate",
        "plan_experts",
        "plan_groups",
        "plan_memory",
        "plan_notes",
        "plan_outside",
        "plan_parallel",
        "plan_specs",
        "plan_texts",
        "sensitivity.allocation",
    },
    "runtime": BASE | {"adapters", "formats", "checkpoint", "model", "resources"},
    "evaluation": ROOMS | {"runtime"},
    "bench": ROOMS | {"runtime"},
    "pipeline": PLAN | {"finishing"},
    "trials": PLAN | {"recipe_file", "recipe_loading", "runtime", "evaluation", "pipeline"},
    "comparing": ROOMS | {"runtime", "evaluation", "bench", "pipeline.report"},
    "api_measuring": ROOMS | {"runtime", "evaluation", "pipeline.report", "comparing"},
    "api": PLAN | {"api_measuring", "recipe_loading", "runtime", "evaluation", "finishing", "pipeline", "shipped"},
    "cli": PLAN
    | {"options", "quality", "recipe_loading", "finishing", "shipped", "runtime", "evaluation", "bench", "pipeline", "comparing", "trials"},
}
KERNEL_LIBRARIES = {"ptq_kernels", "torch", "triton"} | sys.stdlib_module_names
# What a command may import before it is called: `ptq --help` and `ptq COMMAND --help` wait for all of it.
QUICK_MODULES = (
    "ptqcli.cli",
    "ptqcli.errors",
    "ptqcli.formats",
    "ptqcli.__version__",
    "ptqcli.suggest",
    "ptqcli.budget",
    "ptqcli.quality",
    "ptqcli.model.locate",
    "ptqcli.pipeline.report",
    "ptqcli.comparing.words",
)
QUICK_LIBRARIES = {"click", "rich", "packaging", "yaml"} | sys.stdlib_module_names


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))
CLI_FILES = sorted((PACKAGE / "cli").glob("*.py"))
LIBRARY_FILES = [file for file in [*PACKAGE_FILES, *KERNEL_FILES] if file not in CLI_FILES]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def short_name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room_of(file: Path) -> str:
    """The part of ptqcli that ``file`` belongs to, "__init__" for the package's own file."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names in the import statements among ``nodes``: ``a.b`` for ``from a import b``."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_edges(names: set[str], room: str) -> set[str]:
    """Those imports out of ``names`` that leave ``room`` by an edge that is not drawn."""
    targets = {name.removeprefix("ptqcli.") for name in names if name.startswith("ptqcli.")}
    allowed = ALLOWED[room] | {room, "__version__"}
    return {target for target in targets if not any(f"{target}.".startswith(f"{name}.") for name in allowed)}


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=short_name)
def test_rooms_import_only_what_stands_below_them(file: Path) -> None:
    assert wrong_edges(imported(ast.walk(parse(file))), room_of(file)) == set()


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("solvers", "from ptqcli.pipeline import quantize"),
        ("solvers", "from ptqcli.calibration import record"),
        ("numerics", "import ptqcli.checkpoint"),
        ("formats", "def late():\n    from ptqcli.solvers import rtn"),
        ("pipeline", "from ptqcli import cli"),
        ("model", "from ptqcli.checkpoints import Reader"),
    ],
)
def test_an_edge_that_is_not_drawn_is_found(room: str, statement: str) -> None:
    assert wrong_edges(imported(ast.walk(ast.parse(statement))), room)


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=short_name)
def test_only_the_runtime_imports_the_kernels(file: Path) -> None:
    assert room_of(file) == "runtime" or "ptq_kernels" not in libraries(imported(ast.walk(parse(file))))


@pytest.mark.parametrize("file", KERNEL_FILES, ids=short_name)
def test_kernels_are_a_library_of_their_own(file: Path) -> None:
    assert libraries(imported(ast.walk(parse(file)))) <= KERNEL_LIBRARIES


@pytest.mark.parametrize("file", CLI_FILES, ids=short_name)
def test_commands_import_nothing_heavy_before_they_are_called(file: Path) -> None:
    names = imported(parse(file).body)
    assert libraries(names) <= QUICK_LIBRARIES | {"ptqcli"}
    assert all(name.startswith(QUICK_MODULES) for name in names if name.startswith("ptqcli."))


@pytest.mark.parametrize("file", LIBRARY_FILES, ids=short_name)
def test_only_commands_print_exit_or_read_the_environment(file: Path) -> None:
    used = {ast.unparse(node) for node in ast.walk(parse(file)) if isinstance(node, (ast.Name, ast.Attribute))}
    assert used.isdisjoint({"print", "input", "sys.exit", "exit", "SystemExit", "os.environ", "os.getenv", "os._exit"})


def test_no_file_is_named_for_what_it_is_not() -> None:
    names = {file.stem for file in [*PACKAGE_FILES, *KERNEL_FILES]}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_kernels_folder_is_no_package() -> None:
    """A top-level ``kernels`` would shadow the Hugging Face package of that name, which transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


PARTS = {part.name for part in all_parts()}  # some formats have the names of the algorithms that they were made for
FILES = {"gguf"}  # is the name of a kind of file, too, which is read as a model
FORMAT_NAME = re.compile("|".join(name.replace("-", ".?") for name in FORMATS if name not in PARTS | FILES), re.IGNORECASE)


# Some are named for the library that wrote them first, whose kernels are timed there.
PEERS = PACKAGE / "bench" / "peers.py"


@pytest.mark.parametrize("file", [file for file in PACKAGE_FILES if "formats" not in file.parts and file != PEERS], ids=short_name)
def test_no_format_is_named_outside_its_room(file: Path) -> None:
    assert FORMAT_NAME.search(file.read_text(encoding="utf-8")) is None


LONGEST_MODULE = 400
LONGEST_FUNCTION = 60


@pytest.mark.parametrize("file", [*PACKAGE_FILES, *KERNEL_FILES], ids=short_name)
def test_modules_and_functions_can_be_seen_whole(file: Path) -> None:
    tree = parse(file)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION and not is_kernel(node)}
    assert long == set()


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: such a function cannot be cut where a reader would like it."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)
