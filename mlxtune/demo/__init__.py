"""The embedded example: a small model, a small data set, and the whole road from one to the other."""
