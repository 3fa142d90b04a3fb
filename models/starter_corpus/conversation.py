"""Whole conversations made of the single questions: styles, memory, follow-ups, chats."""

import itertools
import json
import random
import zlib
from collections.abc import Iterator

# The imports of the family modules fill the register.
from starter_corpus import facts, language, lists, numbers, stories, talk  # noqa: F401
from starter_corpus.example import FAMILIES, Example, Family, capitalised, with_article
from starter_corpus.talk import BOT
from starter_corpus.words import CATEGORIES, FOODS, HOBBIES, NAMES, OPPOSITES
from starter_corpus.world import ANIMALS, CAPITALS

Message = dict[str, str]
Turn = tuple[str, str]

HELD_OUT_SHARE = 16  # one question in this many is never trained on


def is_held_out(kind: Family, example: Example) -> bool:
    """Keeps a fixed share of the questions of the open families for evaluation."""
    if kind.closed:
        return False
    return zlib.crc32(example.question.lower().encode()) % HELD_OUT_SHARE == 0


def training_example(rng: random.Random, finishing: bool = False) -> Example:
    """One question of any family by weight, never a held-out one."""
    kinds = list(FAMILIES.values())
    weights = [kind.finishing if finishing else kind.weight for kind in kinds]
    while True:
        kind = rng.choices(kinds, weights)[0]
        example = kind.make(rng)
        if not is_held_out(kind, example):
            return example


def evaluation_examples(name: str, number: int, seed: int) -> list[Example]:
    """Up to `number` different questions of one family, held-out ones unless it is closed."""
    kind = FAMILIES[name]
    rng = random.Random(f"{seed} {name}")
    found: dict[str, Example] = {}
    for _ in range(200 * number):
        example = kind.make(rng)
        if kind.closed or is_held_out(kind, example):
            found.setdefault(example.question, example)
        if len(found) == number:
            break
    return list(found.values())


ENDINGS = [
    *("Have a nice day!", "I hope this helps.", "Let me know if you need more."),
    *("Thank you for asking!", "That is all.", "Keep smiling!", "Good luck!", "Over and out."),
    *("Stay curious!", "Easy!"),
]
OPENINGS = [
    *("Sure!", "Of course!", "Well,", "Good question!", "Listen:", "Answer:", "Here you go:"),
    *("Oh!", "Yes, friend:", "Okay."),
]
PLAIN_SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    f"You are {BOT}, a helpful assistant.",
    "You are a friendly assistant.",
    "Answer the question.",
    "Be brief and kind.",
    "You are a helpful assistant who answers in short sentences.",
]


def styled(rng: random.Random, example: Example) -> tuple[str, str]:
    """A system prompt and the answer as that prompt asks for it."""
    answer = example.answer
    kinds = ["ending", "opening", "robot", "butler", "child", "plain", "plain"]
    if example.key is not None:
        kinds += ["key", "key"]
    if len(answer) < 70:
        kinds += ["upper", "lower", "json"]
    kind = rng.choice(kinds)
    if kind == "ending":
        ending = rng.choice(ENDINGS)
        verb = rng.choice(["End every answer with", "Always finish with"])
        return f'{verb} "{ending}"', f"{answer} {ending}"
    if kind == "opening":
        opening = rng.choice(OPENINGS)
        verb = rng.choice(["Start every answer with", "Always begin with"])
        return f'{verb} "{opening}"', f"{opening} {answer}"
    if kind == "robot":
        return rng.choice(["You are a robot.", "Speak like a robot."]), f"Beep boop. {answer} Beep."
    if kind == "butler":
        start = rng.choice(["Certainly, sir.", "Very well, sir."])
        return rng.choice(["You are a polite butler.", "Speak like a butler."]), f"{start} {answer}"
    if kind == "child":
        answer = rng.choice(["Wow!", "Yay!"]) + f" {answer.rstrip('.')}!!!"
        return rng.choice(["You are an excited child.", "Be very excited."]), answer
    if kind == "key":
        prompts = ["Answer with one word or number.", "Be as short as possible."]
        return rng.choice([*prompts, "Give only the answer."]), example.key or answer
    if kind == "upper":
        return rng.choice(["Answer in uppercase.", "Use only capital letters."]), answer.upper()
    if kind == "lower":
        return rng.choice(["Answer in lowercase.", "Do not use capital letters."]), answer.lower()
    if kind == "json":
        answer = json.dumps({"answer": answer}, ensure_ascii=False)
        return rng.choice(["Answer in JSON.", "Reply with a JSON object."]), answer
    return rng.choice(PLAIN_SYSTEM_PROMPTS), answer


CASUAL_STARTS = ["Hey! ", "Hello! ", "I have a question. ", f"Hi {BOT}! ", "Quick question: "]


