"""Checkpoints: tensors as intervals of global arrays, written atomically, loadable on any topology."""
