"""How much memory a run will need, told from graphs before anything is computed."""
