"""Every kind of file, every form, and what is said about damaged ones."""

import csv
import gzip
import json
import random
import sys

import pytest
from data_reading import read_records
from reported_lines import named_lines

from dora_mlx.data.forms import FORMS
from dora_mlx.data.records import RecordReader, find_data
from dora_mlx.errors import UserError


def chat(question="Hi", answer="Ho"):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [{"prompt": f"q{n}", "completion": f'a "{n}", é\nnew line'} for n in range(5)]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")


def write_table(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": write_json,
    "minified.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": write_jsonl,
    "array.jsonl": write_json,
    "a.csv": write_table,
    "semicolon.csv": lambda path: write_table(path, ";"),
    "a.tsv": lambda path: write_table(path, "\t"),
    "a.parquet": write_parquet,
    "named wrongly.jsonl": write_parquet,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name, zipped):
    path = tmp_path / name
    WRITERS[name](path)
    if zipped:
        path = path.rename(path.with_name(f"{name}.gz"))
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = [tuple(m["content"] for m in record.messages) for record in read_records(path)]
    assert found == [(row["prompt"], row["completion"]) for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    path = tmp_path / "a.jsonl"
    text = end.join(json.dumps(chat(q, "x\u2028y"), ensure_ascii=False) for q in ("é", "b"))
    path.write_bytes(text.encode(encoding))
    assert [r.messages[0]["content"] for r in read_records(path)] == ["é", "b"]
    assert read_records(path)[0].messages[1]["content"] == "x\u2028y"


def test_text_is_one_example_a_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert [(r.text, r.line) for r in read_records(path)] == [("one\ntwo", 1), ("three", 5)]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("messages", chat("q", "a"), "user:q assistant:a"),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            "system:s user:q assistant:a",
        ),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, "user:q assistant:a"),
        (
            "prompt-completion",
            {"prompt": chat("q", "b")["messages"] + chat("r")["messages"][:1],
             "completion": chat("", "a")["messages"][1:]},
            "user:q assistant:b user:r assistant:a",
        ),
        (
            "alpaca",
            {"instruction": "q", "input": "x", "output": "a"},
            "user:q\n\nx assistant:a",
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, "user:q assistant:a"),
        ("text", {"text": "t"}, ""),
    ],
)  # fmt: skip
def test_every_form_is_detected_and_read(tmp_path, form, row, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    reader = RecordReader(path)
    (record,) = reader
    assert reader.form == form
    assert " ".join(f"{m['role']}:{m['content']}" for m in record.messages) == expected
    other = next(name for name in FORMS if name not in (form, "prompt-completion"))
    with pytest.raises(UserError, match="missing"):
        read_records(path, other)


def test_columns_of_other_names_are_mapped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer,prompt\nq,a,unused\n")
    (record,) = read_records(path, columns=("prompt=question", "completion=answer"))
    assert [m["content"] for m in record.messages] == ["q", "a"]
    path.write_text("question,answer\nq,a\n")
    with pytest.raises(UserError, match="--columns prompt=question completion=answer"):
        read_records(path)
    with pytest.raises(UserError, match="--columns nonsense=x cannot be used"):
        read_records(path, columns=("nonsense=x",))
    with pytest.raises(UserError, match="Did you mean prompt=question"):
        read_records(path, columns=("question=prompt",))


def test_tools_and_calls_reach_the_template_as_objects(tmp_path):
    path = tmp_path / "a.jsonl"
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
    ]
    path.write_text(json.dumps({"messages": messages, "tools": [{"type": "function"}]}))
    (record,) = read_records(path)
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert record.messages[2]["tool_call_id"] == "1"
    assert record.messages[3]["content"] == "Two."
    assert record.tools == ({"type": "function"},)


def test_folder_and_hub_splits(tmp_path, monkeypatch):
    (tmp_path / "train.csv.gz").touch()
    (tmp_path / "validation.json").touch()
    (tmp_path / "test.txt").touch()
    names = [source.name for source in find_data(tmp_path).all()]
    assert names == ["train.csv.gz", "validation.json", "test.txt"]
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match="several train files"):
        find_data(tmp_path)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: datasets.Dataset.from_list([chat(split)])
    )
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["train", "validation"])
    files = find_data("hub:owner/name")
    assert [r.messages[0]["content"] for s in files.all() for r in read_records(s)] == [
        "train",
        "validation",
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"dora-mlx\[hub\]"):
        find_data("hub:owner/name")


# What is wrong with a line, and what has to be said about it.
FAULTS = [
    (lambda good: good[:-2], "broken JSON"),
    (lambda good: good.replace('"', "'"), "broken JSON"),
    (lambda good: f"[{good}]", "expected a JSON object but found a list"),
    (lambda good: '{"other": 1}', "'messages' is missing"),
    (lambda good: '{"messages": "text"}', "must be a list"),
    (lambda good: good.replace("assistant", "robot"), "the role 'robot'"),
    (lambda good: good.replace('"content": "Ho"', '"content": ""'), "(assistant) is empty"),
    (lambda good: good.replace('"content": "Ho"', '"content": 7'), "message 2 is a number"),
    (lambda good: good.replace('"Ho"', '"\\ud800"'), "half of a surrogate pair"),
    (lambda good: json.dumps({"messages": chat()["messages"][::-1]}), "it is the user's turn"),
]  # fmt: skip


