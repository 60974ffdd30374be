"""The decoder that surrounds the MoE layers."""
