"""Loss on a set that has nothing to do with the training data: what a model forgets."""

from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn

from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch, validation_batches
from dora_mlx.data.preparation import source_of, tokenize
from dora_mlx.data.records import find_data
from dora_mlx.errors import UserError
from dora_mlx.layers import hoisted_norms
from dora_mlx.training.loss import best_loss


@dataclass(frozen=True)
class GeneralSet:
    """Batches to measure a model on."""

    batches: list[Batch]

    @classmethod
    def read(cls, config: TrainConfig, data: str, tokenizer: Any) -> "GeneralSet":
        """Tokenize the file or data set ``data`` with the limits of ``config``.

        Raises:
            UserError: If it cannot be read, has bad rows or holds nothing to measure.
        """
        source = find_data(source_of(data), None).train
        tokenized = tokenize(config, source, tokenizer)
        tokenized.report.raise_errors()
        examples = tokenized.all().examples
        if not len(examples):
            raise UserError(f"{data} has no answer within --max-seq-length tokens to measure on.")
        return cls(validation_batches(examples, config.batch_size))

    def loss(self, model: nn.Module) -> float:
        """Mean loss of ``model`` over the answers' tokens."""
        model.eval()
        loss_sum, _ = best_loss(model, self.batches[0])
        total, tokens = 0.0, 0
        with hoisted_norms(model):
            for batch in self.batches:
                total += cast(float, loss_sum(model, batch).item())
                tokens += batch.trained_tokens
        return total / tokens
