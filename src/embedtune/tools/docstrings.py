"""Find the docstrings of numpy, torch and the standard library.

The sources are parsed, never imported: nothing runs, nothing is printed, and two harvests of the
same installation are identical.
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED = {
    # Tests, games, graphical interfaces, and what later versions no longer have.
    *("test", "tests", "testing", "idlelib", "tkinter", "turtle", "turtledemo", "this"),
    *("antigravity", "lib2to3", "distutils", "ensurepip", "site-packages", "f2py"),
    *("datapipes", "matrixlib", "telnetlib", "imaplib"),
}
TORCH = (
    # What users of torch call; elsewhere its docstrings speak to its own developers.
    *("_torch_docs", "amp", "autograd", "distributions", "fft", "func"),
    *("functional", "hub", "linalg", "nn", "optim", "profiler", "quasirandom", "random"),
    *("serialization", "signal", "sparse", "special", "storage", "utils"),
)


class Docstring(NamedTuple):
    """One docstring, with the module that it was found in and the name that it describes."""

    module: str
    name: str
    text: str


def docstrings() -> Iterator[Docstring]:
    """Yield the docstrings of all sources, in the order of module names and lines."""
    for module, path in sorted(source_files()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes in their strings
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:
                continue
        yield from _defined(module, module, tree)
        yield from _attached(module, tree)


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of every module that is harvested."""
    standard = Path(sysconfig.get_path("stdlib"))
    yield from _modules(standard, standard, public=True)
    numpy, torch = _package("numpy"), _package("torch")
    yield from _modules(numpy, numpy.parent, public=False)
    for part in TORCH:
        # The private modules named above are where the docstrings of C functions are.
        if (torch / part).is_dir():
            yield from _modules(torch / part, torch.parent, public=True)
        elif (torch / f"{part}.py").is_file():
            yield f"torch.{part}", torch / f"{part}.py"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # a top-level name is found without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _modules(folder: Path, root: Path, *, public: bool) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if SKIPPED.isdisjoint(parts) and not (public and any(part[0] == "_" for part in parts)):
            yield ".".join(parts), path


def _defined(module: str, prefix: str, node: ast.AST) -> Iterator[Docstring]:
    """Yield the docstrings of the public classes and functions in ``node``, at any depth."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}"
            if not child.name.startswith("_"):
                yield Docstring(module, name, ast.get_docstring(child) or "")
            if isinstance(child, ast.ClassDef):
                yield from _defined(module, name, child)
        elif not isinstance(child, ast.expr):
            yield from _defined(module, prefix, child)  # below an `if` or a `try`


def _attached(module: str, tree: ast.Module) -> Iterator[Docstring]:
    """Yield the docstrings that a module gives to C functions by ``add_docstr`` and the like."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        function, (*target, text) = node.func.id.lstrip("_"), node.args
        if not function.startswith(("add_docstr", "add_newdoc")):
            continue
        if isinstance(text, ast.Tuple) and len(text.elts) == 2:  # numpy: (method, docstring)
            target, text = [*target, text.elts[0]], text.elts[1]
        name = ".".join(ast.unparse(part).strip("'\"") for part in target)
        if not name.startswith(("numpy.", "torch.")):
            name = f"{module}.{name}"
        yield Docstring(module, name, _string(text))


def _string(node: ast.expr) -> str:
    """Return the string that an expression of literals, ``+`` and ``.format`` stands for."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _string(left) + _string(right)
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            # The values are descriptions shared by many functions: they tell none apart.
            text = re.sub(r"(?<!\{)\{\w+\}(?!\})", "", _string(template))
            return text.replace("{{", "{").replace("}}", "}")
    return ""
