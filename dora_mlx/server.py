"""mlx-lm's server, which speaks OpenAI's protocol, with the adapters of this package.

A request names who answers in its field ``model``: an adapter, or the base model. Nothing else can
be asked for: no other model is loaded or downloaded, and no path is opened.
"""

import argparse
import json
import threading
from http.server import ThreadingHTTPServer
from io import BytesIO
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator, get_system_fingerprint

from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.errors import UserError
from dora_mlx.sampling import Sampling

# What mlx-lm's server calls the model of a request that names none.
_DEFAULT = "default_model"
_KEPT_PROMPTS = 10


class AdapterServer:
    """An HTTP server for one base model and its adapters.

    Args:
        adapters: The base model with its adapters; the one in use answers by default.
        base_name: What requests call the base model.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        sampling: What applies where a request does not say: length, temperature, top-p, top-k
            and min-p.
        origins: Web pages, as ``https://example.org``, that browsers may let use the server.

    Raises:
        UserError: If the address cannot be listened on.
    """

    def __init__(
        self,
        adapters: SwappableModel,
        base_name: str,
        host: str,
        port: int,
        sampling: Sampling,
        origins: list[str],
    ):
        self._provider = _Provider(adapters, base_name, _settings(sampling, origins))
        fingerprint = get_system_fingerprint()

        def handler(*args: Any) -> _Handler:
            return _Handler(self._living_generator(), *args, system_fingerprint=fingerprint)

        try:
            self._http = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise UserError(
                f"Cannot listen on {host}, port {port}: {error.strerror}. Choose another --port."
            ) from error
        # It starts a thread, so it comes when nothing can fail any more.
        self._generator = self._new_generator()
        self._replacing = threading.Lock()

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}/v1"

    @property
    def names(self) -> list[str]:
        """What the field ``model`` of a request may be; the default first."""
        return self._provider.names

    def run(self) -> None:
        """Serve until ``stop`` is called or an exception comes, and end every thread."""
        try:
            self._http.serve_forever(poll_interval=0.1)
        finally:
            self._http.server_close()
            self._generator.stop_and_join()

    def stop(self) -> None:
        """Make ``run`` return; for other threads."""
        self._http.shutdown()

    def _new_generator(self) -> ResponseGenerator:
        return ResponseGenerator(self._provider, LRUPromptCache(_KEPT_PROMPTS))

    def _living_generator(self) -> ResponseGenerator:
        """The thread that answers; a new one where a request was too much for the last."""
        with self._replacing:
            if not self._generator.is_healthy:
                self._generator = self._new_generator()
            return self._generator


class _Provider(ModelProvider):
    """Answers requests for a model by putting the adapter of that name into the loaded one."""

    # mlx-lm has them empty until it has loaded a model.
    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, adapters: SwappableModel, base_name: str, settings: argparse.Namespace):
        super().__init__(settings)
        self._adapters = adapters
        self.vocabulary = adapters.base.vocabulary
        first = adapters.active
        others = [name for name in adapters.names if name != first]
        self.names = [*([first] if first else []), *others, base_name]
        self._known: dict[str, str | None] = {name: name for name in adapters.names}
        self._known |= {base_name: None, _DEFAULT: first}

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Put what the request names into the model; called between two answers only."""
        wanted = adapter_path if adapter_path is not None else model_path
        if wanted not in self._known or model_path not in self._known:
            unknown = model_path if model_path not in self._known else wanted
            raise UserError(f"There is no model {unknown!r} here; there are {self.names}.")
        if draft_model_path not in (None, _DEFAULT):
            raise UserError("There is no draft model here.")
        self._adapters.use(self._known[wanted])
        self.model_key = (str(self._adapters.base.path), self._known[wanted], None)
        self.model, self.tokenizer = self._adapters.base.model, self._adapters.base.tokenizer
        self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(self.model))
        return self.model, self.tokenizer


class _Handler(APIHandler):
    def do_POST(self) -> None:
        """As mlx-lm does, for a JSON object: it would write anything else into the log."""
        connection = self.rfile
        try:
            body = connection.read(_length(self.headers.get("Content-Length")))
            if not isinstance(json.loads(body.decode()), dict):
                raise ValueError("it is another kind of value")
        except (ValueError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else error
            self._refuse(f"The body of the request is not a JSON object: {what}.")
            return
        self.rfile = BytesIO(body)
        try:
            super().do_POST()
        finally:
            self.rfile = connection

    def validate_model_parameters(self) -> None:
        """As mlx-lm does, and what else would end the thread that answers, or the program."""
        provider: Any = self.response_generator.model_provider
        tokens = range(provider.vocabulary)
        if not _is_bias(self.logit_bias, tokens):
            raise ValueError(f"'logit_bias' has to give tokens below {len(tokens):,} numbers.")
        super().validate_model_parameters()
        if not _are_texts(self.body.get("stop")):
            raise ValueError("'stop' has to be a text or a list of texts.")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError("'seed' has to be at least 0 and below 2 ** 64.")
        if not isinstance(self.stream_options or {}, dict):
            raise ValueError("'stream_options' has to be an object.")
        if self.xtc_threshold > 0.5:
            raise ValueError("'xtc_threshold' has to be at most 0.5.")
        # As many as there are, or more, are all of them.
        self.top_k = 0 if self.top_k >= len(tokens) else self.top_k

    def handle_chat_completions(self) -> Any:
        """As mlx-lm does, but for text alone: it would fetch images from the addresses given."""
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' has to be a list of at least one message.")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"Message {number} has to be an object with a role and content.")
            if not _is_text(message.get("content")):
                raise ValueError(f"Only text can be answered here; see message {number}.")
        return super().handle_chat_completions()

    def handle_text_completions(self) -> Any:
        """As mlx-lm does, for one text."""
        prompt = self.body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("'prompt' has to be a text that is not empty.")
        return super().handle_text_completions()

    def handle_models_request(self) -> None:
        """List what can be asked for, and not what else lies on this machine."""
        provider: Any = self.response_generator.model_provider
        models = [
            {"id": name, "object": "model", "created": self.created} for name in provider.names
        ]
        self._send(200, {"object": "list", "data": models})

    def _refuse(self, message: str) -> None:
        self._send(400, {"error": message})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _length(header: str | None) -> int:
    """Bytes of a request's body."""
    if header is None or not header.isdecimal():
        raise ValueError("its Content-Length is missing or no number")
    return int(header)


def _is_bias(bias: Any, tokens: range) -> bool:
    """Whether it gives some of the tokens a number each, or is nothing."""
    return bias is None or (
        isinstance(bias, dict)
        and all(token.isdecimal() and int(token) in tokens for token in bias)
        and all(isinstance(number, int | float) for number in bias.values())
    )


def _are_texts(stop: Any) -> bool:
    """Whether it is a text, a list of texts, or nothing."""
    texts = stop if isinstance(stop, list) else [stop or ""]
    return all(isinstance(text, str) for text in texts)


def _is_text(content: Any) -> bool:
    """Whether the content of a message is text, in parts or whole; a tool's call has none."""
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and "text" in part
            for part in content
        )
    return content is None or isinstance(content, str)


def _settings(sampling: Sampling, origins: list[str]) -> argparse.Namespace:
    """The options that mlx-lm's server reads, as its command line would leave them."""
    return argparse.Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        pipeline=False,
        allowed_origins=origins,
        max_tokens=sampling.max_tokens,
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=_KEPT_PROMPTS,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=DEFAULT_QUANTIZED_KV_START,
    )
