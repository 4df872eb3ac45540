"""What a run found, as one page: ``content`` computes it, ``figures`` draws it, ``page`` writes it."""
