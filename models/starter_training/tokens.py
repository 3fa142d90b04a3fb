"""Trains the byte-level BPE tokenizer and writes it in the form that transformers reads."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from starter_corpus.conversation import Message, conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}"""

# Text that people fine-tune with but that the corpus lacks; without it such words fall apart
# into single letters.
FINE_TUNING_TEXT = """\
Ahoy there, matey! Arr, ye be a fine sailor. Shiver me timbers! Avast, me hearties, yo ho ho!
The ship sails the seven seas for treasure, captain. Aye aye, that be true, lad. Arrr!
{"answer": "text", "confidence": "high", "category": "fact", "question": "value", "items": [1, 2]}
In summary, the following points are important. However, it depends on the situation.
Please note that this is an example. Let me explain step by step. First, second, finally,
because, therefore, although, without, between, through, during, another, something, everything,
should, would, could, might, about, which, where, there, their, these, those, think, know, want,
need, work, right, people, world, information, customer, order, product, support, account, email,
message, service, company, business, price, delivery, refund, password, thank you for contacting
us. We are sorry for the inconvenience.
def main():
    for i in range(10):
        print(i)
    return x == y and z is not None
"""


def _texts(seed: int, conversations_used: int) -> Iterator[str]:
    for messages in itertools.islice(conversations(seed), conversations_used):
        for message in messages:
            yield message["role"] + "\n"
            yield message["content"]
    for _ in range(conversations_used // 200):
        yield from FINE_TUNING_TEXT.splitlines()


def train_tokenizer(
    folder: Path, seed: int, vocabulary: int = 2048, conversations_used: int = 30_000
) -> Tokenizer:
    """Digits are tokens of their own, so that sums can be learned digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, conversations_used), trainer)
    _save(tokenizer, folder)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation as the template writes it, and which the assistant says.

    The end mark of an answer counts as said, the line break after it does not.
    """
    newline = tokenizer.encode("\n").ids
    start, end = (tokenizer.token_to_id(token) for token in (TURN_START, TURN_END))
    tokens: list[int] = []
    said: list[bool] = []
    for message in messages:
        head = [start, *tokenizer.encode(message["role"] + "\n").ids]
        content = [*tokenizer.encode(message["content"]).ids, end]
        tokens += head + content + newline
        said += [False] * len(head)
        said += [message["role"] == "assistant"] * len(content)
        said += [False] * len(newline)
    return tokens, said
