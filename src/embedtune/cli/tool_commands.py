"""The commands beside training: their arguments are read before anything slow is imported."""

import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from embedtune.cli.parser import Parser
from embedtune.whole_files import refuse_in_the_way

log = logging.getLogger("embedtune")


def _start() -> None:
    from embedtune.cli.log_lines import quiet_libraries

    quiet_libraries()


def export_command(argv: Sequence[str]) -> None:
    """Run ``embedtune export CHECKPOINT OUT``."""
    parser = Parser(prog="embedtune export", description="Export a training checkpoint.")
    parser.add_argument("checkpoint", type=str, help="a .ckpt file or folder of a fit")
    parser.add_argument("out", type=str, help="where the sentence-transformers folder goes")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="run code that the base model brings along",
    )
    parser.add_argument(
        "--model_name_or_path",
        type=str | None,
        default=None,
        help="where the base model is now; by default where the checkpoint says",
    )
    args = parser.parse_args(argv)
    _start()
    from embedtune.export import export_checkpoint

    difference = export_checkpoint(
        Path(args.checkpoint), Path(args.out), args.trust_remote_code, args.model_name_or_path
    )
    log.info("exported and verified %s (largest difference %.1e)", args.out, difference)


def teach_command(argv: Sequence[str]) -> None:
    """Run ``embedtune teach --model T --data f.jsonl --out store``."""
    parser = Parser(
        prog="embedtune teach",
        description="Embed every distinct query, positive and negative of data with a teacher.",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="the teacher: hub name or folder of a model"
    )
    parser.add_argument(
        "--data", type=str | list[str], required=True, help="jsonl files of any format, or a glob"
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    parser.add_argument(
        "--prompt", type=str, default="", help="prepended to each text for the teacher alone"
    )
    parser.add_argument("--max_len", type=int, default=512, help="longest text in tokens")
    parser.add_argument("--batch_size", type=int, default=64, help="texts that are encoded at once")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="run code that the teacher brings along",
    )
    args = parser.parse_args(argv)
    _start()
    from embedtune.tools.teach import teach

    teach(**args.as_dict())


def evaluate_command(argv: Sequence[str]) -> None:
    """Run ``embedtune evaluate MODEL.. --data D..``."""
    parser = Parser(
        prog="embedtune evaluate",
        description="Measure models on test sets, and compare them with the first one.",
    )
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
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="run code that the models bring along",
    )
    args = parser.parse_args(argv)
    _start()
    from embedtune.data.testsets import open_testset
    from embedtune.models.projection import parse_dims
    from embedtune.reports import require_matplotlib

    if args.out is not None:  # hours may pass before it is written to
        refuse_in_the_way(Path(args.out), f"{args.out}: expected a folder to write to")
        require_matplotlib()
    dims = None if args.dims is None else parse_dims(args.dims, "dims")
    data = {path: open_testset(Path(path)) for path in args.data}
    _evaluate(args, data, dims)


def _evaluate(args: Any, data: Any, dims: list[int] | None) -> None:
    """Tell what was measured, before a model that fails, too: it may be hours."""
    from embedtune.evaluation import Result, evaluate_models
    from embedtune.reports import format_table, write_results

    results: list[Result] = []
    try:
        evaluate_models(args.models, data, dims, args.trust_remote_code, results)
    finally:
        if results:
            sys.stdout.write(format_table(results) + "\n")
        if results and args.out is not None:
            write_results(results, Path(args.out))


def cache_command(argv: Sequence[str]) -> None:
    """Run ``embedtune cache``."""
    parser = Parser(
        prog="embedtune cache",
        description="List the tables of read and tokenised rows, the last one used first.",
    )
    parser.add_argument("--clear", type=bool, default=False, help="remove them all")
    args = parser.parse_args(argv)
    _start()
    from embedtune.data.cache import GB, cache_folder, cached_tables, remove_table

    tables = cached_tables()
    for table in tables:
        used = datetime.fromtimestamp(table.used).strftime("%Y-%m-%d %H:%M")
        sys.stdout.write(f"{table.size / GB:9.3f} GB  {used}  {table.path.name}\n")
        if args.clear:
            remove_table(table)
    total = sum(table.size for table in tables)
    said = "removed from" if args.clear else "in"
    sys.stdout.write(f"{total / GB:9.3f} GB  {len(tables)} tables {said} {cache_folder()}\n")


def demo_data_command(argv: Sequence[str]) -> None:
    """Run ``embedtune demo-data --out DIR``."""
    parser = Parser(prog="embedtune demo-data", description="Harvest pairs from docstrings.")
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    _start()
    from embedtune.tools.demo_data import harvest

    log.info("wrote %s: %s", args.out, harvest(Path(args.out)))
