"""Which of two answers is better, by a model that has passed an exam, or by a person."""
