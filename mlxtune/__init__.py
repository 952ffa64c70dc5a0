"""mlxtune: convert, tune and ship language models on Apple silicon."""

from mlxtune_convert import __version__

from mlxtune.machine.backend import before_mlx

__all__ = ["__version__"]

before_mlx()
