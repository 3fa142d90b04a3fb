"""The ``ollama`` format: a GGUF file and the Modelfile that Ollama makes a model from.

Ollama does not run the chat template in a GGUF file; it compares it with a list of its own and
falls back to the bare prompt. So the Modelfile states the template in Ollama's language. It is
derived from the model's own template by what that writes around the messages of a few
conversations, and kept only when it gives the same text for others.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from dora_mlx.exporting.gguf.hyperparameters import read_hyperparameters, read_model_config
from dora_mlx.exporting.gguf.vocabulary import Vocabulary, read_vocabulary
from dora_mlx.exporting.gguf.write import plan_file
from dora_mlx.exporting.gguf_file import WRITER as GGUF
from dora_mlx.exporting.ollama_template import ChatPieces, find_pieces
from dora_mlx.exporting.staging import Progress, staged_folder
from dora_mlx.exporting.writer import ExportSource, Reading
from dora_mlx.model_config import read_json_if_there

MODELFILE = "Modelfile"
# Ollama's default of 4096 tokens cuts longer chats; more than this costs memory that few need.
_LONGEST_CONTEXT = 8192
# Names in generation_config.json, and in a Modelfile.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_NO_TEMPLATE = (
    "The chat template could not be put into Ollama's language, so Ollama will guess one: "
    "compare its first answers with the trained model's."
)


class OllamaWriter:
    """See ``Writer``."""

    def refuse(self, source: ExportSource, quant: str) -> None:
        """Refuse what has no GGUF form."""
        GGUF.refuse(source, quant)

    def size(self, source: ExportSource, quant: str) -> int:
        """Bytes of the GGUF file."""
        return GGUF.size(source, quant)

    def write(
        self,
        source: ExportSource,
        output: Path,
        quant: str,
        progress: Progress | None = None,
        *,
        overwrite: bool = False,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        """Write the folder: the GGUF file and the Modelfile."""
        with staged_folder(output, self.size(source, quant), overwrite) as folder:
            file = folder / f"{output.name}.gguf"
            GGUF.write(source, file, quant, progress)
            (folder / MODELFILE).write_text(_modelfile(source, file.name), encoding="utf-8")
            if check is not None:
                check(folder)

    def read(self, source: ExportSource, written: Path, quant: str, tokens: mx.array) -> Reading:
        """Read the GGUF file back; Ollama itself is not run."""
        reading = GGUF.read(source, next(written.glob("*.gguf")), quant, tokens)
        if _pieces(source):
            return reading
        return replace(reading, note=" ".join(filter(None, [reading.note, _NO_TEMPLATE])))


WRITER = OllamaWriter()


def _modelfile(source: ExportSource, file_name: str) -> str:
    vocabulary = _vocabulary(source)
    numbers = read_hyperparameters(*read_model_config(source.base_dir))
    pieces = _pieces(source)
    lines = [f"FROM ./{file_name}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
        if pieces.default_system:
            lines.append(f'SYSTEM """{pieces.default_system}"""')
    stops = dict.fromkeys([vocabulary.eos, vocabulary.eot, vocabulary.eom])
    texts = [vocabulary.tokens[stop] for stop in stops if stop is not None]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]
    lines.append(f"PARAMETER num_ctx {min(numbers.context_length, _LONGEST_CONTEXT)}")
    settings = read_json_if_there(source.base_dir / "generation_config.json")
    lines += [
        f"PARAMETER {theirs} {settings[ours]}"
        for ours, theirs in _PARAMETERS.items()
        if settings.get(ours) is not None
    ]
    return "\n".join(lines) + "\n"


def _vocabulary(source: ExportSource) -> Vocabulary:
    plan = plan_file(source.base_dir, source.weights, "f16")
    return read_vocabulary(source.base_dir, plan.rows(), source.pre)


def _pieces(source: ExportSource) -> ChatPieces | None:
    vocabulary = _vocabulary(source)
    bos = vocabulary.tokens[vocabulary.bos] if vocabulary.add_bos else ""
    return find_pieces(source.base.tokenizer, bos, vocabulary.tokens[vocabulary.eos])
