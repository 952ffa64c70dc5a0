"""An evaluation on the disk: the scores of two models on the same prompts, and what they show."""
