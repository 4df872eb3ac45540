"""Results of long work on disk: safetensors shards, each self-verifying, and a manifest written last."""
