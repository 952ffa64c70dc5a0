"""Preferences: which of two answers is better, or whether one is good, as a loss of log-probabilities."""
