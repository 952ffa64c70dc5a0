"""What went wrong with the answers of a tuned model, measured, each with its likely cause and the key to turn."""
