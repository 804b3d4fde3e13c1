"""The house rules that a reader relies on, read off the syntax tree (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "embedtune"
LAYERS = [  # a module imports from the layers above its own line, never from its own or below
    "errors",
    "records functional dropout heap loading optim precision teacher_store gather sampler metrics",
    "attention dataset target testsets search chart",
    "encoder",
    "batch projection checkpoint",
    "tokens validation model_card",
    "losses datamodule fsdp zero",
    "strategies settle",
    "module",
    "export evaluate teach demo embedding parser predict progress baseline",
    "report",
    "run_report",
    "trainer_cli",
    "cli",
    "__init__",
    "__main__",
]
LAYER_OF = {module: depth for depth, line in enumerate(LAYERS) for module in line.split()}
DOORS = {
    "torch.distributed": {"gather", "fsdp", "checkpoint"},
    "sentence_transformers": {"loading", "encoder", "export", "evaluate"},
    "deepspeed": {"zero", "checkpoint"},
}
LAZY = "deepspeed"  # optional, and slow to import: only inside functions
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
MAX_FILE, MAX_FUNCTION = 350, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted name that is imported, or reached as an attribute of an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "embedtune." * bool(node.level) + (node.module or "")
            yield from (f"{package.rstrip('.')}.{alias.name}" for alias in node.names)
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


def layers(module: str, tree: ast.Module) -> Iterator[str]:
    if module not in LAYER_OF:
        yield "is in no layer: add it to LAYERS"
        return
    ours = [name.split(".") for name in imports(tree) if reaches(name, "embedtune")]
    for _, *rest in ours:
        target = rest[0] if rest and (rest[0] in LAYER_OF or len(rest) > 1) else "__init__"
        if LAYER_OF.get(target, len(LAYERS)) >= LAYER_OF[module]:
            yield f"imports {target}, which is not in a lower layer"


def doors(module: str, tree: ast.Module) -> Iterator[str]:
    for package, allowed in DOORS.items():
        if module not in allowed and any(reaches(name, package) for name in imports(tree)):
            yield f"uses {package}, whose door is {' or '.join(sorted(allowed))}"
    if any(reaches(name, LAZY) for node in outside_functions(tree) for name in imports(node)):
        yield f"imports {LAZY} at module level"


def habits(module: str, tree: ast.Module) -> Iterator[str]:
    if VAGUE & set(module.strip("_").split("_")):
        yield "has a name that says nothing"
    if "__future__.annotations" in imports(tree):
        yield "defers annotations, which blinds the shape checks"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"prints in line {node.lineno}"


def sizes(module: str, tree: ast.Module) -> Iterator[str]:
    if tree.body and tree.body[-1].end_lineno > MAX_FILE:
        yield f"is longer than {MAX_FILE} lines"
    for node in ast.walk(tree):
        if isinstance(node, Function):  # neither signature nor docstring counts
            body = node.body[ast.get_docstring(node) is not None :]
            if body and body[-1].end_lineno - body[0].lineno >= MAX_FUNCTION:
                yield f"has {node.name}, longer than {MAX_FUNCTION} lines"


def faults(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [fault for rule in (layers, doors, habits, sizes) for fault in rule(module, tree)]


def test_every_module_keeps_the_rules():
    paths = sorted(SOURCE.rglob("*.py"))
    assert paths
    named = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in paths}
    found = {name: faults(name, path.read_text("utf-8")) for name, path in named.items()}
    assert {name: messages for name, messages in found.items() if messages} == {}


def test_every_module_has_one_layer():
    modules = sorted(module for line in LAYERS for module in line.split())
    assert modules == sorted(path.stem for path in SOURCE.glob("*.py"))


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("stray", "", "no layer"),
        ("loss_utils", "", "says nothing"),
        ("functional", "from embedtune.losses import InfoNCE", "imports losses"),
        ("functional", "import embedtune.records", "imports records"),
        ("losses", "from embedtune import module", "imports module"),
        ("losses", "from .cli import main", "imports cli"),
        ("losses", "from embedtune import InfoNCE", "imports __init__"),
        ("losses", "from embedtune.stray import thing", "imports stray"),
        ("losses", "from torch import distributed", "uses torch.distributed"),
        ("losses", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("cli", "def f():\n  from sentence_transformers import util", "uses sentence_transformers"),
        ("module", "def f():\n    import deepspeed", "uses deepspeed"),
        ("strategies", "try:\n    import deepspeed\nexcept ImportError: ...", "module level"),
        ("strategies", "class A:\n    from deepspeed.utils import x", "module level"),
        ("cli", "print(1)", "prints in line 1"),
        ("cli", "from __future__ import annotations", "defers annotations"),
        ("cli", "a = 1\n" * 351, "longer than 350"),
        ("cli", "def f():\n    '''Doc.'''\n" + "    a = 1\n" * 41, "has f, longer than 40"),
    ],
)
def test_a_broken_rule_is_reported(module, source, fault):
    assert any(fault in message for message in faults(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "from embedtune import functional\nfrom embedtune.errors import InputError"),
        ("gather", "import torch.distributed as dist"),
        ("zero", "def f():\n    import deepspeed"),
        ("strategies", "from lightning.pytorch.strategies import DeepSpeedStrategy"),
        ("__init__", "from embedtune.module import EmbeddingModule"),
        ("cli", "def f(\n" + " a,\n" * 41 + "):\n  '''Doc.\n" + "\n" * 41 + "'''\n  return a"),
        ("cli", "def f():\n" + "    a = 1\n" * 40),
        ("cli", "a = 1\n" * 350),
    ],
)
def test_a_kept_rule_is_not(module, source):
    assert faults(module, source) == []
