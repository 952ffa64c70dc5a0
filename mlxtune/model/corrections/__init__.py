"""mlx-lm's model of a family made to compute what transformers computes."""
