"""Checks for a suite, inferred from training answers: what holds for nearly all of them should hold for a model's."""
