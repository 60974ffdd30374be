"""Expert modules and the grouped matrix products under them."""
