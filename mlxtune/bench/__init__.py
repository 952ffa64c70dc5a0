"""Speed and memory of a training step on this machine, alone or against mlx-lm's own trainer."""
