"""Model card of an exported folder: the run's facts, and how to load it."""

import transformers

from moe_pretrain.config.trained import TrainedRun
from moe_pretrain.huggingface.architectures import Architecture
from moe_pretrain.model.size import model_size


def model_card(run: TrainedRun, architecture: Architecture, dtype: str, check: str) -> str:
    """Markdown of the card.

    Args:
        run: The run that was exported.
        architecture: The class that it became.
        dtype: Type of the weights.
        check: Sentence about the comparison of logits.
    """
    config, state, shape = run.config, run.state, run.config.model
    size = model_size(config.model, config.router)
    loss = (
        "not measured at this step" if state.validation_loss is None else f"{state.validation_loss:.4f} nats per token"
    )
    rules = {layer.router.evaluation_rule for layer in run.meta_model().moe_layers()} - {""}
    trust = ", trust_remote_code=True" if architecture.modelling_file else ""
    facts = {
        "run": config.run.name,
        "routing scheme": config.router.description,
        "parameters": f"{size.total_parameters:,} ({size.active_parameters:,.0f} active)",
        "layers, width, vocabulary": f"{shape.num_layers}, {shape.hidden_size}, {shape.vocab_size}",
        "steps, tokens": f"{state.step:,}, {'not recorded' if state.tokens is None else f'{state.tokens:,}'}",
        "validation loss": loss,
        "corpus": state.identity.corpus_fingerprint or "not recorded",
        "tokenizer": state.identity.tokenizer or "not recorded",
        "seed": config.seed,
        "class": f"`{architecture.name}`" + (" (remote code in this folder)" if trust else " (transformers' own)"),
        "weights": dtype,
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(state.identity.versions.items())),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    remarks = [
        architecture.note,
        _of_rounded_routers(architecture),
        *(f"Routing here is that of evaluation: {rule}." for rule in sorted(rules)),
    ]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, {config.router.name}]
---
# {config.run.name}

A decoder language model pretrained with moe_pretrain. It continues text; it was not taught to follow instructions.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

Check against the framework's own model: {check}.
{chr(10).join(["", *(remark for remark in remarks if remark)])}
"""


def _of_rounded_routers(architecture: Architecture) -> str:
    """A sentence where transformers rounds what decides routes as it loads it in bfloat16, else nothing."""
    if architecture.modelling_file is not None:
        return ""
    kept = getattr(transformers, architecture.name)._keep_in_fp32_modules_strict or ()
    exact = [tensor.name for tensor in architecture.tensors if not tensor.is_rounded]
    if all(any(part in name for part in kept) for name in exact):
        return ""
    return (
        "This class rounds its router to bfloat16 when it is loaded in that type, which training did not, and some "
        "tokens then go to other experts; loaded in float32 it keeps it."
    )
