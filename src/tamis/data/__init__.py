"""From the user's files to token ids: reading, rendering, duplicates, batches. No model and no gradient in here."""
