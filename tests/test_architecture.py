"""The house rules that a reader relies on (docs/architecture.md).

Who may import whom is said in pyproject.toml, and import-linter holds it. What it cannot say is
read off the syntax tree here.
"""

import ast
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "embedtune"
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())

# Of torch, import-linter sees the name alone.
DISTRIBUTED = {
    "checkpoints.pickles",
    "checkpoints.read",
    "checkpoints.shards",
    "distributed.exchange",
    "distributed.fsdp",
}
LAZY = ("deepspeed", "peft")  # optional, and slow to import: only inside functions
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
MAX_FUNCTION = 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted name that is imported, or reached as an attribute of an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def outside_functions(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the import statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, Function):
            yield from outside_functions(node)


def reaches(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def doors(module: str, tree: ast.Module) -> Iterator[str]:
    is_exchanging = any(reaches(name, "torch.distributed") for name in imports(tree))
    if is_exchanging and module not in DISTRIBUTED:
        yield f"uses torch.distributed, whose door is {' or '.join(sorted(DISTRIBUTED))}"
    for package in LAZY:
        at_import = outside_functions(tree)
        if any(reaches(name, package) for node in at_import for name in imports(node)):
            yield f"imports {package} at module level"


def habits(module: str, tree: ast.Module) -> Iterator[str]:
    if VAGUE & {word for part in module.split(".") for word in part.split("_")}:
        yield "has a name that says nothing"
    if "__future__.annotations" in imports(tree):
        yield "defers annotations, which blinds the shape checks"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"prints in line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedtune"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            if set(private) - {"__version__"}:
                yield f"imports {', '.join(private)}, which is another module's own"


def sizes(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function):  # neither signature nor docstring counts
            body = node.body[ast.get_docstring(node) is not None :]
            if body and body[-1].end_lineno - body[0].lineno >= MAX_FUNCTION:
                yield f"has {node.name}, longer than {MAX_FUNCTION} lines"


def faults(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [fault for rule in (doors, habits, sizes) for fault in rule(module, tree)]


def test_every_module_keeps_the_rules():
    paths = sorted(SOURCE.rglob("*.py"))
    assert paths
    named = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in paths}
    found = {name: faults(name, path.read_text("utf-8")) for name, path in named.items()}
    assert {name: messages for name, messages in found.items() if messages} == {}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("losses.loss_utils", "", "says nothing"),
        ("losses.infonce", "from torch import distributed", "uses torch.distributed"),
        ("losses.scope", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("distributed.zero", "try:\n    import deepspeed\nexcept ImportError: ...", "module level"),
        ("distributed.zero", "class A:\n    from deepspeed.utils import x", "module level"),
        ("models.loading", "import peft", "module level"),
        ("cli.keys", "print(1)", "prints in line 1"),
        ("cli.keys", "from __future__ import annotations", "defers annotations"),
        ("cli.keys", "from embedtune.data.rows import _batched", "another module's own"),
        ("cli.keys", "def f():\n  '''Doc.'''\n" + "  a = 1\n" * 41, "has f, longer than 40"),
    ],
)
def test_a_broken_rule_is_reported(module, source, fault):
    assert any(fault in message for message in faults(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("distributed.exchange", "import torch.distributed as dist"),
        ("distributed.zero", "def f():\n    import deepspeed"),
        ("distributed.strategies", "from lightning.pytorch.strategies import DeepSpeedStrategy"),
        ("cli.dispatch", "from embedtune import __version__"),
        ("cli.keys", "def f(\n" + " a,\n" * 41 + "):\n  '''D.\n" + "\n" * 41 + "'''\n  return a"),
        ("cli.keys", "def f():\n" + "    a = 1\n" * 40),
    ],
)
def test_a_kept_rule_is_not(module, source):
    assert faults(module, source) == []


# --- The rooms ------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> str:
    """Run import-linter on a copy of the package in ``folder``; return what it says."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("planted", "source", "broken"),
    [
        ("data/sampler.py", "", None),
        ("models/loading.py", "from embedtune.training import EmbeddingModule", "below it"),
        ("losses/infonce.py", "from embedtune.evaluation.metrics import ndcg", "below it"),
        ("export/folder.py", "from embedtune.reports import write_report", "below it"),
        ("mining.py", "", "below it"),  # a module at the root without a place in the layers
        ("losses/infonce.py", "from embedtune.models.encoder import Encoder", "sees a model"),
        ("cli/keys.py", "def f():\n    import sentence_transformers", "sentence-transformers is"),
        ("training/module.py", "def f():\n    import deepspeed", "DeepSpeed is"),
        ("reports/curves.py", "import lightning.pytorch", "Lightning is"),
        ("cli/mistakes.py", "import embedtune.training", "starts without torch"),
    ],
)
def test_a_planted_import_breaks_its_contract(tmp_path, planted, source, broken):
    package = tmp_path / "embedtune"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / planted
    path.write_text((path.read_text() if path.exists() else "") + f"\n{source}\n")
    said = lint_imports(tmp_path)
    lines = [line for line in said.splitlines() if line.endswith((" KEPT", " BROKEN"))]
    if broken is None:
        assert lines
        assert all(line.endswith(" KEPT") for line in lines), said
    else:
        assert "exhaustive" in said or [line for line in lines if line.endswith(" BROKEN")], said
        assert any(broken in line and line.endswith(" BROKEN") for line in lines), said


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_page_and_exports_what_it_names(room):
    module = importlib.import_module(f"embedtune.{room}")
    page = " ".join((module.__doc__ or "").split())
    for part in ("Comes in:", "Goes out:", "Read first", "mport"):
        assert part in page, part
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)
    mentioned = {word.strip("`.,;:()") for word in page.split() if word.startswith(("``", "(``"))}
    modules = {path.stem for path in (SOURCE / room).glob("*.py")} - {"__init__"}
    assert mentioned & modules, "the page names a module to read first"


def test_every_public_name_is_fetched_on_first_use():
    import embedtune

    for name in embedtune.__all__:
        assert getattr(embedtune, name).__name__ == name
    assert embedtune.losses.InfoNCE
    assert not hasattr(embedtune, "Nope")


def test_tests_mirror_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {*ROOMS, "compat", "faults", "zoo"}
    assert set(ROOMS) <= folders


def test_the_drawing_has_every_room():
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f"`{room}`" in drawing
