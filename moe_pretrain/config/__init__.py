"""The configuration: its schema, composing it, loading it, refusing it early."""
