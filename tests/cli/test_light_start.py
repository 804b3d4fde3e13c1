"""Help, the version and a typo are answered without importing torch and its kin."""

import subprocess
import sys

import pytest

import embedtune

HEAVY = ("torch", "lightning", "transformers", "sentence_transformers", "datasets", "numpy")
CODE = """
import sys
from embedtune.cli import main
try:
    main(sys.argv[1:])
finally:
    loaded = [name for name in {heavy} if name in sys.modules]
    assert not loaded, loaded
"""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE.format(heavy=HEAVY), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 0, "usage: embedtune COMMAND"),
        (["--help"], 0, "usage: embedtune COMMAND"),
        (["--version"], 0, f"embedtune {embedtune.__version__}"),
        (["vlaidate"], 2, "found 'vlaidate'; the nearest is validate"),
        (["--verison"], 2, "found '--verison'; the nearest is --version"),
        (["qqq"], 2, "export, teach, evaluate, cache, demo-data), found 'qqq'\n"),
        (["teach", "--modle", "a"], 2, "--modle a; the nearest valid key is model"),
        (["export", "a", "--otu", "b"], 2, "nearest valid key is out"),
        (["evaluate", "--help"], 0, "usage: embedtune evaluate"),
        (["demo-data"], 2, "out"),
        (["cache", "--claer", "true"], 2, "nearest valid key is clear"),
    ],
)
def test_it_is_answered_at_once(argv, code, said):
    done = run(*argv)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stdout + done.stderr


def test_teach_takes_the_arguments_of_its_function():
    from inspect import signature

    from embedtune.tools.teach import teach

    told = " ".join(run("teach", "--help").stdout.split())
    for name, parameter in signature(teach).parameters.items():
        assert f"--{name} " in told, name
        if parameter.default not in (parameter.empty, ""):
            assert f"default: {parameter.default}" in told, name
