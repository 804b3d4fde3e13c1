"""The commands beside training, as functions.

Comes in: files and names. Goes out: files. A new command goes here, as a function with arguments
that Python callers can give too; its arguments on the command line go into ``cli.tool_commands``.

Nothing is imported here, for some of them need neither torch nor a model.

Read first: ``teach`` (a teacher's embeddings of a data set). Imports from every room below
``callbacks``.
"""
