"""One micro-batch: its loss and gradients, computed with as little work and memory as they need."""
