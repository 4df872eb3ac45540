"""From scores to a selection: budgets, taking turns, and flags for rows that look wrong."""
