"""File formats in and out, with numpy alone: no MLX, no model, no training.

A CUDA user can run this package by itself, as `mlxtune-convert`. Bytes are moved wherever the formats allow it; where a
format forces arithmetic, the function says how inexact the result is.
"""

__version__ = "0.1.0"  # of mlxtune and of mlxtune-convert: both distributions are made of this package
