"""`python -m mlxtune_convert` is the installed `mlxtune-convert` command."""

from mlxtune_convert.cli import main

if __name__ == "__main__":
    main()
