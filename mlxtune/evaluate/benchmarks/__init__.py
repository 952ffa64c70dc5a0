"""Known benchmarks: EleutherAI's lm_eval has the tasks and their metrics, this house has the model."""
