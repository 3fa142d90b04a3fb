"""mlx-lm's server, which speaks OpenAI's protocol, with the adapters of this package.

A request names who answers in its field ``model``: an adapter, or the base model. Nothing else can
be asked for: no other model is loaded or downloaded, and no path is opened.
"""

import argparse
import json
from http.server import ThreadingHTTPServer
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
            return _Handler(self._generator, *args, system_fingerprint=fingerprint)

        try:
            self._http = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise UserError(
                f"Cannot listen on {host}, port {port}: {error.strerror}. Choose another --port."
            ) from error
        # It starts a thread, so it comes when nothing can fail any more.
        self._generator = ResponseGenerator(self._provider, LRUPromptCache(_KEPT_PROMPTS))

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


class _Provider(ModelProvider):
    """Answers requests for a model by putting the adapter of that name into the loaded one."""

    # mlx-lm has them empty until it has loaded a model.
    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, adapters: SwappableModel, base_name: str, settings: argparse.Namespace):
        super().__init__(settings)
        self._adapters = adapters
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
    def handle_chat_completions(self) -> Any:
        """As mlx-lm does, but for text alone: it would fetch images from the addresses given."""
        parts = [m.get("content") for m in self.body.get("messages", [])]
        kinds = {
            part.get("type") for content in parts if isinstance(content, list) for part in content
        }
        if kinds - {"text"}:
            raise ValueError("Only text can be answered here.")
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        """List what can be asked for, and not what else lies on this machine."""
        provider: Any = self.response_generator.model_provider
        models = [
            {"id": name, "object": "model", "created": self.created} for name in provider.names
        ]
        content = json.dumps({"object": "list", "data": models}).encode()
        self._set_completion_headers(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


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
