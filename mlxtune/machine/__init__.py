"""The machine under a run: its device and surroundings, its GPU's errors, and the facts that `mlxtune doctor` shows."""
