"""Plain fine-tuning and its checkpoints."""
