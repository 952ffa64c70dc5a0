"""What the scores of two models on the same prompts can and cannot show: numpy alone, and no model."""
