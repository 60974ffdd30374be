"""``parallel.overlap_exchange``: half of the tokens travel while experts run the others; no number depends on it."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.builders import SEQUENCE, WITH_ALL_PARTS, tiny
from helpers.cuda_branches import says_cuda
from helpers.processes import run_on_ranks
from torch import Tensor

from moe_pretrain.config.preflight import plan_run, preflight
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.experts.swiglu import SwiGLUExperts
from moe_pretrain.moe.types import ExpertShard, float32_parameters
from moe_pretrain.parallel import exchange
from moe_pretrain.parallel.exchange import AllToAll
from moe_pretrain.verify.verify import verify

CASES = {
    "plain": (),
    "all parts, recomputed": (*WITH_ALL_PARTS, "model.recompute=full", "router.top_k=3"),
    "lists of any length": ("router=top_p", "router.threshold=0.6"),
    "some tokens without a route": ("router=expert_choice",),
    "payloads": ("router=autonomy", "router.gate_rank=8"),
    "payloads, any length": ("router=autonomy_top_p", "router.gate_rank=8", "model.recompute=full"),
    "experts asked first": ("router=attentive", "router.num_candidates=3", "router.key_size=6"),
    "two passes": ("router=thor",),
    "factorised": ("model.moe.gate_rank=8",),
    "unequal": ("experts=unequal", "model.moe.experts.pattern=[1,3]", "model.moe.num_experts=8"),
    "zero-computation": ("router=moe_plus_plus", "model.moe.num_shared_experts=1"),
    "matrix product": ("experts=matrix_product", "model.moe.experts.shared_gradient_dropout=0.4"),
    "compared": ("combine=orthogonal", "router.top_k=3", "model.moe.latent_size=8", "model.moe.latent_norm=true"),
    "merged": ("router=lory", "router.segment_tokens=3"),
}
WIDTHS = ("model.moe.expert_hidden_size=32", "model.moe.expert_width_multiple=8")
"""Of which grouped products take all."""
ROWS = 3
"""With an odd number of tokens where a sequence has one."""


def numbers(words: tuple[str, ...], dtype: torch.dtype, overlaps: bool, as_cuda: bool) -> dict[str, Tensor]:
    """Losses, uses and gradients of this rank's rows through a model whose experts are on all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    length = SEQUENCE if "router.segment_tokens=3" in words else SEQUENCE - 1
    config = tiny(*WIDTHS, *words, f"model.sequence_length={length}", rows=12)
    model = DecoderLM(config.model, config.router, ExpertShard(rank, size))
    initialise(model, 0)
    kept = {id(parameter) for parameter in float32_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    for layer in model.moe_layers():
        layer.exchange, layer.overlaps_exchange = AllToAll(dist.group.WORLD), overlaps
    ids = torch.randint(0, 64, (ROWS, length), generator=torch.Generator().manual_seed(rank))
    documents, positions = torch.zeros_like(ids), torch.arange(length).expand(ROWS, -1)
    documents[-1, -3:] = -1
    batch = MicroBatch(ids, ids.roll(-1, 1), documents, positions, torch.arange(ROWS) + rank * ROWS, 0)
    context = routing_context(batch, 0, 0, lambda layer, counts: counts.clone(), ids.numel())
    with says_cuda() if as_cuda else nullcontext():
        output = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        (output.loss_sum / ids.numel() + sum(output.aux.values(), torch.zeros(()))).backward()
    found = {"loss": output.loss_sum.detach(), **{name: value.detach() for name, value in output.aux.items()}}
    for index, use in enumerate(output.uses):
        found |= {f"use {index} {name}": value for name, value in vars(use).items() if value is not None}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(dtype: torch.dtype, as_cuda: bool) -> dict[str, dict[str, float]]:
    """Of each case and number, the distance of its values in halves from those of all tokens at once."""
    found = {}
    for name, words in CASES.items():
        whole, halves = (numbers(words, dtype, overlaps, as_cuda) for overlaps in (False, True))
        assert whole.keys() == halves.keys()
        assert any(key.endswith("_weight") and value.any() for key, value in halves.items())
        found[name] = {
            key: float((halves[key].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12))
            for key, value in whole.items()
        }
    return found


@pytest.mark.parametrize(
    ("dtype", "as_cuda", "most"),
    [
        pytest.param(torch.float32, False, 2e-6, id="cpu"),
        # Gradients of weights are rounded for each half, and once more where they are added.
        pytest.param(torch.bfloat16, True, 2**-6, id="branch of cuda"),
    ],
)
@pytest.mark.fast("cpu")
def test_halves_have_the_numbers_of_the_whole_within_rounding(dtype: torch.dtype, as_cuda: bool, most: float):
    """All losses, statistics and gradients; on a GPU with lists of routes that end in padding."""
    for of_rank in run_on_ranks(errors, 2, dtype, as_cuda):
        assert of_rank.keys() == CASES.keys()
        for case, own in of_rank.items():
            far = {name: error for name, error in own.items() if not error <= most}
            assert not far, f"{case}: {far}"
            first = {name: error for name, error in own.items() if name.startswith("use 0") and "sums" not in name}
            assert set(first.values()) == {0.0}, "the router of the first layer saw the whole micro-batch"


def order_of_events(*words: str) -> list[str]:
    """Messages begun and waited for, and experts run, in the passes of one layer."""
    seen: list[str] = []

    def noting(owner: type, method: str, name: str) -> mock._patch:
        real = getattr(owner, method)

        def call(*arguments: object) -> object:
            seen.append(name)
            return real(*arguments)

        return mock.patch.object(owner, method, call)

    backward = torch.Tensor.backward

    def noting_backward(loss: Tensor) -> None:
        seen.append("BACKWARD")
        backward(loss)

    with (
        noting(exchange._Message, "begin", "begin"),
        noting(exchange._Message, "finish", "wait"),
        noting(SwiGLUExperts, "forward", "experts"),
        mock.patch("moe_pretrain.moe.experts.swiglu.activation_gradients", _noted_gradients(seen)),
        mock.patch.object(torch.Tensor, "backward", noting_backward),
    ):
        numbers(("model.num_layers=1", "model.moe.num_experts=2", *words), torch.float32, True, False)
    return seen


def _noted_gradients(seen: list[str]) -> object:
    from moe_pretrain.moe.experts.activation import activation_gradients

    def call(*arguments: object) -> object:
        seen.append("experts backward")
        return activation_gradients(*arguments)

    return call


def test_forward_and_backward_half_of_the_rows_is_under_way_while_experts_run_the_others():
    """With one expert on each rank, of which each pass of the experts' node is one event."""
    forward = ["begin", "begin", "wait", "experts", "begin", "wait", "experts", "begin", "wait", "wait"]
    backward = [event.replace("experts", "experts backward") for event in forward]
    for seen in run_on_ranks(order_of_events, 2):
        assert seen == [*forward, "BACKWARD", *backward]


def _verified() -> list[tuple[int, list[str]]]:
    results = []
    for words in (("router=top_p", "router.threshold=0.6"), (*WITH_ALL_PARTS, "model.recompute=full")):
        parallel = ("parallel.processes=2", "parallel.expert_parallel_size=2", "parallel.overlap_exchange=always")
        config = tiny(*words, *parallel, rows=8, micro_batch_size=2)
        said: list[str] = []
        results.append((verify(config, plan_run(config, 2, ("cpu", "float32")), said.append), said))
    return results


def test_the_engine_in_halves_equals_the_oracle():
    for results in run_on_ranks(_verified, 2):
        for code, said in results:
            assert code == 0, said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("parallel.expert_parallel_size=1",), "nothing is exchanged"),
        (("router=smear",), "every token goes to all ranks at once"),
        (("engine.determinism=elastic", "batch.micro_batch_size=2"), "halves' gradients"),
    ],
)
def test_where_nothing_can_be_halved_asking_for_it_is_refused(words: tuple[str, ...], reason: str):
    asked = ("parallel.processes=2", "parallel.expert_parallel_size=2", "parallel.overlap_exchange=always")
    assert preflight(tiny(*asked), 2)
    with pytest.raises(ValueError, match=rf"^parallel.overlap_exchange=always must be auto or never .*{reason}"):
        preflight(tiny(*asked, *words), 2)


def test_by_itself_it_is_done_on_a_gpu_under_expert_parallelism():
    resolved = {}
    for mode in ("auto", "always", "never"):
        for size in (1, 2):
            words = ("parallel.processes=2", f"parallel.expert_parallel_size={size}")
            parallel = tiny(*words, f"parallel.overlap_exchange={mode}").parallel
            resolved[mode, size] = [parallel.overlaps_exchange(device) for device in ("cpu", "cuda")]
    assert resolved == {
        **dict.fromkeys([(mode, 1) for mode in ("auto", "always", "never")], [False, False]),
        **{("auto", 2): [False, True], ("always", 2): [True, True], ("never", 2): [False, False]},
    }
