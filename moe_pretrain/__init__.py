"""Pretraining of mixture-of-experts language models in which the routing scheme is a one-word choice."""
