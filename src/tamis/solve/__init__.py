"""Optimisation and regression on arrays: value, status and certificate out; no model, no disk, no settings."""
