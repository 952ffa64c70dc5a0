"""One loop: batches in, an adapter out, and every event on the way written down."""
