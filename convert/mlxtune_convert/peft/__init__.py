"""PEFT adapter folders: their settings, names and tensors."""
