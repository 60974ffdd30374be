"""What a CUDA device would be asked to do, counted without one: kernels, bytes, memory, host synchronisations.

CPU tensors that say ``is_cuda`` take the CUDA branches of the model, with real numbers. As FakeTensors, which have no
storage, they do so at the size of a real run. What only a GPU has stands in: FlexAttention and compiled regions are one
kernel each.
"""

import collections
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_pretrain
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model import attention, cross_entropy, norms
from moe_pretrain.model.decoder import DecoderLM, LMOutput
from moe_pretrain.moe import compiled, dispatch
from moe_pretrain.moe.kernels import priced_kernels
from moe_pretrain.moe.types import ExpertShard, float32_parameters
from moe_pretrain.parallel.exchange import AllToAll

_PACKAGE = str(Path(moe_pretrain.__file__).parent) + "/"
_AUTOGRAD = "autograd"
"""Site of what no line of ours has asked for: the backward passes of torch's own operations."""


def call_site() -> str:
    """File and function of the innermost frame of the package."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.endswith("moe/compiled.py"):
            return f"{name.removeprefix(_PACKAGE)} {frame.f_code.co_name}"
        frame = frame.f_back
    return _AUTOGRAD


def _dense_flex(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, enable_gqa: bool) -> Tensor:
    """FlexAttention of rows of one document each."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)


@contextmanager
def says_cuda(
    flex: Callable[..., Tensor] = _dense_flex,
    region: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Iterator[None]:
    """Every tensor says ``is_cuda``; ``flex`` and ``region`` stand in for what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Tensor, FakeTensor):
            patch.setattr(kind, "is_cuda", property(lambda own: True))
        patch.setattr(attention, "_compiled_flex_attention", lambda: flex)
        patch.setattr(compiled, "compiled", region)
        yield


# ------------------------------------------------------------------------------------------ host synchronisations

_WAITING_METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "new_tensor")
"""``new_tensor`` copies from pageable memory to the device, and waits until that has been done."""
_WAITING_OPERATIONS = {
    *("nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim", "equal"),
    *("_linalg_check_errors", "_local_scalar_dense"),
}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, by what it calls and where: ``found[name, site]``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()
        self._patch = pytest.MonkeyPatch()
        self._inside = False

    def __enter__(self) -> "Waits":
        for name in _WAITING_METHODS:
            self._patch.setattr(Tensor, name, self._watched(name, getattr(Tensor, name)))
        for name in ("tensor", "as_tensor"):
            self._patch.setattr(torch, name, self._made(name, getattr(torch, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _note(self, name: str) -> None:
        if not self._inside and (site := call_site()) != _AUTOGRAD:
            self.found[name, site] += 1

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(name)
            was, self._inside = self._inside, True
            try:
                return method(tensor, *args, **kwargs)
            finally:
                self._inside = was

        return call

    def _made(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def call(values: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and not isinstance(values, Tensor):  # copied there, as ``new_tensor``
                self._note(name)
            return make(values, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        waits = name in _WAITING_OPERATIONS
        if name == "repeat_interleave":
            waits = (kwargs or {}).get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        if waits:
            self._note(name)
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------ kernels and memory


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        phase: ``forward`` or ``backward``.
        site: See ``call_site``.
        name: Operation.
        bytes: Read and written.
        flops: Of a product.
    """

    phase: str
    site: str
    name: str
    bytes: int
    flops: int = 0


_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "new_empty", "device", "item", "rename"}


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors; what is expanded is read once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            read = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
            total += tensor.element_size() * math.prod(read)
    return total


