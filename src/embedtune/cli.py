"""The command line: Trainer commands by LightningCLI, the others as plain functions."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from embedtune import gather
from embedtune.errors import InputError
from embedtune.export import ExportError, export_checkpoint
from embedtune.parser import Parser, fail
from embedtune.projection import parse_dims
from embedtune.teach import teach
from embedtune.trainer_cli import TRAINER_COMMANDS, trainer_command

log = logging.getLogger("embedtune")

OVERVIEW = """\
usage: embedtune COMMAND ...

Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out.

  fit        train: embedtune fit --config run.yaml (any key also as a flag)
  validate   loss on data.val_path, of a model or of a checkpoint (--ckpt_path)
  test       the same on data.test_path
  predict    embeddings of the queries of data.predict_path, as .npy
  export     a training checkpoint as a sentence-transformers folder
  teach      a teacher's embeddings of a data set, for distillation
  evaluate   nDCG@10 or Spearman correlation of models on test sets, at several widths
  demo-data  training and test data from the docstrings of installed packages

embedtune COMMAND --help tells the options of a command.
"""


# --- Commands without a Trainer ---------------------------------------------------------


def export_command(argv: Sequence[str]) -> None:
    """Run ``embedtune export CHECKPOINT OUT``."""
    parser = Parser(prog="embedtune export", description="Export a training checkpoint.")
    parser.add_argument("checkpoint", type=str, help="a .ckpt file or folder of a fit")
    parser.add_argument("out", type=str, help="where the sentence-transformers folder goes")
    args = parser.parse_args(argv)
    difference = export_checkpoint(Path(args.checkpoint), Path(args.out))
    log.info("exported and verified %s (largest difference %.1e)", args.out, difference)


def teach_command(argv: Sequence[str]) -> None:
    """Run ``embedtune teach --model T --data f.jsonl --out store``."""
    parser = Parser(prog="embedtune teach")
    parser.add_function_arguments(teach)
    teach(**parser.parse_args(argv).as_dict())


def evaluate_command(argv: Sequence[str]) -> None:
    """Run ``embedtune evaluate MODEL.. --data D..``."""
    from embedtune.evaluate import evaluate_models, format_table, write_results
    from embedtune.testsets import open_testset

    parser = Parser(prog="embedtune evaluate", description="Compare models on test sets.")
    parser.add_argument("models", type=str, nargs="+", help="hub names or folders")
    parser.add_argument(
        "--data",
        type=str,
        nargs="+",
        required=True,
        help="test sets: BEIR folders (split test), their qrels/SPLIT.tsv, scored jsonl files",
    )
    parser.add_argument("--dims", type=str, default=None, help="widths, such as 384,128,64")
    parser.add_argument(
        "--out", type=str, default=None, help="folder for evaluation.json and a chart"
    )
    args = parser.parse_args(argv)
    dims = None if args.dims is None else parse_dims(args.dims, "dims")
    data = {path: open_testset(Path(path)) for path in args.data}
    results = evaluate_models(args.models, data, dims)
    sys.stdout.write(format_table(results) + "\n")
    if args.out is not None:
        write_results(results, Path(args.out))


def demo_data_command(argv: Sequence[str]) -> None:
    """Run ``embedtune demo-data --out DIR``."""
    from embedtune.demo import harvest

    parser = Parser(prog="embedtune demo-data", description="Harvest pairs from docstrings.")
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    log.info("wrote %s: %s", args.out, harvest(Path(args.out)))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "export": export_command,
    "teach": teach_command,
    "evaluate": evaluate_command,
    "demo-data": demo_data_command,
}


class LinesAboveProgress(logging.Handler):
    """Write log lines to stderr without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line above the bar."""
        tqdm.write(self.format(record), file=sys.stderr)


def quiet_libraries() -> None:
    """Let embedtune's own lines through, and of the libraries what a user can act on."""
    logging.basicConfig(
        format="%(message)s", level=logging.WARNING, handlers=[LinesAboveProgress()]
    )
    log.setLevel(logging.INFO if gather.launched_rank() == 0 else logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Said whenever deepspeed is installed and imported, by transformers, on a CPU.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    disable_progress_bar()  # of loading and saving weights
    for message in (
        ".*does not have many workers",  # num_workers is documented where it is set
        ".*It is recommended to use `self.log.'val/.*sync_dist=True",  # every rank has the whole
        ".*Total length of `list` across ranks is zero",  # no validation set
        ".*custom batch sampler .GlobalBatchSampler. for prediction",  # it returns all
        ".*isinstance.treespec, LeafSpec.",  # Lightning with a newer torch
        ".*Checkpoint directory .* exists and is not empty",  # a run folder is run in again
        ".*Experiment logs directory .* exists and is not empty",
        ".*`torch.distributed..* is deprecated",  # DeepSpeed with a newer torch
        ".*DTensor instead and we are deprecating ShardedTensor",  # FSDP with a newer torch
        ".*When using ``NO_SHARD``",  # FSDP on one rank: the whole weights are wanted
        ".*assuming the intent is to load in a single process",  # embedtune export: it is
        ".*`_get_pg_default_device` will be deprecated",
        ".*Multiple backends are registered with this ProcessGroup",
        ".*When saving the DeepSpeed Stage 3 checkpoint",  # embedtune export reads it
        ".*resuming from a checkpoint that ended before the epoch ended",  # the sampler goes on
    ):
        warnings.filterwarnings("ignore", message)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that ``argv`` (by default the process's own arguments) asks for."""
    args = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    sys.path.append(str(Path.cwd()))  # a loss of the user's own, named by its import path
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW)
        return
    command, rest = args[0], args[1:]
    try:
        if command in TRAINER_COMMANDS:
            trainer_command(args)
        elif command in COMMANDS:
            COMMANDS[command](rest)
        else:
            known = ", ".join((*TRAINER_COMMANDS, *COMMANDS))
            fail(f"expected a command ({known}), found {command!r}")
    except InputError as error:
        fail(str(error))
    except ExportError as error:
        fail(str(error), code=1)
    except Exception:
        gather.let_rank_0_speak()
        raise
