"""Which tokens are learned, for every family of chat templates, against lists made by hand."""

from pathlib import Path

import chat_templates as family
import pytest
from data_reading import make_examples

from dora_mlx.data.records import Record
from dora_mlx.data.report import Report
from dora_mlx.data.tokenizing import ExampleMaker
from dora_mlx.errors import UserError

KINDS = ["bytes", "sentencepiece"]
TURNS = ("Hi there", "I am well.", "Be kind?", "It is two.")


def record(*turns, system=None, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Record(tuple(messages), Path("chat.jsonl"), 1, **fields)


def runs(example, tokenizer):
    """``[(trained, text), ...]``: all tokens of an example, neighbours of one kind together."""
    found = []
    for token, trained in zip(
        tokenizer.convert_ids_to_tokens(example.tokens.tolist()), example.trained, strict=True
    ):
        if not found or found[-1][0] != bool(trained):
            found.append((bool(trained), ""))
        found[-1] = (bool(trained), found[-1][1] + token)
    marks = (("\u2581", " "), ("\u0120", " "), ("\u010a", "\n"))
    for mark, plain in marks:
        found = [(trained, text.replace(mark, plain)) for trained, text in found]
    return found


# Template, beginning and end of text, then the two-turn conversation: masked, learned, masked...
FAMILIES = {
    "chatml": (family.CHATML, None, "<|im_end|>", [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "I am well.<|im_end|>",
        "\n<|im_start|>user\nBe kind?<|im_end|>\n<|im_start|>assistant\n", "It is two.<|im_end|>",
        "\n",
    ]),
    "llama2": (family.LLAMA2, "<s>", "</s>", [
        "<s>[INST] Hi there [/INST]", " I am well. </s>",
        "<s>[INST] Be kind? [/INST]", " It is two. </s>",
    ]),
    "llama3": (family.LLAMA3, "<|begin_of_text|>", "<|eot_id|>", [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "I am well.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nBe kind?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "It is two.<|eot_id|>",
    ]),
    "mistral": (family.MISTRAL, "<s>", "</s>", [
        "<s>[INST] Hi there[/INST]", " I am well.</s>",
        "[INST] Be kind?[/INST]", " It is two.</s>",
    ]),
    # Its end of turn is not the end of text that the tokenizer names.
    "gemma": (family.GEMMA, "<bos>", "<eos>", [
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
        "I am well.<end_of_turn>",
        "\n<start_of_turn>user\nBe kind?<end_of_turn>\n<start_of_turn>model\n",
        "It is two.<end_of_turn>", "\n",
    ]),
    "phi": (family.PHI, None, "<|end|>", [
        "<|user|>\nHi there<|end|>\n<|assistant|>\n", "I am well.<|end|>",
        "\n<|user|>\nBe kind?<|end|>\n<|assistant|>\n", "It is two.<|end|>", "\n<|end|>",
    ]),
    # The model has to end the text itself where nothing else stops it.
    "phi, end of text": (family.PHI, None, "<|endoftext|>", [
        "<|user|>\nHi there<|end|>\n<|assistant|>\n", "I am well.<|end|>",
        "\n<|user|>\nBe kind?<|end|>\n<|assistant|>\n", "It is two.<|end|>\n<|endoftext|>",
    ]),
    "zephyr": (family.ZEPHYR, "<s>", "</s>", [
        "<|user|>\nHi there</s>\n<|assistant|>\n", "I am well.</s>",
        "\n<|user|>\nBe kind?</s>\n<|assistant|>\n", "It is two.</s>", "\n",
    ]),
    "generation tags": (family.TAGGED, None, "<|im_end|>", [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "I am well.<|im_end|>",
        "\n<|im_start|>user\nBe kind?<|im_end|>\n<|im_start|>assistant\n", "It is two.<|im_end|>",
        "\n",
    ]),
}  # fmt: skip


def alternating(*texts):
    return [(place % 2 == 1, text) for place, text in enumerate(texts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_with_its_end_is_learned_and_nothing_else(name, kind):
    template, bos, eos, expected = FAMILIES[name]
    tokenizer = family.tokenizer_for(template, kind, bos, eos)
    (example,) = make_examples([record(*TURNS)], tokenizer, 512).examples
    texts = alternating(*expected)
    found = runs(example, tokenizer)
    if kind == "sentencepiece":
        # The mark of a word's beginning that it puts before a text has no character.
        found[0] = (False, found[0][1].removeprefix(" "))
    assert found == texts
    # Token for token what mlx-lm's chat sends, so no special token comes twice.
    assert example.tokens.tolist() == list(tokenizer.apply_chat_template(
        [dict(message) for message in record(*TURNS).messages]
    ))  # fmt: skip
    (last,) = make_examples([record(*TURNS)], tokenizer, 512, train_on="last").examples
    assert "".join(text for trained, text in runs(last, tokenizer) if trained) == expected[3]


@pytest.mark.parametrize("kind", KINDS)
def test_qwen3_learns_each_answer_as_the_model_sees_it(kind):
    # Rendered as one text, the first answer would lose the empty thought it has in use.
    tokenizer = family.tokenizer_for(family.QWEN3, kind)
    report = Report("chat.jsonl")
    made = list(ExampleMaker(tokenizer, 512).make([record(*TURNS)], report))
    first, second = ([(t, x.lstrip(" ")) for t, x in runs(e, tokenizer)] for e in made[0][1])
    assert first == alternating(
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nI am well.<|im_end|>",
        "\n",
    )
    assert second == alternating(
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nI am well.<|im_end|>\n"
        "<|im_start|>user\nBe kind?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nIt is two.<|im_end|>",
        "\n",
    )
    assert any("learned alone" in notice for notice in report.notices)
    # One turn needs no fallback, and thoughts that are given are learned.
    report = Report("chat.jsonl")
    thinking = record(*TURNS[:2])
    thinking.messages[1]["reasoning_content"] = "two"
    ((_, (example,), _),) = ExampleMaker(tokenizer, 512).make([thinking], report)
    assert runs(example, tokenizer)[1][1] == "<think>\ntwo\n</think>\n\nI am well.<|im_end|>"
    assert not report.notices


def test_mistral_moves_the_system_message_so_answers_are_learned_alone():
    tokenizer = family.tokenizer_for(family.MISTRAL, "bytes", "<s>", "</s>")
    first, second = make_examples([record(*TURNS, system="Be kind.")], tokenizer, 512).examples
    assert runs(first, tokenizer) == alternating(
        "<s>[INST] Be kind.\n\nHi there[/INST]", " I am well.</s>"
    )
    assert runs(second, tokenizer) == alternating(
        "<s>[INST] Hi there[/INST] I am well.</s>[INST] Be kind.\n\nBe kind?[/INST]",
        " It is two.</s>",
    )


def test_llama2_system_message_is_context():
    tokenizer = family.tokenizer_for(family.LLAMA2, "bytes", "<s>", "</s>")
    (example,) = make_examples([record(*TURNS[:2], system="Be kind.")], tokenizer, 512).examples
    assert runs(example, tokenizer) == alternating(
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi there [/INST]", " I am well. </s>"
    )


def test_prompt_that_opens_a_thought_is_said_and_the_answer_still_learned():
    tokenizer = family.tokenizer_for(family.OPEN_THOUGHT)
    report = Report("chat.jsonl")
    ((_, (example,), _),) = ExampleMaker(tokenizer, 512).make([record(*TURNS[:2])], report)
    assert runs(example, tokenizer) == alternating(
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "I am well.<|im_end|>",
        "\n",
    )
    assert any("another start of the answer than in use" in notice for notice in report.notices)


def test_template_that_refuses_a_conversation_names_the_line():
    tokenizer = family.tokenizer_for(family.GEMMA, "bytes", "<bos>", "<eos>")
    with pytest.raises(UserError, match=r"line 1: .*System role not supported"):
        make_examples([record(*TURNS, system="Be kind.")], tokenizer, 512)


def test_template_that_rewrites_everything_is_refused():
    tokenizer = family.tokenizer_for("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(UserError, match="rewrites the conversation"):
        make_examples([record(*TURNS)], tokenizer, 512)


def test_tool_results_and_context_answers_are_never_learned():
    tokenizer = family.tokenizer_for(family.CHATML)
    messages = [
        {"role": "user", "content": "What is one plus one?"},
        {"role": "assistant", "content": "It is two.", "weight": 0},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "call", "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "I am well."},
        {"role": "user", "content": "not answered"},
    ]
    conversation = Record(tuple(messages), Path("chat.jsonl"), 1)
    (example,) = make_examples([conversation], tokenizer, 512).examples
    learned = [text for trained, text in runs(example, tokenizer) if trained]
    assert learned == ["call<|im_end|>", "I am well.<|im_end|>"]
    assert "not answered" not in tokenizer.decode(example.tokens.tolist())


def test_plain_text_is_learned_whole_and_ends_once():
    tokenizer = family.tokenizer_for(family.CHATML)
    (example,) = make_examples(
        [Record((), Path("a.txt"), 1, "It is two.")], tokenizer, 512
    ).examples
    assert tokenizer.decode(example.tokens.tolist()) == "<s>It is two.<|im_end|>"
    assert example.trained.tolist() == [False] + [True] * (len(example) - 1)