class Account(TorchDispatchMode):
    """Counts kernels and what lives; ``peak`` is the most bytes at a time, ``live`` maps storages to bytes and site."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.kernels: list[Kernel] = []
        self.live: dict[int, tuple[int, str]] = {}
        self.current = self.peak = 0
        self._inside_region = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._inside_region:
            return out
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outs:
            self.hold(tensor)
        name = func._schema.name.split("::")[-1]
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if outs and not is_view and name not in _NO_KERNEL and not name.startswith(("empty", "sym_")):
            ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._launch(name, ins, outs)
        return out

    def _launch(self, name: str, ins: list[Tensor], outs: list[Tensor]) -> None:
        moved = nbytes(ins) + nbytes(outs)
        if name.startswith(("zero", "fill", "masked_fill")):
            moved = nbytes(ins[1:]) + nbytes(outs)
        if name.startswith(("new_", "zeros_like", "ones_like", "full_like")):  # of the tensor only its shape is read
            moved = nbytes(outs)
        if name in ("index_select", "index", "gather", "embedding"):  # as many of the source's as come out
            moved = 2 * nbytes(outs) + nbytes(ins[1:])
        if name in ("scatter_", "scatter_add_", "index_put_"):  # in place: only where the index says
            moved = 3 * nbytes(ins[1:])
        if name == "copy_":
            moved = nbytes(ins[1:]) + nbytes(outs)
        flops = 0
        if name in ("mm", "addmm", "bmm", "_grouped_mm"):
            left, right = ins[:2] if name == "_grouped_mm" else ins[-2:]
            flops = 2 * left.numel() * right.shape[-1]
        self.kernels.append(Kernel(self.phase, call_site(), name, moved, flops))

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed; rounded up as CUDA's allocator does."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = -(-storage.nbytes() // 512) * 512
        self.live[key] = size, call_site()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current -= self.live.pop(key)[0]

    @contextmanager
    def region(self) -> Iterator[None]:
        """What runs in here is part of one kernel, and holds nothing."""
        was, self._inside_region = self._inside_region, True
        try:
            yield
        finally:
            self._inside_region = was

    def one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as one launch that reads its arguments and writes its results once; so its backward pass."""
        name = function.__name__

        class Region(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                ctx.args = args
                return self._launch_region(name, function, args)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                return self._launch_region(f"{name} backward", functools.partial(_again, function), (ctx.args, grads))

        def call(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in args):
                return Region.apply(*args)
            return self._launch_region(name, function, args)

        return call

    def _launch_region(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self.region():
            out = function(*args)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outs:
            self.hold(tensor)
        ins = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        moved = nbytes(ins) + nbytes(outs)
        if name == "scaled_rows":  # as much of the sources as comes out
            moved += nbytes(outs) - nbytes(ins[:1])
        self.kernels.append(Kernel(self.phase, call_site(), name, moved))
        if name == "_normed_sum_gradients":  # the weight's is a sum over rows: another pass over two of them
            self.kernels.append(Kernel(self.phase, call_site(), f"{name} weight", nbytes((args[0], args[2]))))
        return out

    def total(self, of: Callable[[Kernel], bool] = lambda kernel: True) -> tuple[int, int]:
        """Number of kernels without products, and their bytes."""
        found = [kernel for kernel in self.kernels if not kernel.flops and of(kernel)]
        return len(found), sum(kernel.bytes for kernel in found)


def _again(function: Callable[..., Any], args: Any, grads: Any) -> Any:
    """Gradients of the arguments of ``function``, None for those without."""
    has = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in args]
    with torch.enable_grad():
        own = [leaf.detach().requires_grad_() if needs else leaf for leaf, needs in zip(args, has, strict=True)]
        outs = tree_leaves(function(*own))
    given = [(out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
    wanted = [leaf for leaf, needs in zip(own, has, strict=True) if needs]
    found = iter(torch.autograd.grad([out for out, _ in given], wanted, [grad for _, grad in given]))
    return tuple(next(found) if needs else None for needs in has)


def _flex(account: Account) -> Callable[..., Tensor]:
    """FlexAttention as its kernels: one forward, two backward."""

    class Flex(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = torch.empty_like(query)
            log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, out, log_sums)
            pairs = query.numel() * query.shape[2]  # half of them are masked, and there are two products
            note("flex_attention", (query, key, value, out, log_sums), 2 * pairs)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            query, key, value, out, log_sums = ctx.saved_tensors
            made = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
            delta = torch.empty_like(log_sums)
            note("flex_attention_delta", (out, grads[0], delta), 0)
            pairs = query.numel() * query.shape[2]
            note("flex_attention_backward", (query, key, value, grads[0], log_sums, delta, *made), 5 * pairs)
            return made

    def note(name: str, moved: tuple[Tensor, ...], flops: int) -> None:
        account.kernels.append(Kernel(account.phase, "model/attention.py attend", name, nbytes(moved), flops))

    return lambda query, key, value, block_mask, enable_gqa: Flex.apply(query, key, value)


def _rms_norm(account: Account) -> Callable[..., Tensor]:
    """``rms_norm`` as CUDA has it: one kernel that keeps its input, two backward."""

    def norm(hidden: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
        return _norm(account, False)(hidden, None, hidden.new_empty(shape) if weight is None else weight)[1]

    return norm


def _norm(account: Account, is_ligers: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Sum, if there is something to add, and its norm; of liger one kernel backward."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            out, scale = torch.empty_like(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
            total = hidden if delta is None else torch.empty_like(hidden)
            ctx.save_for_backward(total, weight, scale)
            ctx.adds = delta is not None
            note("rms_norm", *([hidden] if delta is None else [hidden, delta, total]), out, scale)
            return total, out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            total, weight, scale = ctx.saved_tensors
            made, given = torch.empty_like(total), [grad for grad in grads if grad is not None]
            note("rms_norm_backward", total, *given, made, scale)
            if not is_ligers:  # whose first has added up each program's part of this
                note("rms_norm_backward_weight", total, given[-1])
            return made, made if ctx.adds else None, torch.empty_like(weight)

    def note(name: str, *moved: Tensor) -> None:
        account.kernels.append(Kernel(account.phase, "model/norms.py RMSNorm", name, nbytes(moved)))

    return Norm.apply


def _liger_cross_entropy(account: Account) -> Callable[..., Tensor]:
    """``liger_cross_entropy_``: reads the logits for the sums and again for their gradient, which takes their place."""

    def call(logits: Tensor, labels: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
        terms = logits.new_zeros(len(logits), 1, dtype=torch.float32)
        moved = nbytes((*[logits] * (3 if needs_grad else 1), labels, terms))
        site = "model/cross_entropy.py _cross_entropy"
        account.kernels.append(Kernel(account.phase, site, "liger_cross_entropy", moved))
        return terms

    return call


def quack_products(account: Account) -> ModuleType:
    """``quack.gemm_interface`` as its kernels: products as plain ones, and apart what their epilogues move beside."""

    def product(name: str, left: Tensor, right: Tensor, out: Tensor, rows: int) -> Tensor:
        note(name, (left, right, out), 2 * rows * left.shape[-1] * right.shape[-1])
        return out

    def gemm(
        A: Tensor, B: Tensor, out: Tensor | None = None, cu_seqlens_m: Tensor | None = None, **words: Any
    ) -> Tensor:
        if cu_seqlens_m is not None:
            return product("gemm", A, B, A.new_empty(len(A), B.shape[-1]), len(A))
        assert out is not None
        note("gemm", (A, B, out), 2 * A.shape[0] * B.numel())
        return out

    def gemm_gated(A: Tensor, B: Tensor, A_idx: Tensor, **words: Any) -> tuple[Tensor, Tensor]:
        before = product("gemm_gated", A, B, A.new_empty(len(A_idx), B.shape[-1]), len(A_idx))
        act = A.new_empty(len(A_idx), B.shape[-1] // 2)
        note("gemm_gated epilogue", (act,), 0)
        return before, act

    def gemm_dgated(A: Tensor, B: Tensor, PreAct: Tensor, A_idx: Tensor, **words: Any) -> tuple[Tensor, ...]:
        act, dot = A.new_empty(len(A_idx), B.shape[-1]), A.new_empty(len(A_idx), dtype=torch.float32)
        grad_before = torch.empty_like(PreAct)
        product("gemm_dgated", A, B, act, len(A_idx))
        note("gemm_dgated epilogue", (PreAct, grad_before, dot), 0)  # the activation is in place of the product
        return grad_before, act, dot

    def note(name: str, moved: tuple[Tensor, ...], flops: int) -> None:
        account.kernels.append(Kernel(account.phase, "moe/experts/fused_products.py", name, nbytes(moved), flops))

    module = ModuleType("quack.gemm_interface")
    module.gemm, module.gemm_gated, module.gemm_dgated = gemm, gemm_gated, gemm_dgated  # type: ignore[attr-defined]
    return module


@dataclass(frozen=True)
class Counted:
    """One micro-batch of a model without storage.

    Attributes:
        account: Its kernels.
        weights: Bytes of the parameters.
        saved: Bytes that live between forward and backward beside them.
        peak: The most bytes at a time beside them.
    """

    account: Account
    weights: int
    saved: int
    peak: int


def fake_model(config: Config, shard: ExpertShard) -> DecoderLM:
    """A model in bfloat16, routers aside; under a ``FakeTensorMode``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderLM, "moe_layers", lambda model: [])  # token counts have no values to be read
        model = DecoderLM(config.model, config.router, shard)
    kept = {id(parameter) for parameter in float32_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.bfloat16()
    return model


def count(config: Config, rows: int, expert_parallel: int = 1, overlaps: bool = True) -> Counted:
    """Forward and backward of ``rows`` rows of a model of ``config`` on a GPU in bfloat16.

    With ``expert_parallel`` ranks, those of the default process group, every rank gets the same load; ``overlaps`` says
    whether halves of the tokens are exchanged apart.
    """
    account = Account()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        model = fake_model(config, ExpertShard(0, expert_parallel))
        stack.enter_context(says_cuda(_flex(account), account.one_kernel))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(functional, "rms_norm", _rms_norm(account))
        of_ligers = _norm(account, is_ligers=True)
        patch.setattr(norms, "liger_rms_norm", lambda hidden, weight, epsilon: of_ligers(hidden, None, weight)[1])
        patch.setattr(norms, "liger_added_norm", lambda *arguments: of_ligers(*arguments[:3]))
        patch.setattr(cross_entropy, "liger_cross_entropy_", _liger_cross_entropy(account))
        patch.setitem(sys.modules, "quack", ModuleType("quack"))
        patch.setitem(sys.modules, "quack.gemm_interface", quack_products(account))
        model.use_kernels(priced_kernels(config.engine.kernels, "cuda"))
        if expert_parallel > 1:
            routes = rows * config.model.sequence_length * round(config.router.mean_experts_per_token)

            def sizes(counts: Tensor, exchange: AllToAll) -> list[dispatch._Sizes]:
                even = [routes // expert_parallel // len(counts)] * expert_parallel
                sent = counts.view(len(counts), expert_parallel, -1).transpose(0, 1)
                received = exchange.exchange_counts(sent.flatten(1)).view_as(sent)
                return [dispatch._Sizes(own, even, even) for own in received.unbind(1)]

            patch.setattr(dispatch, "_exchange_sizes", sizes)
            for layer in model.moe_layers():
                layer.exchange = AllToAll(dist.group.WORLD)
                layer.overlaps_exchange = overlaps
        ids = torch.zeros(rows, config.model.sequence_length, dtype=torch.int64)
        batch = MicroBatch(ids, ids.clone(), ids.clone(), ids.clone(), ids[:, 0].clone(), 0)
        stack.enter_context(account)
        for parameter in model.parameters():
            account.hold(parameter)
        weights = account.current
        context = routing_context(batch, 0, 0, lambda layer, counts: counts, 10)
        account.kernels.clear()
        output: LMOutput = model(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
        loss = output.loss_sum + sum(output.aux.values())
        saved = account.current - weights
        account.phase = "backward"
        loss.backward()
        return Counted(account, weights, saved, account.peak - weights)
