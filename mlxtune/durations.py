"""Spans of time, for people."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """2:05:09 or 5:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def in_words(seconds: float) -> str:
    """75 seconds or 3 minutes, for a sentence."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
