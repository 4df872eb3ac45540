"""The parts of Influence Distillation: landmarks, what carries their scores to other rows, and what that is worth."""
