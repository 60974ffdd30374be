"""Routers that are a shipped one with a line changed, as files of a user's own."""

import importlib
from pathlib import Path
from typing import NamedTuple

_TAIL = """

import sys as _sys
import typing as _typing
from dataclasses import fields as _fields
from dataclasses import make_dataclass as _make_dataclass

from moe_pretrain.config.load import load as _load

# The loader takes the classes that say that they are of this file; of these the configuration alone is to be found.
for _one in list(globals().values()):
    if isinstance(_one, type) and _one.__module__ == __name__:
        _one.__module__ = "mutant"
_sys.modules["mutant"] = _sys.modules[__name__]
_shipped = _load(["router={scheme}"]).router
_own = globals()[type(_shipped).__name__]


def _no_build(self, hidden_size, num_experts, layer):
    raise NotImplementedError


_builds = [name for name in ("build", "build_in_place", "build_for_experts") if name in vars(_own)]
MutantConfig = _make_dataclass(
    "MutantConfig",
    [
        *((field.name, field.type, getattr(_shipped, field.name)) for field in _fields(_own) if field.name != "name"),
        ("name", _typing.Literal["mutant"], "mutant"),
    ],
    bases=(_own,),
    frozen=True,
    kw_only=True,
    namespace={{"__module__": __name__, "build": _no_build, **{{name: vars(_own)[name] for name in _builds}}}},
)
"""


class Mutant(NamedTuple):
    """One wrong router.

    Attributes:
        scheme: ``router=`` of the shipped one.
        row: Row of the certificate that is to say so.
        changes: Old text -> new text, in the module of the scheme.
        words: Overrides with which it is tried.
        module: File of the scheme in ``moe/routers``, if that is not its name.
    """

    scheme: str
    row: str
    changes: dict[str, str]
    words: tuple[str, ...] = ()
    module: str = ""

    def write(self, folder: Path) -> str:
        """The router file, as the override that chooses it."""
        module = importlib.import_module(f"moe_pretrain.moe.routers.{self.module or self.scheme}")
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        for old, new in self.changes.items():
            assert source.count(old) == 1, f"{self.scheme} has {old!r} {source.count(old)} times"
            source = source.replace(old, new)
        file = folder / "my_router.py"
        file.write_text(source + _TAIL.format(scheme=self.scheme))
        return f"router_file={file}"


_DIRECTION = "(self.config.target_experts > mean) - (self.config.target_experts < mean)"
_CONTROLLED = ("router.target_experts=2", "router.controller_rate=0.01")
_AGE = {
    "        self._bias_update_rate = config.bias_update_rate\n": (
        "        self._bias_update_rate = config.bias_update_rate\n"
        "        self.register_buffer('age', torch.zeros(()))\n"
    ),
    "        routes = use.tokens_per_expert\n": "        self.age += 1\n        routes = use.tokens_per_expert\n",
}
_TOP_K_LOGITS = "        logits = self.logits(hidden, context)\n        scores = "


def _top_k_logits(*lines: str) -> dict[str, str]:
    return {_TOP_K_LOGITS: "".join(f"        {line}\n" for line in lines) + "        scores = "}


NUMBER, LOAD, ROWS, ANYWHERE = (
    "state keeps the number of experts",
    "state evens the load",
    "other numbers of experts",
    "determinism",
)
RANKS, READ = "state alike on ranks", "every field is read"
ALIKE, ADD_UP, ONCE, LOSSES, BEST = (
    "experts are alike",
    "weights add up as configured",
    "coefficients act once",
    "losses even the load",
    "experts get their best tokens",
)
_ZERO, _UNEQUAL = ("experts=zero_computation",), ("experts=unequal", "model.moe.num_experts=8")
_TWO_LAYERS = ("model.num_layers=2",)
_SPARSITY = "*(gates, counts, tokens, config.target_experts, context"