def test_a_hundred_seeded_faults_are_all_named_in_one_report(tmp_path):
    draw = random.Random(4)
    faulty = set(draw.sample(range(2, 1001), 100))
    lines, expected = [], {}
    for number in range(1, 1001):
        good = json.dumps(chat(f"question {number}", "Ho"))
        if number in faulty:
            break_it, sentence = draw.choice(FAULTS)
            good, expected[number] = break_it(good), sentence
        lines.append(good)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_records(path)
    report = str(caught.value)
    assert "has 100 bad lines" in report
    named = named_lines(report)
    assert named.keys() == expected.keys()
    assert all(sentence in named[number] for number, sentence in expected.items())


def test_the_same_fault_in_many_lines_is_told_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("frage,antwort\n" + "Wie?,So.\n" * 3 + "Nur das\n" + "Wie?,So.\n" * 400)
    with pytest.raises(UserError, match="has 404 bad lines") as caught:
        read_records(path)
    listing = str(caught.value).splitlines()[1:]
    assert [line.partition(":")[0] for line in listing] == [
        "  lines 2 to 4 and 6 to 405", "  line 5",
    ]  # fmt: skip
    assert "--columns prompt=frage completion=antwort" in listing[0]


def test_a_misspelt_column_is_named_with_the_nearest(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,Frage,Antwort\n" + "1,Wie?,So.\n" * 3)
    with pytest.raises(UserError) as caught:
        read_records(path, columns=("prompt=frage", "completion=Antwort"))
    assert "has 3 bad lines and no good one" in str(caught.value)
    assert "no column 'frage' (did you mean 'Frage'?); the columns are 'id', 'Frage'" in str(
        caught.value
    )
    # Which of three is the question is not for a program to guess.
    with pytest.raises(UserError, match="--columns prompt=NAME completion=NAME"):
        read_records(path)
    reader = RecordReader(path, columns=("prompt=Frage", "completion=Antwort", "system=persona"))
    assert len(list(reader)) == 3
    assert reader.report.notices == ["no row has the column 'persona' of --columns system=persona"]


def test_warnings_are_no_errors_and_name_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [chat(), chat(), chat("Hi", "Hey"), chat("Bell", "\a"), chat("Lost", "\ufffd")]
    rows.append({"messages": [*chat("x", "y")["messages"], {"role": "user", "content": "z"}]})
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    reader = RecordReader(path)
    assert len(list(reader)) == 6
    listing = reader.report.listing("warning").splitlines()
    for sentence in (
        "lines 2, 4, 6, 8 and 10: a blank line",
        "line 3: a duplicate of line 1",
        "line 5: the question of line 1 with another answer",
        "line 7: message 2 has the control character U+0007",
        "line 9: message 2 has U+FFFD",
        "line 11: the last message is the user's",
    ):
        assert any(row.startswith(f"  {sentence}") for row in listing), sentence
    assert not reader.report.bad_rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\x89PNG\r\n\x1a\n\x00\xff", "binary file"),
        ("a.jsonl", b'{"messages": "\xff"}', r"line 1, column 15: not UTF-8"),
        ("a.jsonl", gzip.compress(b"x" * 1000)[:-9], "damaged gzip"),
        ("a.parquet", b"{}", "not a Parquet file"),
        ("a.parquet", b"PAR1 and no more", "damaged Parquet"),
        ("a.json", b'[{"text": "a"}, {"text": }, {"text": 1}]', "column 26: broken JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "missing"),
        ("a.json", b'[\n{"text": "a"},\n{"text": 1}]', "line 3: 'text' is a number"),
        ("a.csv", b"text,other\na,b\nc\n", "line 3: 1 column where the header names 2"),
        ("a.csv", b'text\n"a', "broken table"),
        ("a.doc", b"hello", "of no known kind"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "cannot be read"),
        ("a.csv", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
    ],
)
def test_damage_is_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_fuzzed_files_give_a_report_and_never_a_traceback(tmp_path):
    draw = random.Random(7)
    seeds = [json.dumps(chat("é\n", '"q"')).encode() + b"\n", json.dumps(ROWS).encode()]
    seeds.append(b'prompt,completion\n"a","b"\nc,d\n')
    names = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz", "a"]
    for turn in range(1500):
        content = bytearray(draw.choice(seeds) * draw.randint(1, 3))
        for _ in range(draw.randint(0, 12)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 3)] = draw.choice(
                [draw.randbytes(2), b'"', b"{", b"]", b"\0", b",", b"\\ud800", b"\xff\xfe", b"null"]
            )
        if turn % 5 == 0:
            content = bytearray(draw.randbytes(draw.randint(0, 200)))
        if turn % 7 == 0:
            content[:0] = draw.choice([b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1"])
        path = tmp_path / draw.choice(names)
        path.write_bytes(bytes(content))
        try:
            reader = RecordReader(path)
            for record in reader:
                record.digest()
            reader.report.raise_errors()
        except UserError:
            pass
