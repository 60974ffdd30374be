"""Combination of the outputs of a token's experts in an exported model, one module each."""
