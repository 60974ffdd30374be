"""One file per routing scheme: its configuration and its module."""
