"""Rows of the run: the tokens of row n."""
