"""`mlxtune doctor --test`: whether this machine computes what it should, tried with a tiny model made on the spot."""
