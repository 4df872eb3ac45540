"""What a run costs, and whether a model, a pool and a target fit together before anything is spent."""
