"""Variants against each other."""
