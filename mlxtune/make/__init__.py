"""Making data: rows to train on, by a model, with a word on where each comes from."""
