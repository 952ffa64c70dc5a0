"""How good a model is: loss on held-out rows, and the answers it gives."""
