"""What worker processes do. Imports of heavy parts happen inside, in the worker."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dora_mlx import RunFolder, TrainConfig, UserError

if TYPE_CHECKING:
    from dora_mlx import (
        ChatModel,
        DataLook,
        DataOverview,
        HeldOutQuestion,
        MemoryPlan,
        Sampling,
        TokenSpan,
    )


_SECONDS_BETWEEN_PIECES = 0.08

# What this process keeps: the data it looked at last, and the model one talks to.
_looked: dict[str, Any] = {}
_talking: dict[str, Any] = {}


def plan(config: TrainConfig) -> "MemoryPlan":
    """The memory plan of a training."""
    from dora_mlx import plan_memory

    return plan_memory(config)


def look_at_data(options: dict[str, Any]) -> "DataOverview":
    """What a training with these options would find in its data."""
    return _look(options).overview


def example_of_data(options: dict[str, Any], number: int) -> "list[TokenSpan]":
    """The spans of a training example, counted from 0."""
    return _look(options).example(number)


def _look(options: dict[str, Any]) -> "DataLook":
    from dora_mlx import DataLook

    sources = [options.get("data"), options.get("valid_data")]
    stamps = [os.stat(s).st_mtime_ns if s and os.path.exists(s) else None for s in sources]
    key = (sorted(options.items(), key=lambda item: item[0]), stamps)
    if _looked.get("key") != key:
        _looked.clear()
        _looked.update(look=DataLook(TrainConfig.from_dict(options)), key=key)
    return cast("DataLook", _looked["look"])


def talk_about(folder: RunFolder) -> "tuple[list[int], list[HeldOutQuestion]]":
    """The steps whose checkpoints a run keeps, and questions that it did not learn."""
    from dora_mlx import checkpoint_steps, held_out_questions

    try:
        questions = held_out_questions(folder)
    except UserError:
        # The data may be gone; one can still talk about other things.
        questions = []
    return checkpoint_steps(folder.checkpoints_dir), questions


def answer(
    folder: RunFolder,
    checkpoint: str | None,
    conversations: dict[str, list[dict[str, str]]],
    sampling: "Sampling",
) -> Iterator[tuple[str, str, int, float]]:
    """Answers to a conversation each: (who, its text so far, pieces and seconds so far).

    Args:
        folder: The run whose adapter answers as ``adapted``; ``base`` is its base model.
        checkpoint: ``None`` for the best adapter, or a step.
        conversations: What each of ``adapted`` and ``base`` is asked.
        sampling: How answers are drawn.
    """
    chat, adapter = _chat_with(folder, checkpoint)
    for who, messages in conversations.items():
        text, pieces, began, shown = "", 0, time.perf_counter(), 0.0
        name = adapter if who == "adapted" else None
        with closing(chat.stream(messages, sampling, adapter=name)) as stream:
            for piece in stream:
                text += piece
                pieces += 1
                now = time.perf_counter()
                if now - shown >= _SECONDS_BETWEEN_PIECES:
                    shown = now
                    yield who, text, pieces, now - began
        yield who, text, pieces, time.perf_counter() - began


def _chat_with(folder: RunFolder, checkpoint: str | None) -> "tuple[ChatModel, str]":
    """The loaded base of a run with the adapter that was asked for, and the adapter's name."""
    from dora_mlx import ChatModel

    saved = folder.read_config()
    base = (saved["options"]["model"], saved["model"]["fingerprint"])
    name = folder.name if checkpoint is None else f"{folder.name} {checkpoint}"
    # A training replaces its best adapter now and then.
    stamp = (folder.path / "adapters.safetensors").stat().st_mtime_ns
    if _talking.get("base") != base:
        # Before the next one is loaded, the last one has to give its memory back.
        _talking.clear()
        _talking.update(chat=ChatModel.of_run(folder), base=base, stamps={folder.name: stamp})
    chat, stamps = _talking["chat"], _talking["stamps"]
    if stamps.get(name) != stamp:
        chat.add_adapter(name, folder, checkpoint)
        stamps[name] = stamp
    return chat, name


def export(
    folder: RunFolder, output_format: str, output: Path, quant: str, overwrite: bool
) -> Iterator[tuple[str, Any]]:
    """Write a run's model; yields ``("progress", (phase, done, total))``, last the report."""
    from dora_mlx import export_run

    return _with_progress(
        lambda progress: export_run(
            folder, output_format, output, quant=quant, overwrite=overwrite, progress=progress
        )
    )


def size_of_export(folder: RunFolder, output_format: str, output: Path, quant: str) -> Any:
    """Bytes that an export needs and bytes that are free."""
    from dora_mlx import export_size

    return export_size(folder, output_format, quant, output)


def inspect(folder: RunFolder, checkpoint: int | None) -> Iterator[tuple[str, Any]]:
    """Measure what a run changed; yields ``("progress", (done, total))``, last the inspection."""
    from dora_mlx import inspect_run

    return _with_progress(lambda progress: inspect_run(folder, checkpoint, progress))


class _AbandonedError(Exception):
    """Nobody waits for the result any more."""


def _with_progress(job: Callable[[Callable[..., None]], Any]) -> Iterator[tuple[str, Any]]:
    """Run a job that calls back, as a generator; closing it ends the job at its next call.

    Yields:
        ``("progress", arguments of the call)`` now and then, then ``("result", ...)``.
    """
    said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def progress(*values: Any) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        said.put(("progress", values))

    def run() -> None:
        try:
            said.put(("result", job(progress)))
        except _AbandonedError:
            pass
        except BaseException as error:
            said.put(("error", error))

    thread = threading.Thread(target=run)
    thread.start()
    last = 0.0
    try:
        while True:
            kind, value = said.get()
            if kind == "error":
                raise value
            if kind == "result" or time.monotonic() - last >= _SECONDS_BETWEEN_PIECES:
                last = time.monotonic()
                yield kind, value
            if kind == "result":
                return
    finally:
        abandoned.set()
        thread.join()
