"""Cost of a run, counted from the configuration."""
