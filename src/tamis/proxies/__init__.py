"""Cheap copies of the user's model that rank data the same way, and the baselines that they have to beat."""
