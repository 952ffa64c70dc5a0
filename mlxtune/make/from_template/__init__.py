"""Rows out of templates with slots, which are filled from lists, files or an engine."""
