"""What an export is compared on: the run's own validation examples, as far as they are there."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch, make_batch
from dora_mlx.data.examples import Example, Examples, fit
from dora_mlx.data.preparation import prepare, source_of
from dora_mlx.errors import UserError

# Enough for a stable loss, few enough for three models' logits to fit in memory.
_PROMPTS = 16
_LENGTH = 256
# Logits of one model alive at a time: 256 MiB in float32.
_LOGIT_VALUES = 1 << 26

# Long enough that a wrong rotary frequency or a lost tensor shows in the logits.
_FALLBACK = "Tell me in a few sentences what you can do, and name three things you like."


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare models on.

    Attributes:
        batch: The examples, one a row, padded on the right.
        lengths: ``[B]`` how many positions of each row are no padding.
        measures_loss: Whether the answers are the data's, so that a loss on them means something.
        origin: Where they come from, in words.
    """

    batch: Batch
    lengths: NDArray[np.int32]
    measures_loss: bool
    origin: str

    @property
    def tokens(self) -> mx.array:
        """``[B, L]`` token ids."""
        return mx.array(self.batch.inputs)

    @property
    def used(self) -> NDArray[np.bool_]:
        """``[B, L]``: the positions that are no padding."""
        return np.arange(self.batch.inputs.shape[1])[None] < self.lengths[:, None]


def prompts_of_run(saved: dict[str, Any], tokenizer: Any, vocabulary: int) -> Prompts:
    """Validation examples of a run, or its training examples, or a prompt of our own.

    Args:
        saved: The run's ``config.json``.
        tokenizer: The model's.
        vocabulary: Number of logits of a position.
    """
    config = TrainConfig.from_dict(saved["options"], where="the run")
    source = source_of(config.data or saved["data"]["files"][0])
    try:
        data = prepare(config, source, tokenizer)
    except UserError:
        # Not with its reason: a report may be published, and that names files and lines.
        return fallback_prompts(tokenizer, "the run's data is gone or cannot be read")
    changed = data.fingerprint != saved["data"]["fingerprint"]
    note = ", whose content has changed since the training" if changed else ""
    for examples, kind in ((data.valid.examples, "validation"), (data.train.examples, "training")):
        if len(examples):
            return _chosen(examples, vocabulary, f"the run's {kind} data", note)
    return fallback_prompts(tokenizer, "the run's data has no example")


def fallback_prompts(tokenizer: Any, reason: str) -> Prompts:
    """One conversation of our own; ``reason`` says why it has to do."""
    messages = [
        {"role": "user", "content": _FALLBACK},
        {"role": "assistant", "content": _FALLBACK},
    ]
    ids = np.array(tokenizer.apply_chat_template(messages), np.int32)
    example = Example(ids, np.zeros(len(ids), np.bool_))
    return _prompts([example], False, f"one prompt of our own, because {reason}")


def _chosen(examples: Examples, vocabulary: int, origin: str, note: str) -> Prompts:
    """Examples evenly spaced over the set, as many as memory is set aside for."""
    positions = _LOGIT_VALUES // vocabulary
    length = min(_LENGTH, max(2, positions))
    count = max(1, min(_PROMPTS, len(examples), positions // length))
    indices = np.linspace(0, len(examples) - 1, count).round().astype(int)
    cut = [
        part
        for index in indices
        for part in fit(examples[int(index)], length, "truncate-prompt", keep_first=True)
    ]
    share = f" ({count} of {len(examples)} examples)" if count < len(examples) else ""
    return _prompts(cut, True, origin + share + note)


def _prompts(examples: list[Example], measures_loss: bool, origin: str) -> Prompts:
    lengths = np.array([len(example) - 1 for example in examples], np.int32)
    return Prompts(make_batch(examples), lengths, measures_loss, origin)
