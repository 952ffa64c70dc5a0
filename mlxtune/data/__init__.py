"""Rows of any format -> token ids with a mask of what the model must produce -> batches."""
