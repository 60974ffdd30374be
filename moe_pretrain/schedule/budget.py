"""Budget of a run in tokens, FLOPs or seconds; and the meter of what it has spent."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

Measure = Literal["total_params", "active_params", "flops_per_token"]
Unknown = Literal["expert_width", "num_experts", "top_k"]


@dataclass(frozen=True)
class Matched:
    """Outcome of ``budget.match``.

    Attributes:
        field: What was solved, ``model.moe.expert_hidden_size`` or its like; its value stands there.
        before: Its value before.
        reference: Every measure of the reference.
    """

    field: str
    before: int
    reference: dict[Measure, float]


@dataclass(frozen=True)
class BudgetConfig:
    """Budget of a run, and the cost that its model is to have.

    Exactly one of ``tokens`` and ``flops`` is the run's planned end; ``seconds`` may end it before. The step that
    reaches a budget is a whole one and the last.

    Attributes:
        tokens: Tokens of the run, or None.
        flops: FLOPs of the run, or None. Each step is charged its tokens times the scheme's FLOPs per token, forward
            and backward, at the mean number of experts that its text tokens were measured to use; recomputation is not
            counted. The learning-rate schedule follows what is spent: see ``BudgetMeter.num_steps``. A hub corpus that
            is prepared whole ends at the tokens expected; ``data.max_tokens`` gives all schemes the same.
        seconds: Seconds in training steps and in waiting for their data, over all attempts by the first rank's clock,
            or None. Start-up, validation and checkpoints are not counted, nor is work that was lost and done again. The
            schedule does not know this limit, so a run that meets it ends with a learning rate that has not come down.
        match: In what the model is to equal the reference, as near as ``multiple`` allows: all parameters, those that a
            token uses, or training FLOPs per token. Adaptive schemes count with their expected experts per token. None
            leaves the model as it is.
        reference: Overrides of ``model`` and ``router`` that turn the model into the reference; the same model with
            ``router=top_k`` unless they say otherwise.
        solve: What is solved for: the routed experts' width (with a factorised gate ``model.moe.expert_hidden_size`` is
            what equation 5 of arXiv:2501.13074 makes that width from), their number, or ``router.top_k``. What matches
            to the last parameter already stays as it is.
        multiple: The solved width or number of experts is a multiple of this. Experts with a factorised gate come to
            every multiple of 2 and more, but not to every width.
        matched: Filled in while the configuration is loaded.
    """

    tokens: PositiveInt | None
    flops: Annotated[float, Field(ge=1)] | None
    seconds: PositiveFloat | None
    match: Measure | None
    reference: tuple[str, ...]
    solve: Unknown
    multiple: PositiveInt
    matched: Matched | None

    def __post_init__(self) -> None:
        for word in self.reference:
            if not word.startswith(("model=", "model.", "router=", "router.")):
                raise ValueError(f"budget.reference: {word!r} must be an override of model or router")
        if self.tokens is not None and self.flops is not None:
            raise ValueError(
                f"budget.tokens={self.tokens} must be null with budget.flops={self.flops:g}: a run has one planned end"
            )
        if self.tokens is None and self.flops is None:
            raise ValueError("budget.tokens=null must be a number of tokens, or budget.flops one of FLOPs")

    def planned_steps(self, tokens_per_step: int, flops_per_token: float) -> int:
        """Optimizer steps of the run; of ``flops`` those at ``flops_per_token``."""
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.flops is not None
        return -(-round(self.flops) // step_flops(tokens_per_step, flops_per_token))

    def describe(self) -> str:
        """Limits of the run beside its planned steps, for the line that it begins with."""
        of_flops = "" if self.flops is None else f", until {self.flops:.4g} FLOPs are spent"
        return of_flops + ("" if self.seconds is None else f", for at most {self.seconds:g} s of training")


def step_flops(tokens_per_step: int, flops_per_token: float) -> int:
    """FLOPs of one step: a whole number, so that sums of them are exact."""
    return round(tokens_per_step * flops_per_token)


class BudgetMeter:
    """Budget meter: FLOPs and seconds spent, and the length of the run; the same on every rank and topology.

    ``limit`` is the number of steps after which the data ends, or None.
    """

    def __init__(self, config: BudgetConfig, tokens_per_step: int, flops_per_token: float, limit: int | None = None):
        """Nothing is spent yet; ``flops_per_token`` is what is expected."""
        self.limit = limit
        self.steps, self.flops, self.seconds = 0, 0, 0.0
        self._config, self._tokens_per_step = config, tokens_per_step
        self._expected = step_flops(tokens_per_step, flops_per_token)
        self._planned_steps = config.planned_steps(tokens_per_step, flops_per_token)

    def charge(self, flops_per_token: float, seconds: float) -> None:
        """Add one step, at its measured FLOPs per token."""
        self.steps += 1
        self.flops += step_flops(self._tokens_per_step, flops_per_token)
        self.seconds += seconds

    def restore(self, steps: int, flops: int | None, seconds: float | None) -> None:
        """Go on from a checkpoint; None where it does not say: as expected, and 0 seconds."""
        self.steps, self.seconds = steps, seconds or 0.0
        self.flops = steps * self._expected if flops is None else flops

    @property
    def num_steps(self) -> int:
        """Steps that the run comes to, by which the learning-rate schedule goes.

        A budget of FLOPs that a scheme spends unevenly comes to ``steps * budget / spent`` at the mean cost so far: the
        schedule's progress is then the share of the FLOPs that is spent, and the last step is at its end. Where each
        step costs the same this is the same number throughout.
        """
        steps = self._planned_steps
        if self._config.flops is not None and self.flops:
            steps = max(self.steps, -(-self.steps * round(self._config.flops) // self.flops))
        return steps if self.limit is None else min(steps, self.limit)

    @property
    def is_spent(self) -> bool:
        """Whether a budget is reached."""
        return self._planned_end or self._out_of_time

    @property
    def is_over(self) -> bool:
        """Whether the last step is done: the budget or the data has come to its end."""
        return self.is_spent or (self.limit is not None and self.steps >= self.limit)

    @property
    def _planned_end(self) -> bool:
        if self._config.flops is not None:
            return self.flops >= self._config.flops
        return self.steps >= self._planned_steps

    @property
    def _out_of_time(self) -> bool:
        return self._config.seconds is not None and self.seconds >= self._config.seconds

    @property
    def counts_seconds(self) -> bool:
        """Whether seconds may end the run, so that ranks must agree on them."""
        return self._config.seconds is not None

    def describe_end(self) -> str:
        """Reason of the end, in a few words; after a number of steps by itself when those were planned."""
        text = f"after {self.steps} steps"
        if self._config.flops is not None and self._planned_end:
            text += f": {self.flops:.4g} FLOPs are spent, of budget.flops={self._config.flops:g}"
        elif self._out_of_time and not self._planned_end:
            text += f": {self.seconds:.1f} s are spent, of budget.seconds={self._config.seconds:g}"
        return text

    def describe_excess(self) -> str:
        """Line on a budget that is below what is spent, by more than the last step; or nothing."""
        config, before_last = self._config, 1 - 1 / max(1, self.steps)
        found = ""
        if config.tokens is not None and self.steps > self._planned_steps:
            found = f"budget.tokens={config.tokens} is below the {self.steps * self._tokens_per_step} tokens done"
        elif config.flops is not None and self.flops * before_last >= config.flops:
            found = f"budget.flops={config.flops:g} is below the {self.flops:.4g} FLOPs spent"
        elif config.seconds is not None and self.seconds * before_last >= config.seconds:
            found = f"budget.seconds={config.seconds:g} is below the {self.seconds:.1f} s spent"
        return f"{found}: nothing is trained, and the learning rate of these steps was a longer run's" if found else ""

    def describe_spending(self) -> str:
        """FLOPs and seconds, and how far FLOPs are from what was expected."""
        text = f"{self.flops:.4g} FLOPs, {self.seconds:.1f} s in steps"
        expected = self.steps * self._expected
        if self.flops == expected:
            return text
        return f"{text}; FLOPs as measured, {self.flops / expected - 1:+.2%} of the {expected:.4g} expected"
