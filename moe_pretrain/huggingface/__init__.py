"""Models to and from folders that transformers reads."""
