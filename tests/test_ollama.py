"""The Modelfile beside a GGUF file, and the chat template in Go's language inside it."""

import chat_templates
import pytest
from exporting_models import STARTER, some_tokens
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.ollama import WRITER
from dora_mlx.exporting.ollama_template import find_pieces
from dora_mlx.exporting.writer import ExportSource
from dora_mlx.loading import load_base

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}"
    "{% endif %}" + chat_templates.CHATML
)
IN_FIRST_USER = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\n\n' %}{% set chat = messages[1:] %}{% else %}{% set first = '' %}{% set chat = messages %}"
    "{% endif %}{% for m in chat %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else "
    "m.role) + '\n' + (first if loop.first else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DATED = (
    "{{ '<|im_start|>system\nToday is ' + (range(9) | random | string) + '<|im_end|>\n' }}"
    + chat_templates.CHATML
)
REGULAR = {
    "chatml": chat_templates.CHATML,
    "default system": DEFAULT_SYSTEM,
    "in first user": IN_FIRST_USER,
    "llama3": chat_templates.LLAMA3,
    "gemma": chat_templates.GEMMA,
    "phi": chat_templates.PHI,
    "zephyr": chat_templates.ZEPHYR,
    "starter": (STARTER / "chat_template.jinja").read_text(),
}
IRREGULAR = {"random": DATED, "last user": chat_templates.MISTRAL}


class Templated:
    """What ``find_pieces`` uses of a tokenizer."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._raise
        return environment.from_string(self.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="</s>",
        )

    def _raise(self, message):
        raise TemplateError(message)


@pytest.mark.parametrize("name", REGULAR)
def test_regular_templates_are_translated(name):
    pieces = find_pieces(Templated(REGULAR[name]), "<s>", "</s>")
    assert pieces is not None
    assert not pieces.render([{"role": "user", "content": "x"}]).startswith("<s>")


def test_the_pieces_of_chatml():
    pieces = find_pieces(Templated(chat_templates.CHATML), "", "</s>")
    assert pieces.go_template() == (
        '{{- if .System }}{{- "<|im_start|>system\\n" }}{{ .System }}{{- "<|im_end|>\\n" }}'
        "{{- end }}{{- range .Messages }}"
        '{{- if eq .Role "user" }}{{- "<|im_start|>user\\n" }}{{ .Content }}{{- "<|im_end|>\\n" }}'
        '{{- else if eq .Role "assistant" }}'
        '{{- "<|im_start|>assistant\\n" }}{{ .Content }}{{- "<|im_end|>\\n" }}'
        '{{- end }}{{- end }}{{- "<|im_start|>assistant\\n" }}'
    )
    assert find_pieces(Templated(DEFAULT_SYSTEM), "", "</s>").default_system == "Be good."
    assert find_pieces(Templated(IN_FIRST_USER), "<s>", "</s>").in_user


@pytest.mark.parametrize("name", IRREGULAR)
def test_others_are_left_to_ollama(name):
    assert find_pieces(Templated(IRREGULAR[name]), "<s>", "</s>") is None
    assert find_pieces(Templated(None), "", "") is None


def test_the_folder_of_the_starter(tmp_path):
    base = load_base(STARTER)
    source = ExportSource(base, MergedWeights(base.model))
    seen = []
    WRITER.write(source, tmp_path / "bot", "q8_0", check=lambda f: seen.append(sorted(f.iterdir())))
    assert [path.name for path in seen[0]] == ["Modelfile", "bot.gguf"]
    lines = (tmp_path / "bot" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./bot.gguf"
    assert lines[1].startswith('TEMPLATE """{{-')
    assert lines[1].endswith('{{- "<|im_start|>assistant\\n" }}"""')
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 512" in lines
    reading = WRITER.read(source, tmp_path / "bot", "q8_0", some_tokens())
    # An empty note was an empty line under the report.
    assert reading.note != ""
    assert reading.tensors == 6 * 9 + 2
    assert "will guess" not in (reading.note or "")
