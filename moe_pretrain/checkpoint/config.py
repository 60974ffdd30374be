"""Checkpoint settings: times of writing, the way of it, and the number that stay."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint settings: times of writing, the way of it, and the number that stay.

    Attributes:
        every_steps: Steps between checkpoints; one is always written at the end.
        keep_last: How many of the newest stay.
        keep_every_steps: Checkpoints at multiples of this many steps stay for ever; None for no such.
        keep_best: How many of those with the lowest validation loss stay, of those at whose step there was a
            validation; 0 for none.
        asynchronous: Training waits only until its state is copied to host memory (12 bytes per parameter that the
            rank saves); a thread writes it behind. False: training waits for the disk.
        resume: ``auto``: go on from the newest good checkpoint if there is one, begin if there is none at all, and fail
            if there are some and none is good; ``must``: fail if there is none; ``never``: fail if there is one;
            ``restart``: as ``auto``, but where none is good they are set aside (``checkpoints/set_aside``) and the run
            begins anew. It is for one start: the run's record does not keep it.
        warm_start: A checkpoint of another run, or that run's folder for its newest, whose weights a new run starts
            from. Its router may be another: routers' weights that fit by name and shape are taken over, the others
            start as ever. Heads must be as many; what else makes another function of the same weights
            (``model.rope_base``, ``norm_epsilon``, activation, combination) may differ, and is said. Optimizer,
            schedule, data and balancer state start anew. None for no such. Or a Hugging Face folder of a Llama, Mistral
            or Mixtral model, with its tokenizer (``tokenizer.path`` the same folder).
        branch_from: ``RUN@STEP``: a new run begins with everything that the checkpoint of that step knows, weights,
            moments, routers' state and position in the data, as if it had made these steps itself. Model, router, data,
            tokenizer, seed, global batch and optimizer must be the same; schedule and budget, of which the steps so far
            are a part, may be others: one stable run has a decay to each budget. RUN is the folder of a run, or its
            name beside this one. None for no such.
    """

    every_steps: PositiveInt
    keep_last: PositiveInt
    keep_every_steps: PositiveInt | None
    keep_best: NonNegativeInt
    asynchronous: bool
    resume: Literal["auto", "must", "never", "restart"]
    warm_start: str | None
    branch_from: str | None
