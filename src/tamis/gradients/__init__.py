"""Per-sample gradients of linear layers from one frozen forward and backward pass."""
