"""One routing scheme, property by property."""
