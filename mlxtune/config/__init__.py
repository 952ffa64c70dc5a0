"""The configuration of a run: every key with its default, unit and meaning, and how a file of them is read."""
