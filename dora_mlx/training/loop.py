"""The training loop: optimizer steps from a stream of batches, written down as events."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.attach import AdapterSpec
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch, BatchStream, make_batch
from dora_mlx.errors import UserError
from dora_mlx.layers.dora import hoisted_norms
from dora_mlx.training.checkpoints import Checkpoint, Progress, save_checkpoint
from dora_mlx.training.events import EventLog
from dora_mlx.training.lean_backward import lean_backward, why_not_lean
from dora_mlx.training.loss import best_loss, excerpt
from dora_mlx.training.optimizer import GroupedOptimizer
from dora_mlx.training.schedule import learning_rate_at
from dora_mlx.training.workers import Workers

# A run that meets this many steps in a row without a finite gradient will not recover.
SKIPS_BEFORE_GIVING_UP = 5


class DivergedError(UserError):
    """The losses or gradients of a training stay without a finite value."""


@dataclass
class Trainer:
    """Everything a run needs between two steps.

    Attributes:
        model: The model with its adapters attached.
        spec: What was attached.
        config: The options; ``steps`` and ``learning_rate`` are set.
        batches: Where training batches come from.
        validation: Batches to validate on; may be empty.
        folder: The run folder.
        log: Where events go.
        workers: The processes that train together.
        progress: Where the run stands.
    """

    model: nn.Module
    spec: AdapterSpec
    config: TrainConfig
    batches: BatchStream
    validation: list[Batch]
    folder: Path
    log: EventLog
    workers: Workers
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.optimizer = GroupedOptimizer(
            self.config.optimizer,
            self.model.trainable_parameters(),
            self.config.weight_decay,
            self.config.magnitude_lr_ratio,
            self.config.lora_b_lr_ratio,
        )
        smallest = excerpt(make_batch(sorted(self.batches.examples, key=len)[:2]))
        self._loss_sum, loss_notice = best_loss(self.model, smallest)
        self.model.train()
        self._not_lean = why_not_lean(self.model, self._loss_sum, smallest)
        lean_notice = self._not_lean and (
            "gradients are computed the plain way, which takes more memory than was planned: "
            f"where blocks are computed again, {self._not_lean}"
        )
        self.notices = [notice for notice in (loss_notice, lean_notice) if notice]
        # With the model as an argument, MLX would take its frozen weights for variables as well.
        self._loss_and_gradients = nn.value_and_grad(
            self.model, partial(self._loss_sum, self.model)
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.steps is None:
            raise ValueError("the number of steps is resolved before training")
        return self.config.steps

    @property
    def _peak(self) -> float:
        if self.config.learning_rate is None:
            raise ValueError("the learning rate is resolved before training")
        return self.config.learning_rate

    def run(self, should_stop: Callable[[], bool]) -> str:
        """Train to the end; returns ``completed``, ``stopped`` or ``early_stopped``.

        Before every step ``should_stop`` is asked. The last state is in a checkpoint in any case.

        Raises:
            DivergedError: After several steps in a row without a finite loss and gradient.
        """
        if self.progress.step == 0:
            self._validate()
        while True:
            if self._out_of_patience():
                return self._finish("early_stopped")
            if self.progress.step >= self.steps:
                return self._finish("completed")
            if should_stop():
                return self._finish("stopped")
            self.step()
            step = self.progress.step
            if step % self.config.steps_per_eval == 0 or step == self.steps:
                self._validate()
            if step % self.config.steps_per_save == 0:
                self.save()

    def save(self) -> None:
        """Write a checkpoint of where the run stands, if it has none yet."""
        if not self.workers.leads:
            return
        path = save_checkpoint(
            self.folder / "checkpoints",
            self.model,
            self.spec,
            _by_name(self.optimizer.state),
            self.progress,
            self.config.keep_checkpoints,
        )
        if path is not None:
            self.log.write("checkpoint", step=self.progress.step, path=str(path))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where the run stood at ``checkpoint``.

        Raises:
            UserError: If it is of another model or other options.
        """
        now = {
            "adapter": _by_name(self.model.trainable_parameters()),
            "optimizer": _by_name(self.optimizer.state),
        }
        for what, arrays in now.items():
            then: dict[str, mx.array] = getattr(checkpoint, what)
            if {k: v.shape for k, v in arrays.items()} != {k: v.shape for k, v in then.items()}:
                raise UserError(
                    f"The checkpoint {checkpoint.path} has another {what} than this run. "
                    "Start a new run instead."
                )
        self.model.load_weights(list(checkpoint.adapter.items()), strict=False)
        self.optimizer.state = tree_unflatten(list(checkpoint.optimizer.items()))
        self.progress = checkpoint.progress

    def agree(self) -> None:
        """Give every worker the parameters, optimizer state and progress of the leader."""
        self.model.update(self.workers.share_arrays(self.model.trainable_parameters()))
        self.optimizer.state = self.workers.share_arrays(self.optimizer.state)
        self.progress = Progress(**self.workers.share(asdict(self.progress)))

    def step(self) -> None:
        """One optimizer step over ``grad_accumulation_steps`` batches of every worker."""
        step = self.progress.step + 1
        started = time.perf_counter()
        self.model.train()
        loss, gradients, tokens = self._accumulate()
        gradients, norm = optim.clip_grad_norm(gradients, self.config.max_grad_norm)
        mx.eval(norm, gradients)
        rate = learning_rate_at(
            step, self.steps, self._peak, self.config.warmup_steps, self.config.schedule
        )
        if mx.isfinite(norm).item():
            self.optimizer.update(self.model, gradients, rate)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
            skipped = 0
        else:
            skipped = self._skip(step)
        self.progress = replace(
            self.progress,
            step=step,
            position=self.progress.position
            + self.config.grad_accumulation_steps * self.workers.count,
            tokens=self.progress.tokens + tokens,
            skipped_in_a_row=skipped,
        )
        self.log.write(
            "step",
            step=step,
            loss=loss,
            learning_rate=rate,
            tokens=self.progress.tokens,
            tokens_per_second=tokens / (time.perf_counter() - started),
            peak_memory_bytes=mx.get_peak_memory(),
            grad_norm=norm.item(),
        )

    def _accumulate(self) -> tuple[float, Any, int]:
        """Mean loss over the trained tokens of a global batch, its gradients, and their number."""
        loss, own_tokens = mx.array(0.0), 0
        total: Any = None
        with self._ready():
            for number in range(self.config.grad_accumulation_steps):
                position = self.progress.position + number * self.workers.count + self.workers.rank
                # Seeded by the batch, the dropout of a resumed run needs no saved state.
                mx.random.seed(self.config.seed * 1_000_003 + position)
                batch = self.batches.batch(position)
                part, gradients = self._loss_and_gradients(batch)
                loss, own_tokens = loss + part, own_tokens + batch.trained_tokens
                total = gradients if total is None else tree_map(mx.add, total, gradients)
                mx.eval(loss, total)
                # The screen of a Mac is drawn by the same GPU, and macOS ends what holds it.
                if self.config.pause_ms:
                    time.sleep(self.config.pause_ms / 1000)
        loss_sum, tokens = self.workers.sum(cast(float, loss.item()), own_tokens)
        total = self.workers.sum_gradients(total)
        return loss_sum / tokens, tree_map(partial(mx.multiply, 1 / tokens), total), int(tokens)

    def rehearse(self, batch: Batch) -> None:
        """Loss and gradients of a batch, thrown away: it takes a step's memory and changes nothing.

        Random numbers drawn here do no harm: every step starts from a seed of its own.
        """
        self.model.train()
        with self._ready():
            mx.eval(self._loss_and_gradients(batch))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """What surrounds the passes of a step."""
        lean: AbstractContextManager[None] = nullcontext()
        if self._not_lean is None:
            lean = lean_backward(self.model, self.config.grad_checkpoint is True)
        # The norms depend on parameters that do not change before the update.
        with hoisted_norms(self.model), lean:
            yield

    def _skip(self, step: int) -> int:
        """Record a step without a finite gradient; returns how many there were in a row."""
        skipped = self.progress.skipped_in_a_row + 1
        self.log.write(
            "warning",
            step=step,
            message=f"step {step}: loss or gradient is not finite; the update is skipped",
        )
        if skipped >= SKIPS_BEFORE_GIVING_UP:
            raise DivergedError(
                f"Stopped at step {step}: {skipped} steps in a row without a finite loss and "
                "gradient. Lower --learning-rate (a tenth is a good next try) and start again; "
                "what was saved so far is kept."
            )
        return skipped

    def _validate(self) -> None:
        """Loss on the validation set; the best adapter so far goes to the run folder."""
        if not self.validation:
            return
        self.model.eval()
        own_loss, own_tokens = 0.0, 0
        with hoisted_norms(self.model):
            for batch in self.validation[self.workers.rank :: self.workers.count]:
                own_loss += cast(float, self._loss_sum(self.model, batch).item())
                own_tokens += batch.trained_tokens
        loss, tokens = self.workers.sum(own_loss, own_tokens)
        mean, best = loss / tokens, self.progress.best_loss
        self.log.write("validation", step=self.progress.step, loss=mean)
        if self.progress.step == 0:
            # The base model was measured, which is no candidate for the best adapter.
            return
        if best is None or mean < best:
            self.progress = replace(self.progress, best_loss=mean, validations_since_best=0)
            self._save_adapter()
        else:
            since = self.progress.validations_since_best + 1
            self.progress = replace(self.progress, validations_since_best=since)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    def _finish(self, reason: str) -> str:
        self.save()
        if self.progress.best_loss is None:
            # Never validated, so the last adapter is the best one known.
            self._save_adapter()
        return reason

    def _save_adapter(self) -> None:
        if self.workers.leads:
            save_adapter(self.folder, self.model, self.spec)


def _by_name(tree: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))
