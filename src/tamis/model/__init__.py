"""Loading models, choosing layers, losses and processes."""
