"""A model's tokenizer and its chat template: what it prints, how it is run, which one a run uses."""
