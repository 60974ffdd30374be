"""Routers of an exported model, the rule of evaluation alone; one module for schemes with one rule."""
