"""When and how much: batches, budget, learning rate, spikes. Plain numbers, no torch."""
