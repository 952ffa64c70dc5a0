"""Plots as SVG, drawn from numbers: no library, no script."""
