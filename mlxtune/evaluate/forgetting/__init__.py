"""What a model lost by being tuned: how far it drifted from its base on what nobody tuned it for."""
