"""The command line: which command is asked for. What it needs is imported when it runs."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from embedtune import __version__
from embedtune.cli.mistakes import fail, nearest, surroundings_said
from embedtune.cli.processes import let_rank_0_speak
from embedtune.cli.signals import ended_by_signals
from embedtune.errors import ExportError, InputError, TrainingError

OVERVIEW = """\
usage: embedtune COMMAND ...

Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out.

  fit        train: embedtune fit --config run.yaml (any key also as a flag)
  validate   metrics on data.val_path, of a model or of a checkpoint (--ckpt_path)
  test       the same on data.test_path
  predict    embeddings of the queries of data.predict_path, as .npy
  export     a training checkpoint as a sentence-transformers folder
  teach      a teacher's embeddings of a data set, for distillation
  evaluate   nDCG@10 or Spearman correlation of models on test sets, at several widths
  cache      the tables of read and tokenised rows: list them, or clear them
  demo-data  training and test data from the docstrings of installed packages

embedtune COMMAND --help tells the options of a command, embedtune --version its version.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
TOOL_COMMANDS = {
    "export": "export_command",
    "teach": "teach_command",
    "evaluate": "evaluate_command",
    "cache": "cache_command",
    "demo-data": "demo_data_command",
}
"""Functions of ``embedtune.cli.tool_commands``."""
OPTIONS = ("--help", "--version")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that ``argv`` (by default the process's own arguments) asks for."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW)
    elif args[0] == "--version":
        sys.stdout.write(f"embedtune {__version__}\n")
    elif args[0] in TRAINER_COMMANDS or args[0] in TOOL_COMMANDS:
        sys.path.append(str(Path.cwd()))  # a loss of the user's own, named by its import path
        with ended_by_signals():
            _run(args)
    else:
        known = (*TRAINER_COMMANDS, *TOOL_COMMANDS)
        near = nearest(args[0], OPTIONS if args[0].startswith("-") else known)
        hint = f"; the nearest is {near}" if near else ""
        fail(f"expected a command ({', '.join(known)}), found {args[0]!r}{hint}")


def _run(args: list[str]) -> None:
    command, *rest = args
    # Chunks of many sizes would leave holes that no later one fits; read by torch when it starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if command in TRAINER_COMMANDS:
            import_module("embedtune.cli.trainer_cli").trainer_command(args)
        else:
            tools = import_module("embedtune.cli.tool_commands")
            getattr(tools, TOOL_COMMANDS[command])(rest)
    except InputError as error:
        fail(str(error))
    except (ExportError, TrainingError) as error:
        fail(str(error), code=1)
    except Exception as error:
        said = surroundings_said(error)
        if said is not None:
            fail(said)
        let_rank_0_speak()
        raise