# What is wrong with it.
MUTANTS = {
    "a threshold of top_p that goes away from its target": Mutant(
        "top_p", NUMBER, {f"direction = {_DIRECTION}": f"direction = -({_DIRECTION})"}, _CONTROLLED
    ),
    "a scale of attention that goes away from its target": Mutant(
        "attention_importance",
        NUMBER,
        {f"direction = {_DIRECTION}": f"direction = -({_DIRECTION})"},
        ("router.target_experts=3", "router.controller_rate=0.05"),
    ),
    "a coefficient of sparsity that falls with too many open gates": Mutant(
        "relu", NUMBER, {"sparsity_weight_factor**direction": "sparsity_weight_factor**-direction"}
    ),
    "quotas of the experts that are not wanted": Mutant(
        "expert_threshold",
        NUMBER,
        {"* self.config.target_experts, self": "* (self.num_experts - self.config.target_experts), self"},
    ),
    "half of the quotas": Mutant(
        "expert_threshold", NUMBER, {"value_at(counts, -1.0, 0.0, quota)": "value_at(counts, -1.0, 0.0, quota / 2)"}
    ),
    "thresholds of evaluation at the mean score": Mutant(
        "expert_choice", NUMBER, {"(cutoff + spread * (running - now)).clamp": "mean.clamp"}
    ),
    "thresholds of evaluation at half of the cut-off": Mutant(
        "expert_choice", NUMBER, {"cutoffs.double() * text.sum(), seen": "cutoffs.double() * text.sum() / 2, seen"}
    ),
    "tokens below the threshold in evaluation": Mutant(
        "expert_choice", NUMBER, {"(probs > self.evaluation.thresholds)": "(probs < self.evaluation.thresholds)"}
    ),
    "experts out of use because they have routes": Mutant(
        "dynmoe", NUMBER, {"(self.recorded_routes > 0).long()": "(self.recorded_routes == 0).long()"}
    ),
    "routes to experts out of use": Mutant(
        "dynmoe", NUMBER, {"(margins.detach() > 0) & used": "(margins.detach() > 0)"}
    ),
    "a plan of which columns go apart": Mutant(
        "sinkhorn",
        LOAD,
        {"column = -torch.where(token_mask.any(), mass, 0.0)": "column = torch.where(token_mask.any(), mass, 0.0)"},
    ),
    "a bias of clusters with the wrong sign": Mutant(
        "k_means", LOAD, {"self.expert_bias += config.bias_update_rate": "self.expert_bias -= config.bias_update_rate"}
    ),
    "a bias in the weights": Mutant(
        "loss_free",
        "state leaves weights alone",
        {
            "    def after_step(self": (
                "    def forward(self, hidden, context):\n"
                "        from dataclasses import replace\n\n"
                "        routing = super().forward(hidden, context)\n"
                "        bias = self.expert_bias[routing.expert_index]\n"
                "        return replace(routing, weight=routing.weight * (1 + bias))\n\n"
                "    def after_step(self"
            )
        },
    ),
    "the next token, once state is old": Mutant(
        "loss_free",
        "after many steps of state",
        _AGE
        | {
            "    def after_step(self": (
                "    def logits(self, hidden, context):\n"
                "        return super().logits(hidden.roll(-1, 0) if self.age > 150 else hidden, context)\n\n"
                "    def after_step(self"
            )
        },
    ),
    "the same draw in both passes": Mutant("thor", "noise", {"self.layer, context.pass_index)": "self.layer, 0)"}),
    "an expert that is never drawn": Mutant(
        "thor", "noise", {"(drawn * self.num_experts).long()": "(drawn * (self.num_experts - 1)).long()"}
    ),
    "weights of other experts where their number is odd": Mutant(
        "top_k",
        ROWS,
        {
            "        weight = _route_weights(": (
                "        scores = scores if self.num_experts % 2 == 0 else scores.flip(1)\n"
                "        weight = _route_weights("
            )
        },
    ),
    "expert ids of 8 bits": Mutant(
        "top_k",
        ROWS,
        {
            "return best_first(scores, logits)[:, : self.config.top_k]": (
                "return best_first(scores, logits)[:, : self.config.top_k].to(torch.int8).long() % self.num_experts"
            )
        },
    ),
    "a buffer by the rank": Mutant(
        "top_k",
        ANYWHERE,
        {
            "        config.check_num_experts(num_experts)\n        self.config = config": (
                "        self.config = config\n"
                "        import os\n\n"
                "        self.register_buffer('by_rank', torch.tensor(float(os.environ.get('RANK', '0'))))"
            )
        },
    ),
    "logits by the rank": Mutant(
        "top_k",
        ANYWHERE,
        _top_k_logits(
            "from torch import distributed",
            "rank = distributed.get_rank() if distributed.is_initialized() else 0",
            "logits = self.logits(hidden, context).roll(rank, dims=1)",
        ),
    ),
    "logits by the clock": Mutant(
        "top_k",
        ANYWHERE,
        _top_k_logits("import time", "logits = self.logits(hidden, context) * (1 + int(time.time()) // 1000 % 7)"),
    ),
    "losses over the number of the layer": Mutant(
        "top_k",
        "entropy and losses at uniform",
        {
            "    def own_losses(": (
                "    def route(self, *arguments, **more):\n"
                "        from dataclasses import replace\n\n"
                "        routing = super().route(*arguments, **more)\n"
                "        aux = {name: value / (self.layer + 1) for name, value in routing.aux.items()}\n"
                "        return replace(routing, aux=aux)\n\n"
                "    def own_losses("
            )
        },
    ),
    "a z-loss of larger logits late in the run": Mutant(
        "top_k",
        "every step and layer",
        {
            "        return self.route(\n            logits,": (
                "        return self.route(\n            logits if context.step < 1000 else 10 * logits,"
            )
        },
    ),
    "logits by the length of the row in training": Mutant(
        "top_p",
        "a new token alone",
        {
            "        probs = logits.softmax(dim=-1)\n        taken": (
                "        length = len(hidden) // context.num_sequences if self.training else 12\n"
                "        logits = logits * (1 + length / 100)\n"
                "        probs = logits.softmax(dim=-1)\n        taken"
            )
        },
    ),
    "a parameter that is excused from the LM loss, and that no other teaches": Mutant(
        "attentive",
        "router gradient from the LM loss",
        {
            "logits.gather(1, candidates), scores.detach()": "logits.detach().gather(1, candidates), scores.detach()",
            "            logits, logits.softmax(dim=-1), token,": (
                "            logits.detach(), logits.detach().softmax(dim=-1), token,"
            ),
        },
    ),
    "a teacher whose experts are in another order than the pupil's": Mutant(
        "attentive", ALIKE, {"logits.gather(1, candidates), scores.detach()": "logits.gather(1, best), scores.detach()"}
    ),
    "importance of other experts than those that were asked": Mutant(
        "attentive", ALIKE, {".scatter(1, candidates, probs)": ".scatter(1, candidates, probs.flip(1))"}
    ),
    "norms over numbers of several experts": Mutant(
        "autonomy",
        ALIKE,
        {"vector_norm(low.float(), dim=-1)": "vector_norm(low.float().transpose(1, 2).reshape(low.shape), dim=-1)"},
    ),
    "ties that the number of the expert decides": Mutant(
        "top_k",
        ALIKE,
        {"best_first(scores, logits)[:, : self.config.top_k]": "best_first(scores, None)[:, : self.config.top_k]"},
    ),
    "weights divided by those of experts that are not taken": Mutant(
        "top_p", ADD_UP, {"probs / (probs * taken).sum(": "probs / probs.sum("}, ("router.weights=renormalised",)
    ),
    "weights beside a zero expert that are not divided again": Mutant(
        "moe_plus_plus",
        ADD_UP,
        {"            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)\n": ""},
        _ZERO,
    ),
    "a softmax over all norms for that of the selected": Mutant(
        "autonomy", ADD_UP, {"norms.masked_fill(~taken, lowest).softmax(dim=-1)": "norms.softmax(dim=-1)"}
    ),
    "a coefficient squared": Mutant(
        "moe_plus_plus", ONCE, {"self.config.load_balance_weight}": "self.config.load_balance_weight**2}"}, _ZERO
    ),
    "a coefficient in the loss and beside it": Mutant(
        "top_p", ONCE, {'["dynamic"] = entropy_loss(': '["dynamic"] = self.config.dynamic_weight * entropy_loss('}
    ),
    "a coefficient that follows one layer": Mutant(
        "relu",
        ONCE,
        {
            "direction = (use.experts_per_token > self": (
                "mean = float(use.tokens_per_expert.sum()) / max(use.tokens, 1)\n        direction = (mean > self"
            ),
            "            use.experts_per_token < self": "            mean < self",
        },
        _TWO_LAYERS,
    ),
    "a scale of weights that acts twice": Mutant(
        "top_k", ONCE, {"    return weight * scale\n": "    return weight * scale * scale\n"}
    ),
    "what networks cost and what others do, exchanged": Mutant(
        "moe_plus_plus", LOSSES, {"cost[self.kinds.ffn :] = config.tau": "cost[: self.kinds.ffn] = config.tau"}, _ZERO
    ),
    "a balance loss that rewards busy experts": Mutant(
        "moe_plus_plus",
        LOSSES,
        {"cost_balance_loss(probs, counts,": "cost_balance_loss(probs, counts.max() - counts,"},
        _ZERO,
    ),
    "a load loss with the wrong sign": Mutant(
        "moce_ir", LOSSES, {'"load": load_loss(': '"load": -load_loss('}, _UNEQUAL
    ),
    "sparsity over all experts for the wanted ones": Mutant(
        "relu", LOSSES, {_SPARSITY: _SPARSITY.replace("config.target_experts", "self.num_experts")}
    ),
    "sparsity of gates squared": Mutant("relu", LOSSES, {_SPARSITY: _SPARSITY.replace("gates", "gates.square()")}),
    "sparsity that rewards busy experts": Mutant(
        "relu", LOSSES, {_SPARSITY: _SPARSITY.replace("counts", "counts.max() - counts")}
    ),
    "an even load of tokens, where routes are counted": Mutant(
        "loss_free", LOAD, {"even_load(routes.sum(), self": "even_load(torch.tensor(float(use.tokens)), self"}
    ),
    "a bias that falls for every expert with routes": Mutant(
        "loss_free",
        LOAD,
        {"torch.sign(even_load(routes.sum(), self.num_experts, self.balanced_costs) - routes)": "-torch.sign(routes)"},
    ),
    "the cut-off of the last expert that is taken": Mutant(
        "quantile",
        LOAD,
        {"topk(self.config.top_k + 1, dim=1)": "topk(self.config.top_k, dim=1)"},
        ("model.moe.num_experts=12",),
    ),
    "quotas of one expert per token": Mutant(
        "quantile", LOAD, {"even_load(counts.sum(dim=1) * self.config.top_k,": "even_load(counts.sum(dim=1),"}
    ),
    "a plan of rows alone": Mutant(
        "sinkhorn", LOAD, {"logits + row[:, None] + column - math": "logits + row[:, None] - math"}
    ),
    "cut-offs that are not weighted by their tokens": Mutant(
        "expert_choice",
        RANKS,
        {"torch.cat([cutoffs.double() * text.sum(),": "torch.cat([cutoffs.double(),"},
    ),
    "a coefficient that follows the gates of the last pass": Mutant(
        "relu",
        RANKS,
        {
            "        level = config.load_balance_level\n": (
                "        self.open = float((gates.detach() > 0).sum()) / len(gates)\n"
                "        level = config.load_balance_level\n"
            ),
            "(use.experts_per_token > self.config": "(self.open > self.config",
            "            use.experts_per_token < self.config": "            self.open < self.config",
        },
    ),
    "an average that begins anew when it is loaded": Mutant(
        "expert_threshold",
        "state round trip",
        {
            "    def after_step(self,": (
                "    def _load_from_state_dict(self, *arguments):\n"
                "        super()._load_from_state_dict(*arguments)\n"
                "        self.ema_weight.zero_()\n\n"
                "    def after_step(self,"
            )
        },
    ),
    "a loss over the number of ranks": Mutant(
        "relu",
        ANYWHERE,
        {
            '"sparsity": sparsity_loss(': (
                '"sparsity": (0.5 if torch.distributed.is_initialized() else 1) * sparsity_loss('
            )
        },
    ),
    "a limit that undecided tokens exceed": Mutant(
        "top_p",
        "experts per token as declared",
        {"        taken[:, max_experts:] = False": "        taken[:, max_experts + 1 :] = False"},
        ("router.max_experts=4", "router.threshold=0.7"),
    ),
    "numbers of experts in a byte": Mutant(
        "top_k",
        ROWS,
        {"return token_index, chosen.flatten()": "return token_index, chosen.to(torch.uint8).long().flatten()"},
    ),
    "a level that is not read": Mutant("relu", READ, {"level = config.load_balance_level": 'level = "micro_batch"'}),
    "a decay that is not read": Mutant("expert_threshold", READ, {"fresh = 1 - self.config.ema_decay": "fresh = 0.1"}),
    "a temperature that is not read": Mutant(
        "k_means", READ, {"logits = nearness / config.temperature": "logits = nearness"}
    ),
    "the experts that answer least": Mutant(
        "attentive",
        BEST,
        {"chosen = scores.detach().sort(": "chosen = (-scores.detach()).sort("},
    ),
    "a norm of gates that knows no load": Mutant(
        "relu",
        LOSSES,
        {_SPARSITY: _SPARSITY.replace("counts", "counts.mean(dim=1, keepdim=True).expand_as(counts)")},
    ),
    "a weight less its threshold": Mutant(
        "expert_threshold",
        "state leaves weights alone",
        {"weight = routes.take(scores)": "weight = routes.take(scores - self.threshold)"},
    ),
    "the last expert drawn twice as often": Mutant(
        "thor",
        "noise",
        {
            "(drawn * self.num_experts).long()": (
                "(drawn * (self.num_experts + 1)).long().clamp(max=self.num_experts - 1)"
            )
        },
    ),
    "noise that begins anew every 64 steps": Mutant(
        "moce_ir", "noise", {"NOISE_STREAM, context.step,": "NOISE_STREAM, context.step % 64,"}
    ),
    "the noise of the next step in the layer above": Mutant(
        "moce_ir", "noise", {"NOISE_STREAM, context.step, self.layer)": "NOISE_STREAM, context.step + self.layer)"}
    ),
    "noise of a token's vocabulary id": Mutant(
        "moce_ir", "noise", {"counter_normal(context.token_position": "counter_normal(context.token_ids"}
    ),
    "noise that only every other expert has": Mutant(
        "moce_ir",
        "noise",
        {"std * counter_normal": "std * (torch.arange(self.num_experts) % 2) * counter_normal"},
    ),
    "one expert for everything in evaluation": Mutant(
        "thor", "noise", {"(context.first_place + torch.arange(": "(0 * torch.arange("}
    ),
    "the worst expert for a token that passes no threshold in evaluation": Mutant(
        "dynmoe", BEST, {"self._best(cosines.detach(), used)": "self._best(-cosines.detach(), used)"}
    ),
    "the worst experts in evaluation": Mutant(
        "sinkhorn", BEST, {"ranked = logits.detach()": "ranked = logits.detach() * (1 if self.training else -1)"}
    ),
    "the mass of a distribution from its other end": Mutant(
        "top_p", BEST, {"expert = logits.sort(dim=-1, descending=True": "expert = logits.sort(dim=-1, descending=False"}
    ),
    "weights of 1 in evaluation": Mutant(
        "moce_ir",
        "evaluation as in training",
        {
            "noisy.softmax(dim=-1).gather(1, chosen).flatten(),": (
                "(noisy.softmax(dim=-1).gather(1, chosen) ** int(self.training)).flatten(),"
            )
        },
        _UNEQUAL,
    ),
    "logits carried up without their gradient": Mutant(
        "moe_plus_plus",
        "weights' gradient is a derivative",
        {"router_logits(context.carried, self": "router_logits(context.carried.detach(), self"},
        (*_ZERO, *_TWO_LAYERS),
    ),
}
