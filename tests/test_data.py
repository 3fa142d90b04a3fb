"""Reading, masking, splitting and batching, on real tokenizers and small files."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_reading import make_examples, read_records

from dora_mlx.data.batches import BatchStream, make_batch, validation_batches
from dora_mlx.data.examples import Example
from dora_mlx.data.records import Record, Split, find_data
from dora_mlx.errors import UserError


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def record(*turns, system=None):
    messages = chat(*turns)["messages"]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Record(tuple(messages), Path("chat.jsonl"), 1)


def test_reads_messages_and_prompt_completion(tmp_path):
    path = write(
        tmp_path / "a.jsonl", chat("Hi", "Hello!"), "", {"prompt": "1+1", "completion": "2"}
    )
    first, second = read_records(path)
    assert [message["content"] for message in first.messages] == ["Hi", "Hello!"]
    assert [message["role"] for message in second.messages] == ["user", "assistant"]
    assert (first.line, second.line) == (1, 3)


@pytest.mark.parametrize(
    "encode", [lambda t: t.encode("utf-8-sig"), lambda t: t.replace("\n", "\r\n").encode()]
)
def test_byte_order_mark_and_carriage_returns_are_no_content(tmp_path, encode):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        encode(json.dumps(chat("Hi", "Ho\u2028ho")) + "\n" + json.dumps(chat("a", "b")))
    )
    assert [r.messages[0]["content"] for r in read_records(path)] == ["Hi", "a"]


FAULTS = [
    ('{"messages": [', "line 1, column 15: broken JSON"),
    ("[1, 2]", "expected a JSON object but found a list"),
    ('{"question": "a"}', "'messages'"),
    ('{"messages": []}', "at least one message"),
    ('{"messages": ["hi"]}', "message 1 is text, not an object"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
    ('{"messages": [{"role": "user"}]}', "content of message 1 is missing"),
    ('{"messages": [{"role": "user", "content": 7}]}', "content of message 1 is a number"),
    ('{"messages": [{"role": "user", "content": " "}]}', "message 1 (user) is empty"),
    (json.dumps(chat("only a question")), "no assistant message"),
    (json.dumps({"messages": chat("a", "b")["messages"][::-1]}), "message 1 is from the assistant"),
    (
        json.dumps({"messages": chat("a", "b")["messages"] * 1 + chat("a", "b")["messages"][1:]}),
        "message 3",
    ),
    ("[" * 100_000, "nested too deeply"),
]


def test_one_report_names_every_bad_line(tmp_path):
    lines = [json.dumps(chat("good", "line"))]
    for fault, _ in FAULTS[:12]:
        lines += [fault]
    with pytest.raises(UserError) as caught:
        read_records(write(tmp_path / "bad.jsonl", *lines))
    report = str(caught.value)
    assert "12 bad lines" in report
    for number, (_, expected) in enumerate(FAULTS[:12], start=2):
        line = next(row for row in report.splitlines() if row.startswith(f"  line {number}"))
        assert expected.removeprefix("line 1, ") in line


@pytest.mark.parametrize(("fault", "expected"), FAULTS)
def test_each_fault_alone_is_explained(tmp_path, fault, expected):
    with pytest.raises(UserError, match="line 1") as caught:
        read_records(write(tmp_path / "bad.jsonl", fault))
    assert expected in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is empty"):
        read_records(path)


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "image.jsonl"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(path)


def test_folder_of_splits(tmp_path):
    with pytest.raises(UserError, match=r"no train\.jsonl"):
        find_data(tmp_path)
    write(tmp_path / "train.jsonl", chat("a", "b"))
    assert find_data(tmp_path).valid is None
    write(tmp_path / "valid.jsonl", chat("a", "b"))
    assert find_data(tmp_path).valid == tmp_path / "valid.jsonl"
    with pytest.raises(UserError, match="no data at"):
        find_data(tmp_path / "missing")


def learned(example, tokenizer):
    return tokenizer.decode(example.tokens[example.trained].tolist())


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer):
    conversation = record("Hi there", "Hello!", "And now?", "Bye.", system="Be kind.")
    (example,) = make_examples([conversation], tokenizer, 512).examples
    # Token by token: the end-of-turn token is learned, the line break behind it is not.
    assert learned(example, tokenizer) == "Hello!<|im_end|>Bye.<|im_end|>"
    (example,) = make_examples([conversation], tokenizer, 512, mask_prompt=False).examples
    assert example.trained.tolist() == [False] + [True] * (len(example) - 1)


def test_prompt_of_an_example_is_what_chat_will_send(tokenizer):
    conversation = record("Name three fruits.", "Apples, pears and figs.")
    (example,) = make_examples([conversation], tokenizer, 512).examples
    prompt = tokenizer.apply_chat_template(
        list(conversation.messages[:1]), add_generation_prompt=True
    )
    first_trained = int(example.trained.argmax())
    assert example.tokens[:first_trained].tolist() == prompt


def test_long_examples_are_cut_and_those_without_an_answer_left_out(tokenizer):
    # mlx-lm's trainer gives NaN for a prompt that fills the window.
    long_prompt, long_answer = record("word " * 50, "ok"), record("Hi", "word " * 50)
    result = make_examples([long_prompt, long_answer, record("a", "b")], tokenizer, 40)
    assert (result.counts["cut"], result.dropped) == (1, 1)
    assert len(result.examples[0]) == 40
    assert result.trained_tokens > 20


def split_records(records, fraction, seed):
    split = Split(fraction, seed)
    sides = ([], [])
    for one in records:
        sides[split.is_valid(one.digest())].append(one)
    return sides


def test_split_is_stable_when_rows_are_added():
    records = [record(f"question {n}", "answer") for n in range(400)]
    train, valid = split_records(records[:200], 0.1, seed=3)
    more_train, more_valid = split_records(records, 0.1, seed=3)
    assert all(one in more_valid for one in valid)
    assert all(one in more_train for one in train)
    assert 20 < len(more_valid) < 60
    assert split_records(records, 0.1, seed=4)[1] != more_valid
    twins = split_records([records[0]] * 10, 0.5, seed=0)
    assert sorted(map(len, twins)) == [0, 10]


def examples(lengths):
    return [
        Example(np.full(n, i, np.int32), np.arange(n) > n // 2) for i, n in enumerate(lengths, 1)
    ]


def test_batch_pads_right_and_never_trains_padding():
    batch = make_batch(examples([5, 40]))
    assert batch.inputs.shape == (2, 40)
    assert batch.weights[0, :4].tolist() == [0, 0, 1, 1]
    assert batch.weights[0, 4:].sum() == 0
    assert batch.trained_tokens == 2 + 19


def test_every_epoch_holds_every_example_once_in_another_order():
    stream = BatchStream(examples(range(4, 41)), batch_size=5, seed=1)
    per_epoch = stream.batches_per_epoch
    assert per_epoch == 8

    def seen(epoch):
        batches = [stream.batch(epoch * per_epoch + i) for i in range(per_epoch)]
        return [int(row[0]) for batch in batches for row in batch.inputs]

    assert sorted(seen(0)) == sorted(seen(1)) == list(range(1, 38))
    assert seen(0) != seen(1)


def test_order_is_a_function_of_seed_and_position():
    data = examples(range(4, 41))
    stream, again = BatchStream(data, 5, seed=1), BatchStream(data, 5, seed=1)
    late = again.batch(21)
    assert np.array_equal(stream.batch(21).inputs, late.inputs)
    assert any(
        not np.array_equal(BatchStream(data, 5, 2).batch(i).inputs, stream.batch(i).inputs)
        for i in range(3)
    )


def test_batches_hold_examples_of_about_equal_length():
    stream = BatchStream(examples([10, 300] * 40), batch_size=8, seed=0)
    widths = [stream.batch(i).inputs.shape[1] for i in range(stream.batches_per_epoch)]
    assert widths.count(16) >= 4
    (short, long) = validation_batches(examples([300, 10, 10, 300]), 2)
    assert short.inputs.shape[1] < long.inputs.shape[1]
