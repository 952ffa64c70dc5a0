"""A conversation -> token ids, and the mask of what the model must produce."""

from mlxtune.data.chat.masking import render

__all__ = ["render"]
