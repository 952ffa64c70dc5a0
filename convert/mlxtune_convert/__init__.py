"""File formats in and out, with numpy alone: no MLX, no model, no training.

A CUDA user can run this package by itself. Bytes are moved wherever the formats allow it; where a
format forces arithmetic, the function says how inexact the result is.
"""
