"""The command line: keys, assembly, running.

Comes in: arguments and YAML. Goes out: a run, or one line that says what is wrong. Nothing slow is
imported before it is known what is asked for. A new key goes into ``keys`` (or is an argument of
``EmbeddingModule`` or ``EmbeddingDataModule``), a new command into ``dispatch``.

Read first: ``dispatch``, then ``trainer_cli`` (``keys`` in, ``assembly`` of the Trainer, run) or
``tool_commands``. May import from every room.
"""

from embedtune.cli.dispatch import main

__all__ = ["main"]
