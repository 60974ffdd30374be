"""The folder of a run: what is where, written and read."""
