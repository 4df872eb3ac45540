"""Choose and weight candidates inside the training loop, by the optimizer's own state."""
