"""Schedules: batches, budget, learning rate, spikes. Plain numbers, no torch."""
