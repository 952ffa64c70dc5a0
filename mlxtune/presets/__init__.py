"""Settings for a machine, a model and some rows: the fastest that fit, and known models to choose from."""
