"""A model to talk to: one loaded base, any number of adapters, prompts kept between turns."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import TextStateMachine
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder
from dora_mlx.sampling import Sampling

Message = dict[str, str]

# For ``ChatModel.stream``: the adapter that ``use`` chose. No adapter can have this name.
IN_USE: Final = ""

# Conversations whose processed prompt is kept, and the memory they may take together.
_KEPT_PROMPTS = 8
_KEPT_BYTES = 2 << 30
_REPETITION_WINDOW = 64


class ChatModel:
    """Answers conversations with the base model or any of its adapters.

    One answer at a time: whoever asks while another one is being given gets a ``UserError`` and
    nothing waits. Any thread may ask.

    Args:
        adapters: A base model with its adapters; both belong to this object from now on.

    Attributes:
        base: The loaded base model with its tokenizer and configuration.
    """

    def __init__(self, adapters: SwappableModel):
        self.base = adapters.base
        self._swapping = adapters
        self._prompts = LRUPromptCache(_KEPT_PROMPTS, _KEPT_BYTES)
        # What prompts are kept under: an adapter that is replaced must not find those of the old.
        self._versions: dict[str | None, int] = {}
        self._answering = threading.Lock()

    @classmethod
    def load(cls, model: str) -> "ChatModel":
        """The base model of that alias, folder or Hub name, without adapters.

        Raises:
            UserError: If there is no such model, or it cannot be loaded.
        """
        return cls(SwappableModel.load(model))

    @classmethod
    def of_run(cls, folder: RunFolder, checkpoint: str | None = None) -> "ChatModel":
        """The base model of a run with the run's adapter, under the run's name and in use.

        Raises:
            UserError: If the run has no such adapter, or its base model is gone or has changed.
        """
        return cls(SwappableModel.of_run(folder, checkpoint))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return self._swapping.names

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; ``None`` is the base model."""
        return self._swapping.active

    def add_adapter(
        self, name: str, source: RunFolder | Path, checkpoint: str | None = None
    ) -> None:
        """Read an adapter and keep it under ``name``, in place of another one there.

        Args:
            name: What ``use`` and ``stream`` call it.
            source: A run, or a folder with an adapter of dora_mlx, mlx-lm or PEFT.
            checkpoint: Of a run: ``None`` for the best adapter, ``last`` or a step's number for a
                checkpoint's.

        Raises:
            UserError: Listing everything that does not fit, or if the model is answering.
        """
        if not name:
            raise UserError("An adapter needs a name.")
        with self._alone():
            self._swapping.add(name, self._swapping.read(source, checkpoint))
            self._versions[name] = self._versions.get(name, 0) + 1

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; one in use gives way to the base model.

        Raises:
            UserError: If the model is answering.
        """
        with self._alone():
            self._swapping.remove(name)

    def use(self, name: str | None) -> None:
        """Answer with the adapter ``name`` from now on; ``None`` is the base model.

        Raises:
            UserError: If there is no such adapter, or the model is answering.
        """
        with self._alone():
            self._swapping.use(name)

    def stream(
        self,
        messages: list[Message],
        sampling: Sampling | None = None,
        *,
        adapter: str | None = IN_USE,
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece; close the iterator to cancel it.

        What the model has read of a conversation is kept for its next turn, for every adapter.

        Args:
            messages: ``{"role": ..., "content": ...}``, the last one from the user.
            sampling: Length and randomness. Default: ``Sampling()``.
            adapter: Who answers, whoever ``use`` chose: a name, or ``None`` for the base model.

        Raises:
            UserError: If there is no such adapter, the model is answering already, or the model's
                chat template cannot express the conversation.
        """
        sampling = sampling or Sampling()
        with self._alone():
            before = self.active
            self._swapping.use(before if adapter == IN_USE else adapter)
            try:
                yield from self._answer(self._tokens_of(messages), sampling)
            finally:
                self._swapping.use(before)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._answering.acquire(blocking=False):
            raise UserError("The model is answering already: wait for the answer or stop it.")
        try:
            yield
        finally:
            self._answering.release()

    def _tokens_of(self, messages: list[Message]) -> list[int]:
        from jinja2 import TemplateError

        try:
            tokens: list[int] = self.base.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(f"The model's chat template refuses this: {error}.") from error
        return tokens

    def _answer(self, tokens: list[int], sampling: Sampling) -> Iterator[str]:
        """Generate after ``tokens`` and keep what was read for the next turn."""
        key = (self.active, self._versions.get(self.active, 0))
        # At least one token has to be left to start from.
        cache, rest = self._prompts.fetch_nearest_cache(key, tokens[:-1])
        rest = [*rest, tokens[-1]]
        if cache is None:
            cache = make_prompt_cache(self.base.model)
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        generated = stream_generate(
            self.base.model,
            self.base.tokenizer,
            rest,
            max_tokens=sampling.max_tokens,
            sampler=self._sampler(sampling),
            logits_processors=_processors(sampling, tokens[: len(tokens) - len(rest)]),
            prompt_cache=cache,
        )
        read = list(tokens)
        with closing(generated):
            try:
                yield from _until_stop(_recorded(generated, read), sampling.stop)
            except GeneratorExit:
                # Cancelled between two tokens, so cache and tokens agree.
                self._keep(key, read, cache)
                raise
            self._keep(key, read, cache)

    def _keep(self, key: tuple[str | None, int], read: list[int], cache: list[Any]) -> None:
        # In the thread that made them: MLX's lazy arrays belong to its streams.
        mx.eval([entry.state for entry in cache])
        self._prompts.insert_cache(key, read, cache)

    def _sampler(self, sampling: Sampling) -> Any:
        all_tokens = sampling.top_k >= self.base.tokenizer.vocab_size
        return make_sampler(
            sampling.temperature,
            top_p=sampling.top_p,
            top_k=0 if all_tokens else sampling.top_k,
            min_p=sampling.min_p,
        )


def _processors(sampling: Sampling, read: list[int]) -> list[Any]:
    """The repetition penalty over what was read before as well as what comes."""
    if sampling.repetition_penalty == 1:
        return []
    before = mx.array(read[-_REPETITION_WINDOW:], mx.uint32)
    (penalize,) = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty, repetition_context_size=_REPETITION_WINDOW
    )
    return [lambda tokens, logits: penalize(mx.concatenate([before, tokens]), logits)]


def _recorded(generated: Iterator[Any], read: list[int]) -> Iterator[tuple[str, bool]]:
    """Text of every token, and whether it is the last; the tokens go to ``read``."""
    for piece in generated:
        read.append(piece.token)
        yield piece.text, piece.finish_reason is not None


def _until_stop(pieces: Iterator[tuple[str, bool]], stop: tuple[str, ...]) -> Iterator[str]:
    """The text before the first of the ``stop`` texts, as soon as it can be none of them."""
    machine = TextStateMachine({"answer": [(text, None) for text in stop if text]})
    state = machine.make_state("answer")
    for text, is_last in pieces:
        state, safe, name = TextStateMachine.step(state, text)
        if safe:
            yield safe
        if name is None:
            return
        if is_last and (held := TextStateMachine.flush(state)[1]):
            yield held
