"""mlxtune: convert, tune and ship language models on Apple silicon."""

from mlxtune.backend import before_mlx

__version__ = "0.1.0"

before_mlx()