def casual(rng: random.Random, question: str) -> str:
    """The question as people type it: lower case, no end mark, or with a few polite words."""
    kind = rng.random()
    if kind < 0.08 and not question[:2].isupper():
        return question[0].lower() + question[1:]
    if kind < 0.15:
        return question.rstrip("?.!")
    if kind < 0.20:
        return question.lower().rstrip("?.!")
    if kind < 0.25:
        return rng.choice(CASUAL_STARTS) + question
    if kind < 0.28:
        return question + rng.choice([" Please.", " Thanks!", " Thank you."])
    return question


def _turn(rng: random.Random, example: Example) -> Turn:
    # Lower case and lost end marks must not change a text that is to be copied or sorted.
    carries_text = ":" in example.question or ". " in example.question
    copied = example.answer in example.question
    question = example.question if carries_text or copied else casual(rng, example.question)
    return question, example.answer


def _memory(rng: random.Random, finishing: bool) -> list[Turn]:
    """The user says something about themselves and asks for it later."""
    name, hobby, food = rng.choice(NAMES), rng.choice(HOBBIES), rng.choice(FOODS)
    colour = rng.choice(CATEGORIES["colours"])
    topic = rng.choice(["name", "hobby", "food", "colour"])
    if topic == "name":
        told = rng.choice([f"My name is {name}.", f"I am {name}.", f"Call me {name}."])
        reply = rng.choice([f"Nice to meet you, {name}!", f"Hello, {name}! How can I help?"])
        asked = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?"])
        answer = f"Your name is {name}."
    elif topic == "hobby":
        told = rng.choice([f"I like {hobby}.", f"My hobby is {hobby}."])
        reply = f"{capitalised(hobby)} is a nice hobby!"
        asked = rng.choice(["What do I like?", "What is my hobby?"])
        answer = f"You like {hobby}."
    elif topic == "food":
        told = f"My favourite food is {food}."
        reply = f"{capitalised(food)} {'are' if food.endswith('s') else 'is'} very tasty!"
        asked, answer = "What is my favourite food?", f"Your favourite food is {food}."
    else:
        told = f"My favourite colour is {colour}."
        reply = f"{capitalised(colour)} is a beautiful colour!"
        asked, answer = "What is my favourite colour?", f"Your favourite colour is {colour}."
    between = [
        _turn(rng, training_example(rng, finishing)) for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    return [(casual(rng, told), reply), *between, (asked, answer)]


def _follow_up(rng: random.Random) -> list[Turn]:
    """A second question that only makes sense after the first."""
    topic = rng.choice(["capital", "food", "opposite", "sum"])
    if topic == "sum":
        a, b, c = rng.randint(0, 10), rng.randint(0, 10), rng.randint(1, 10)
        first = (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
        return [first, (f"Add {c} to it.", f"{a + b} plus {c} is {a + b + c}.")]
    again = rng.choice(["And", "What about"])
    if topic == "capital":
        a, b = rng.sample(list(CAPITALS), 2)
        return [
            (f"What is the capital of {a}?", f"The capital of {a} is {CAPITALS[a]}."),
            (f"{again} {b}?", f"The capital of {b} is {CAPITALS[b]}."),
        ]
    if topic == "food":
        a, b = rng.sample(list(ANIMALS), 2)
        one, other = with_article(a), with_article(b)
        return [
            (f"What does {one} eat?", f"{capitalised(one)} eats {ANIMALS[a].food}."),
            (f"{again} {other}?", f"{capitalised(other)} eats {ANIMALS[b].food}."),
        ]
    a, b = rng.sample(list(OPPOSITES), 2)
    return [
        (f"What is the opposite of {a}?", f"The opposite of {a} is {OPPOSITES[a]}."),
        (f"{again} {b}?", f"The opposite of {b} is {OPPOSITES[b]}."),
    ]


def to_messages(turns: list[Turn], system: str | None = None) -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def conversation(rng: random.Random, finishing: bool = False) -> list[Message]:
    """One training conversation."""
    kind = rng.random()
    if kind < 0.60:
        return to_messages([_turn(rng, training_example(rng, finishing))])
    if kind < 0.74:
        example = training_example(rng, finishing)
        question, _ = _turn(rng, example)
        system, answer = styled(rng, example)
        return to_messages([(question, answer)], system)
    if kind < 0.80:
        return to_messages(_memory(rng, finishing))
    if kind < 0.84:
        return to_messages(_follow_up(rng))
    turns = [_turn(rng, training_example(rng, finishing)) for _ in range(rng.randint(2, 6))]
    return to_messages(turns, rng.choice([None, None, *PLAIN_SYSTEM_PROMPTS[:2]]))


def conversations(seed: int, finishing: bool = False) -> Iterator[list[Message]]:
    """An endless corpus; the same seed gives the same corpus.

    The finishing corpus has more of what takes longest to learn: sums, lists and copying.
    """
    rng = random.Random(seed)
    return (conversation(rng, finishing) for _ in itertools.count())
