"""`python -m mlxtune` is the installed `mlxtune` command."""

from mlxtune.cli import main

main()
