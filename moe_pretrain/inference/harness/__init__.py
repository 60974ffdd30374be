"""EleutherAI's lm-evaluation-harness on the framework's own model; ``lm_eval`` is an optional extra."""
