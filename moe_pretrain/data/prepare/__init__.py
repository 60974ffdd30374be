"""Text to shards, whole and ahead of training."""
