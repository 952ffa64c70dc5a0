"""What trains: the layers of an adapter, attached to a model, saved and loaded."""
