"""Sweeps: one command, many runs, each as processes of its own; killed anywhere, the same command goes on."""
