"""What a run on preferences has beside one on rows: the reference, kto's baseline, the step's loss and numbers."""
