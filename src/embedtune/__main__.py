"""Let ``python -m embedtune`` be the command line."""

from embedtune.cli import main

main()
