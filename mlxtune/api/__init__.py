"""The Python API: tune, evaluate, export and render, as the commands of those names do."""
