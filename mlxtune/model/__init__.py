"""Models: loaded from anywhere, converted, and corrected to compute what transformers computes."""
