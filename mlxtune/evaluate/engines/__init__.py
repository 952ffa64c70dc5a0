"""Ways to get answers: a model here, a server on this machine, or answers that were recorded."""
