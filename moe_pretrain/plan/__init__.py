"""What a run would cost, counted from the configuration."""
