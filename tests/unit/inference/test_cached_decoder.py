"""The cached decoder gives the logits of the model on the whole text, for every scheme and however it is fed."""

import pytest
import torch
from helpers.builders import tiny
from helpers.schemes import CASES, MERGED
from helpers.trained import model_of
from torch import Tensor

from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.huggingface.check import our_logits
from moe_pretrain.inference.cached_decoder import CachedDecoder, check_generates
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.moe.routers.top_k import TopKRouter

WORDS = [*(words for cases in CASES.values() for words in cases), *MERGED]
LENGTH = 15


def build(*words: str) -> tuple[Config, DecoderLM, Tensor]:
    config = tiny("model.sequence_length=16", "batch.global_batch_tokens=256", "budget.tokens=768", *words)
    return config, model_of(config), torch.randint(1, config.model.vocab_size, (2, LENGTH))


def fed(decoder: CachedDecoder, ids: Tensor, *sizes: int) -> Tensor:
    return torch.cat([decoder.feed(part) for part in ids.split(list(sizes), dim=1)], dim=1)


@pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words)[:100])
def test_logits_are_those_of_the_whole_text(words: tuple[str, ...]):
    _, model, ids = build(*words)
    whole = our_logits(model, ids)
    for sizes in ([LENGTH], [1] * LENGTH, [6, 1, 5, 1, 2]):
        found = fed(CachedDecoder(model, 2, LENGTH), ids, *sizes)
        torch.testing.assert_close(found, whole, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["top_k", "loss_free", "quantile", "sinkhorn"])
def test_the_first_ranks_are_the_schemes_own_choice(scheme: str):
    words = {"sinkhorn": [], "loss_free": ["router.weight_scale=2.5"]}.get(scheme, [])
    _, model, ids = build(f"router={scheme}", "model.moe.num_experts=6", "router.top_k=3", *words)
    with recorded_routings(model) as own:
        whole = our_logits(model, ids)
    ranked = fed(CachedDecoder(model, 2, LENGTH, (0, 1, 2)), ids, 8, 7)
    if scheme == "sinkhorn":  # its weights are raw
        assert not torch.allclose(ranked, whole, atol=1e-3)
    else:
        assert own and torch.equal(ranked, fed(CachedDecoder(model, 2, LENGTH), ids, 8, 7))


@pytest.mark.parametrize(
    "words",
    [
        ("router=top_k",),
        ("router=loss_free", "model.moe.num_shared_experts=1", "model.moe.shared_expert_hidden_size=8"),
        ("router=top_p",),
        ("router=relu",),
        ("router=expert_choice",),
        ("router=expert_threshold",),
        ("router=autonomy", "router.gate_rank=6"),
        ("router=autonomy", "router.gate_rank=6", "router.gate_activation=recomputed"),
        ("router=attention_importance",),
    ],
    ids=lambda words: "-".join(words),
)
def test_one_rank_is_one_expert_with_weight_1(words: tuple[str, ...]):
    """The second-best expert of every token, by the model's own layer on the routes of a loop over tokens."""
    _, model, ids = build(*words)
    ranks = (1,)
    found = CachedDecoder(model, 2, LENGTH, ranks).feed(ids)
    chosen: list[Tensor] = []

    def by_hand(layer, inputs, output):
        hidden, context, _ = inputs
        ranking = layer.router.ranking(hidden, context)
        rows = []
        for token, scores in enumerate(ranking.scores.tolist()):
            expert = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[1]
            chosen.append(torch.tensor(expert))
            row, experts = hidden[token], layer.experts
            if ranking.payload is None:
                gate, up = (experts.in_weight[expert] @ row).chunk(2)
            else:
                gate = experts.up_weight[expert] @ (layer.router.down_weight[expert] @ row)
                up = experts.in_weight[expert] @ row
            rows.append(experts.out_weight[expert] @ (torch.nn.functional.silu(gate) * up))
        expected = torch.stack(rows)
        if layer.shared_experts is not None:
            expected = expected + layer.shared_experts(hidden)
        torch.testing.assert_close(output.hidden, expected, atol=1e-5, rtol=1e-4)

    handles = [layer.register_forward_hook(by_hand) for layer in model.moe_layers()]
    with torch.no_grad():
        again = CachedDecoder(model, 2, LENGTH, ranks).feed(ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(again, found)
    assert len(chosen) == 2 * ids.numel() and len({int(expert) for expert in chosen}) > 1
    if isinstance(model.moe_layers()[0].router, TopKRouter):
        assert not torch.allclose(found, our_logits(model, ids), atol=1e-3)


def test_a_scheme_that_looks_ahead_does_not_generate():
    _, model, _ = build("router=attention_importance", "router.importance=received", "router.allow_non_causal=true")
    with pytest.raises(ConfigError, match="depend on later tokens, which do not exist yet"):
        check_generates(model, "attention_importance")
    assert check_generates(build("router=top_k")[1], "top_k") is None
    assert "threshold" in (check_generates(build("router=expert_choice")[1], "expert_choice") or "")
