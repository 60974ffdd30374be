"""Parallelism of the model: process groups, the token exchange, and DeepSpeed's view of the experts."""
