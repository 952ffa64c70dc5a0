"""The examples of a run: found, tokenized once, held out, mixed, and dealt into batches."""
