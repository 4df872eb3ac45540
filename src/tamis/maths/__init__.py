"""Tensors in, tensors out: no model, no disk, no settings."""
