"""Models: loading them from anywhere, the adapter on top, and the split between trunk and head."""
