"""Configurations of other programs, read as ones of ours: what maps, what changes its meaning, what has no place."""
