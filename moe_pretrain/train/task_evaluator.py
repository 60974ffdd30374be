"""Tasks of lm-evaluation-harness during training, on all ranks, which a signal may cut short."""

from typing import Any

from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.parallel.sharing import Sharing
from moe_pretrain.run_folder.task_results import TaskResult
from moe_pretrain.train.context import RunContext


class _Stopped(Exception):
    """A signal that all ranks have agreed on."""


class RunTasks:
    """The tasks of ``evaluation.tasks``, loaded once; the harness is imported by runs alone that have some.

    Attributes:
        are_there: Whether there are any.
    """

    def __init__(self, config: Config):
        """Load the tasks.

        Raises:
            ConfigError: One cannot be, or does not fit the scheme.
        """
        self._config = config
        self._loaded: Any = None
        if self.are_there:
            from moe_pretrain.inference.harness.evaluate_tasks import check_router
            from moe_pretrain.inference.harness.tasks import load_tasks

            self._loaded = load_tasks("evaluation.tasks.names", config.evaluation.tasks.names)
            self._rule = check_router(meta_model(config.model, config.router), config.router.name, self._loaded)

    @property
    def are_there(self) -> bool:
        """Whether there are any."""
        return bool(self._config.evaluation.tasks.names)

    def is_step(self, step: int, at_end: bool) -> bool:
        """Whether they are asked after ``step`` steps."""
        every = self._config.evaluation.tasks.every_steps or self._config.evaluation.every_steps
        return self.are_there and (at_end or (step > 0 and step % every == 0))

    def evaluate(
        self, engine: TrainEngine, tokenizer: Tokenizer, plan: RunPlan, context: RunContext, step: int
    ) -> list[TaskResult] | None:
        """Results, the same on every rank; None if a signal was agreed on in between. Every rank must call it."""
        from moe_pretrain.inference.harness.evaluate_tasks import evaluate_tasks
        from moe_pretrain.inference.harness.language_model import HarnessModel

        mesh = context.mesh

        def between() -> None:
            context.enter("evaluate.tasks", step)
            if context.agree_to_stop():
                raise _Stopped

        sharing = Sharing(mesh.rank, mesh.world_size, mesh.shard.size > 1, mesh.device, between)
        tokens = plan.batches.micro_batch_size * self._config.model.sequence_length
        engine.model.eval()
        try:
            model = HarnessModel(engine.model, tokenizer, tokens, sharing)
            return evaluate_tasks(model, self._loaded, self._config.evaluation.tasks.max_documents, self._rule)
        except _Stopped:
            return None
        finally:
            engine.model.train()
