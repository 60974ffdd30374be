"""Processes, signals, locks and files: what the operating system is asked for."""
