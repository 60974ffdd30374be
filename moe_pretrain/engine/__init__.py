"""The training step: DeepSpeed's configuration, the optimizer, the objective and the engine around them."""
