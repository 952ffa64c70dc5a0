"""Hugging Face model folders: names of tensors, settings, and the files beside the weights."""
