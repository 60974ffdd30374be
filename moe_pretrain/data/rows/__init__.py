"""Which tokens make row n of the run."""
