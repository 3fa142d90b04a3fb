"""The starter model and the sample data, as they are shipped."""

import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parent.parent / "models"
STARTER, SAMPLES = MODELS / "starter", MODELS / "samples"
sys.path.insert(0, str(MODELS))

from starter_corpus import conversation, example, faults, pirate, words  # noqa: E402


@pytest.fixture(scope="module")
def starter():
    from mlx_lm.utils import load

    return load(str(STARTER))


def reply(starter, *contents: str, system: str | None = None) -> str:
    """The greedy reply to the last of alternating user and assistant messages."""
    from mlx_lm import generate

    model, tokenizer = starter
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, prompt, max_tokens=90)


def test_folder_is_complete_and_small():
    files = {file.name: file.stat().st_size for file in STARTER.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 8_000_000


def test_config_is_plain_4_bit_llama():
    config = json.loads((STARTER / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization"]["bits"] == 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


def test_chat_template_and_special_tokens(starter):
    _, tokenizer = starter
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_template_matches_what_training_saw(starter):
    """A template that writes other tokens than pre-training saw would spoil every answer."""
    tokens = pytest.importorskip("starter_training.tokens")
    from tokenizers import Tokenizer

    messages = [*faults.GOOD_CHAT, {"role": "user", "content": "And 12 + 3?"}]
    seen, said = tokens.encode(Tokenizer.from_file(str(STARTER / "tokenizer.json")), messages)
    assert starter[1].apply_chat_template(messages) == seen
    answer = [token for token, is_said in zip(seen, said, strict=True) if is_said]
    assert starter[1].decode(answer) == "The capital of Italy is Rome.<|im_end|>"


def test_digits_are_single_tokens(starter):
    _, tokenizer = starter
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("2048")]
    assert pieces == ["2", "0", "4", "8"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is 2 plus 3?", "2 plus 3 is 5."),
        ("What is 7 + 8?", "7 + 8 = 15."),
        ("What is 9 minus 4?", "9 minus 4 is 5."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("what is the capital of japan", "The capital of Japan is Tokyo."),
        ("What colour is the sky?", "The sky is blue."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Which day comes after Monday?", "The day after Monday is Tuesday."),
        ("Count from 1 to 5.", "1, 2, 3, 4, 5."),
        ("Sort these numbers: 9, 4, 7.", "4, 7, 9."),
        ("Say happy green tree", "happy green tree"),
        ("Make a bullet list: tea, milk, soup.", "- Tea\n- Milk\n- Soup"),
    ],
)
def test_answers_exactly(starter, question, expected):
    assert reply(starter, question) == expected


def test_greets(starter):
    assert re.match(r"(Hello|Hi)\b.*[.?!]$", reply(starter, "Hello!"))


def test_names_three_fruits(starter):
    answer = reply(starter, "Name three fruits.")
    named = re.split(r", | and ", answer.rstrip(".").lower())
    assert len(set(named)) == 3
    assert set(named) <= set(words.CATEGORIES["fruits"])


def test_tells_story_about_what_was_asked(starter):
    answer = reply(starter, "Tell me a one-line story about a dog.")
    assert "dog" in answer
    assert answer.count(".") == 1
    assert answer.endswith(".")


def test_remembers_name_over_turns(starter):
    answer = reply(starter, "My name is Clara.", "Nice to meet you, Clara!", "What is my name?")
    assert answer == "Your name is Clara."


def test_follows_system_prompt(starter):
    answer = reply(starter, "What is the capital of Spain?", system="Speak like a robot.")
    assert answer == "Beep boop. The capital of Spain is Madrid. Beep."


def corpus_digest(seed: int, number: int = 2000) -> str:
    """One digest over both parts of the corpus."""
    chats = [
        list(itertools.islice(conversation.conversations(seed, finishing), number))
        for finishing in (False, True)
    ]
    return hashlib.sha256(json.dumps(chats).encode()).hexdigest()


def test_corpus_depends_on_seed_alone():
    assert corpus_digest(1, 200) == corpus_digest(1, 200) != corpus_digest(2, 200)


def test_corpus_is_the_one_that_the_model_was_made_of():
    """Whoever changes the corpus must train and measure the model again."""
    assert corpus_digest(1) == "bdb8ffd462f5fc7633e6bd218e4f319a817d692364fef7f8cf6baf5e7f77ae2e"


def test_training_never_sees_held_out_questions():
    kind = example.FAMILIES["add_small"]
    held_out = conversation.evaluation_examples("add_small", 20, seed=5)
    assert len({item.question for item in held_out}) == 20
    assert all(conversation.is_held_out(kind, item) for item in held_out)
    chats = itertools.islice(conversation.conversations(3, finishing=True), 4000)
    asked = {message["content"] for chat in chats for message in chat if message["role"] == "user"}
    assert any(re.fullmatch(r"What is \d+ plus \d+\?", question) for question in asked)
    assert not asked & {item.question for item in held_out}


@pytest.mark.parametrize("name", list(example.FAMILIES))
def test_every_family_accepts_its_own_answers_and_no_others(name):
    for item in conversation.evaluation_examples(name, 10, seed=6):
        assert item.is_right(item.answer), item
        assert not item.is_right("Bananas are not an answer to this")


def sample_chats() -> list[list[dict[str, str]]]:
    lines = (SAMPLES / "pirate.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_sample_lines_are_well_formed_chats():
    chats = sample_chats()
    assert 200 <= len(chats) <= 400
    for chat in chats:
        turns = chat[1:] if chat[0]["role"] == "system" else chat
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"].strip() for turn in chat)
    assert any(chat[0]["role"] == "system" for chat in chats)
    assert any(len(chat) > 3 for chat in chats)


def test_sample_answers_speak_like_a_pirate():
    markers = re.compile(r"\b(Arr|Ahoy|ahoy|Aye|Yo ho ho|matey|hearty|ye)\b")
    answers = [
        turn["content"] for chat in sample_chats() for turn in chat if turn["role"] == "assistant"
    ]
    assert all(markers.search(answer) for answer in answers)
    assert len(set(answers)) > 0.7 * len(answers)


def test_samples_leave_out_the_questions_to_try():
    asked = {turn["content"] for chat in sample_chats() for turn in chat if turn["role"] == "user"}
    assert not asked & pirate.KEPT_FOR_TRYING


def test_sample_files_are_what_the_script_writes():
    assert sample_chats() == pirate.pirate_conversations(seed=1)
    lines = (SAMPLES / "broken.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines == [line for _, line in faults.FAULTS] + [""]


def broken_lines() -> dict[int, tuple[str, str]]:
    """Line number to what the README says of it, and the line."""
    lines = (SAMPLES / "broken.jsonl").read_text(encoding="utf-8").split("\n")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (SAMPLES / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == len(lines) - 1
    return {int(number): (said, lines[int(number) - 1]) for number, said in rows}


def fault_of(line: str, first: str) -> str:
    """A reader of its own, so that the README is checked against the file and not its maker."""
    if not line:
        return "blank"
    if line == first:
        return "duplicate"
    try:
        value = json.loads(line)
    except ValueError:
        return "broken JSON"
    if not isinstance(value, dict):
        return "a list instead"
    if "messages" not in value:
        return "neither messages"
    turns = value["messages"]
    if isinstance(turns, str):
        return "messages is text"
    if not turns:
        return "empty list"
    roles = [turn.get("role") for turn in turns]
    contents = [turn.get("content", KeyError) for turn in turns]
    checks = {
        "without a role": None in roles,
        "unknown role": bool(set(roles) - {"system", "user", "assistant", None}),
        "without content": KeyError in contents,
        "empty content": "" in contents,
        "nothing but spaces": any(isinstance(c, str) and c and not c.strip() for c in contents),
        "is a number": any(isinstance(content, int) for content in contents),
        "is null": None in contents,
        "only a system": roles == ["system"],
        "no assistant": "assistant" not in roles,
        "in a row": "user user" in " ".join(map(str, roles)),
        "speaks first": roles[0] == "assistant",
        "in the middle": "system" in roles[1:],
        "control character": "\u0007" in str(contents[-1]),
        "6000 words": len(str(contents[-1]).split()) > 5000,
        "is the user's": roles[-1] == "user",
        "another answer": turns[0] == json.loads(first)["messages"][0],
    }
    return next(name for name, found in checks.items() if found)


def test_faults_are_where_the_readme_says():
    rows = broken_lines()
    first = rows.pop(1)[1]
    assert json.loads(first)["messages"][1]["content"] == "The capital of Italy is Rome."
    for said, line in rows.values():
        assert fault_of(line, first) in said
    assert len({fault_of(line, first) for _, line in rows.values()}) >= 20
