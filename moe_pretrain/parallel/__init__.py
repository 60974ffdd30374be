"""What makes the model parallel: process groups, the token exchange, and DeepSpeed's view of the experts."""
