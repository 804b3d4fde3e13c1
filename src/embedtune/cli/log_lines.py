"""What is said on stderr: embedtune's own lines, and of the libraries' what a user can act on."""

import logging
import sys
import warnings

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from embedtune.cli.processes import launched_rank

log = logging.getLogger("embedtune")


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
    log.setLevel(logging.INFO if launched_rank() == 0 else logging.WARNING)
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
        ".*FSDP is switching to use `NO_SHARD`",
        ".*`load_state_dict` is deprecated and will be removed in future versions",  # the same
        ".*assuming the intent is to load in a single process",  # embedtune export: it is
        ".*`_get_pg_default_device` will be deprecated",
        ".*Multiple backends are registered with this ProcessGroup",
        ".*When saving the DeepSpeed Stage 3 checkpoint",  # embedtune export reads it
        ".*but have no logger configured",  # validate and test write a table and metrics.json
        ".*callbacks used to create the checkpoint need to be provided",  # as configured
        ".*The dirpath has changed from",  # the same
        ".*resuming from a checkpoint that ended before the epoch ended",  # the sampler goes on
    ):
        warnings.filterwarnings("ignore", message)
