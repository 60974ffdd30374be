"""Names and places that our tensors have in a folder of transformers: rows, halves and slices of them."""

from collections.abc import Callable, Iterator

from moe_pretrain.config.schema import Config
from moe_pretrain.huggingface.tensors import ExportedTensor
from moe_pretrain.moe.build import dense_width


def dense_widths(config: Config) -> list[int]:
    """Inner width of each layer's dense network; 0 for a layer with experts."""
    model = config.model
    of_twin = dense_width(model.moe, config.router) if config.router.dense_experts else 0
    return [of_twin if model.moe.is_moe_layer(k) else model.ffn_hidden_size for k in range(model.num_layers)]


def ends(config: Config) -> Iterator[ExportedTensor]:
    """Embedding, last norm and head."""
    model = config.model
    matrix = [model.vocab_size, model.hidden_size]
    yield ExportedTensor("model.embed_tokens.weight", matrix, "embedding.weight")
    yield ExportedTensor("model.norm.weight", [model.hidden_size], "norm.weight")
    if not model.tie_embeddings:
        yield ExportedTensor("lm_head.weight", matrix, "head.weight")


def layers(config: Config, feed_forward: Callable[[int], Iterator[ExportedTensor]]) -> Iterator[ExportedTensor]:
    """Norms, attention and feed-forward network of every layer."""
    model = config.model
    hidden, head = model.hidden_size, model.attention_head_size
    attention_widths = {"q": model.attention_width, "k": model.key_value_width, "v": model.key_value_width}
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield ExportedTensor(f"{theirs}.input_layernorm.weight", [hidden], f"{ours}.attention_norm.weight")
        yield ExportedTensor(f"{theirs}.post_attention_layernorm.weight", [hidden], f"{ours}.feed_forward_norm.weight")
        start = 0
        for name, width in attention_widths.items():
            shape = [width, hidden]
            yield ExportedTensor(f"{theirs}.self_attn.{name}_proj.weight", shape, f"{ours}.attention.qkv_weight", start)
            start += width * hidden
        shape = [hidden, model.attention_width]
        yield ExportedTensor(f"{theirs}.self_attn.o_proj.weight", shape, f"{ours}.attention.out_weight")
        if model.qk_norm != "none":
            for name, own in (("q", "query"), ("k", "key")):
                shape = [head if model.qk_norm == "head" else attention_widths[name]]
                yield ExportedTensor(
                    f"{theirs}.self_attn.{name}_norm.weight", shape, f"{ours}.attention.{own}_norm.weight"
                )
        yield from feed_forward(layer)


def dense(config: Config, layer: int, prefix: str) -> Iterator[ExportedTensor]:
    """A dense network: gate and up are halves of one matrix of ours."""
    source, width = f"blocks.{layer}.feed_forward", dense_widths(config)[layer]
    return _swiglu(prefix, source, width, config.model.hidden_size, 1.0)


def shared(config: Config, layer: int, prefix: str, factor: float) -> Iterator[ExportedTensor]:
    """The shared experts, one network."""
    source = f"blocks.{layer}.feed_forward.shared_experts"
    return _swiglu(prefix, source, config.model.moe.shared_width, config.model.hidden_size, factor)


def _swiglu(prefix: str, source: str, width: int, hidden: int, factor: float) -> Iterator[ExportedTensor]:
    yield ExportedTensor(f"{prefix}.gate_proj.weight", [width, hidden], f"{source}.in_weight")
    yield ExportedTensor(f"{prefix}.up_proj.weight", [width, hidden], f"{source}.in_weight", width * hidden)
    yield ExportedTensor(f"{prefix}.down_proj.weight", [hidden, width], f"{source}.out_weight", factor=factor)


def router(config: Config, layer: int, name: str) -> ExportedTensor:
    """A router's matrix, never rounded."""
    shape = [config.model.moe.num_experts, config.model.hidden_size]
    return ExportedTensor(name, shape, f"blocks.{layer}.feed_forward.router.weight", is_rounded=False)


def experts(config: Config, layer: int, prefix: str, names: tuple[str, str, str]) -> Iterator[ExportedTensor]:
    """Gate, up and down of every expert: slices of two stacks of ours."""
    hidden, width = config.model.hidden_size, config.model.moe.expert_hidden_size
    source, size = f"blocks.{layer}.feed_forward.experts", hidden * width
    gate, up, down = names
    for expert in range(config.model.moe.num_experts):
        first = 2 * expert * size
        yield ExportedTensor(f"{prefix}.{expert}.{gate}.weight", [width, hidden], f"{source}.in_weight", first)
        yield ExportedTensor(f"{prefix}.{expert}.{up}.weight", [width, hidden], f"{source}.in_weight", first + size)
        yield ExportedTensor(f"{prefix}.{expert}.{down}.weight", [hidden, width], f"{source}.out_weight", expert * size)
