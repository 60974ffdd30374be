"""Text to shards while training reads them."""
