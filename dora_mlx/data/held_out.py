"""Questions that a run never trained on, with the answers its data gives: to ask in a chat."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dora_mlx.config import TrainConfig
from dora_mlx.data.preparation import source_of, training_source
from dora_mlx.data.records import Record, RecordReader, Split, find_data
from dora_mlx.run_folder import RunFolder


@dataclass(frozen=True)
class HeldOutQuestion:
    """A conversation of the validation set up to its last answer, and that answer.

    ``messages`` are ``{"role": ..., "content": ...}``, the last one from the user.
    """

    messages: tuple[dict[str, Any], ...]
    answer: str


def held_out_questions(folder: RunFolder, limit: int = 8) -> list[HeldOutQuestion]:
    """The first questions of a run's validation set, ``limit`` of them at most.

    Raises:
        UserError: If the data of the run are gone or cannot be read.
    """
    options = folder.read_config()["options"]
    config = TrainConfig.from_dict(options, where=str(folder.config_file))
    return list(islice(_questions(config), limit))


def _questions(config: TrainConfig) -> Iterator[HeldOutQuestion]:
    valid_data = None if config.valid_data is None else source_of(config.valid_data)
    files = find_data(training_source(config), valid_data)
    reader = RecordReader(files.valid or files.train, config.data_form, config.columns)
    split = None if files.valid else Split(config.valid_fraction, config.seed)
    for record in reader:
        if split is None or split.is_valid(record.digest()):
            question = _question(record)
            if question is not None:
                yield question


def _question(record: Record) -> HeldOutQuestion | None:
    """The last answer that follows a user's message, if it is text and no tools are needed."""
    messages = list(record.messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2 or record.tools or messages[-2]["role"] != "user":
        return None
    *before, answer = messages
    return HeldOutQuestion(tuple(before), answer["content"]) if answer["content"] else None
