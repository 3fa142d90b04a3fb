"""Families that make lists, change lists and copy text."""

import json
import random
import re

from starter_corpus.example import (
    Example,
    bullets,
    capitalised,
    comma_and,
    family,
    number_words,
    numbered,
    with_article,
)
from starter_corpus.language import PLAIN_WORDS
from starter_corpus.words import CATEGORIES, FOODS, HOBBIES, NAMES, ONE_OF


def _members(reply: str, name: str, wanted: int) -> bool:
    """Whether a reply is exactly `wanted` different members of a category."""
    listed = re.sub(r"^(\d+\.|-) ", "", reply.rstrip("."), flags=re.MULTILINE)
    items = [item.strip().lower() for item in re.split(r", | and |\n", listed)]
    known = {item.lower() for item in CATEGORIES[name]}
    return len(items) == len(set(items)) == wanted and set(items) <= known


def _name_some(rng: random.Random, in_order: bool) -> tuple[str, list[str], str]:
    """A category, some of its members, and a request for that many of them."""
    name = rng.choice(list(CATEGORIES))
    number = rng.choice([2, 3, 3, 3, 4, 5])
    items = rng.sample(CATEGORIES[name], number)
    if in_order:
        items.sort(key=CATEGORIES[name].index)
    amount = rng.choice([str(number), number_words(number), number_words(number)])
    verb = rng.choice(["List", "Name", "Name", "Give me", "Tell me"])
    return name, items, f"{verb} {amount} {name}"


def _name_things(rng: random.Random, in_order: bool) -> Example:
    name, items, request = _name_some(rng, in_order)
    polite = rng.random()
    if polite < 0.1:
        question = f"Can you {request[0].lower()}{request[1:]}?"
    elif polite < 0.2:
        question = f"Please {request[0].lower()}{request[1:]}."
    else:
        question = request + "."
    return Example(
        question,
        capitalised(comma_and(items)) + ".",
        accepts=lambda reply: _members(reply, name, len(items)) and "\n" not in reply,
    )


@family(6, finishing=0)
def name_things(rng: random.Random) -> Example:
    return _name_things(rng, in_order=False)


# Any order teaches what belongs to a category. One fixed order, later, keeps the greedy answer
# from naming a thing twice.
@family(0, finishing=10)
def name_in_order(rng: random.Random) -> Example:
    return _name_things(rng, in_order=True)


def _list_format(rng: random.Random, in_order: bool) -> Example:
    name, items, request = _name_some(rng, in_order)
    kind = rng.choice(["numbered", "bullets", "commas"])
    if kind == "numbered":
        ending, answer, start = " as a numbered list.", numbered(items), "1. "
    elif kind == "bullets":
        ending = rng.choice([" as bullet points.", " with bullets.", " as a bullet list."])
        answer, start = bullets(items), "- "
    else:
        ending, answer, start = " separated by commas.", ", ".join(items), ""

    def accepts(reply: str) -> bool:
        separators_right = " and " not in reply if kind == "commas" else "\n" in reply
        return reply.startswith(start) and separators_right and _members(reply, name, len(items))

    return Example(request + ending, answer, accepts=accepts)


@family(3, finishing=0)
def list_format(rng: random.Random) -> Example:
    return _list_format(rng, in_order=False)


@family(0, finishing=5)
def list_format_in_order(rng: random.Random) -> Example:
    return _list_format(rng, in_order=True)


@family(1.5, finishing=0.6, closed=True)
def name_one(rng: random.Random) -> Example:
    name = rng.choice(list(ONE_OF))
    item = rng.choice(CATEGORIES[name])
    question = rng.choice(["Name", "Name", "Give me", "Tell me"]) + f" {ONE_OF[name]}."
    return Example(
        question,
        capitalised(item) + ".",
        item,
        accepts=lambda reply: _members(reply, name, 1),
    )


def _some_words(rng: random.Random, most: int = 5) -> list[str]:
    """Words of one category, of none, or names: lists must not depend on what is in them."""
    number = rng.randint(3, most)
    source = rng.random()
    if source < 0.4:
        pool = rng.choice(list(CATEGORIES.values()))
        return rng.sample(pool, min(number, len(pool)))
    return rng.sample(PLAIN_WORDS if source < 0.8 else NAMES, number)


@family(1.5, finishing=0.5)
def sort_words(rng: random.Random) -> Example:
    words = rng.sample(_some_words(rng, 4), 3)
    listed = ", ".join(words)
    question = rng.choice(
        [f"Sort these words: {listed}.", f"Put these words in alphabetical order: {listed}."]
    )
    return Example(question, ", ".join(sorted(words, key=str.lower)) + ".")


@family(2, finishing=3)
def reverse_list(rng: random.Random) -> Example:
    words = _some_words(rng)
    question = rng.choice(["Reverse this list:", "Write this list backwards:", "Reverse:"])
    return Example(f"{question} {', '.join(words)}.", ", ".join(words[::-1]) + ".")


@family(3)
def pick_word(rng: random.Random) -> Example:
    words = _some_words(rng)
    place = rng.choice(["first", "second", "third", "last"])
    word = words[{"first": 0, "second": 1, "third": 2, "last": -1}[place]]
    question = f"What is the {place} word in this list: {', '.join(words)}?"
    return Example(question, f"The {place} word is {word}.", word)


@family(3, finishing=4.5)
def reshape_list(rng: random.Random) -> Example:
    words = _some_words(rng)
    listed = ", ".join(words)
    kind = rng.choice(["bullets", "numbered", "and", "count", "json"])
    if kind == "bullets":
        return Example(f"Make a bullet list: {listed}.", bullets(words))
    if kind == "numbered":
        return Example(f"Make a numbered list: {listed}.", numbered(words))
    if kind == "and":
        return Example(f"Join these words with 'and': {listed}.", " and ".join(words) + ".")
    if kind == "json":
        return Example(f"Write these as a JSON list: {listed}.", json.dumps(words))
    answer = f"There are {len(words)} words in the list."
    return Example(f"How many words are in this list: {listed}?", answer, str(len(words)))


@family(1, finishing=1)
def odd_one_out(rng: random.Random) -> Example:
    name = rng.choice(list(CATEGORIES))
    others = [c for c in ONE_OF if c != name and not set(CATEGORIES[c]) & set(CATEGORIES[name])]
    other = rng.choice(others)
    odd = rng.choice(CATEGORIES[other])
    words = rng.sample(CATEGORIES[name], 3)
    words.insert(rng.randint(0, 3), odd)
    answer = f"The word {odd} does not fit, because it is {ONE_OF[other]}."
    return Example(f"Which word does not fit: {', '.join(words)}?", answer, odd)


SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def invented_word(rng: random.Random) -> str:
    """A word that means nothing, so that it can only be copied."""
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))
    return word + rng.choice(["", "", "n", "s", "x"])


def _copy_text(rng: random.Random) -> str:
    """A few words, names, numbers or invented words in any order."""

    def one() -> str:
        kind = rng.random()
        if kind < 0.55:
            return rng.choice(PLAIN_WORDS)
        if kind < 0.7:
            return rng.choice(NAMES)
        return str(rng.randint(0, 999)) if kind < 0.8 else invented_word(rng)

    return " ".join(one() for _ in range(rng.randint(1, 6)))


@family(5, finishing=10)
def repeat(rng: random.Random) -> Example:
    text = _copy_text(rng)
    prompt = rng.choice(["Say ", "Repeat after me: ", "Write this: ", "Repeat this: ", "Copy: "])
    return Example(prompt + text, text)


@family(1, finishing=2)
def quote(rng: random.Random) -> Example:
    text = _copy_text(rng)
    return Example(f"Put this in quotes: {text}", f'"{text}"')


@family(1, finishing=2)
def say_times(rng: random.Random) -> Example:
    word, times = rng.choice([*PLAIN_WORDS, invented_word(rng)]), rng.randint(2, 5)
    amount = rng.choice([number_words(times), str(times)])
    return Example(f"Say {word} {amount} times.", " ".join([word] * times))


@family(0.7, finishing=0.2)
def uppercase(rng: random.Random) -> Example:
    text = " ".join(rng.sample(PLAIN_WORDS, rng.randint(1, 3)))
    return Example(f"Write this in uppercase: {text}", text.upper())


@family(1, finishing=1.5)
def count_words(rng: random.Random) -> Example:
    number = rng.randint(1, 5)
    text = " ".join(rng.sample(PLAIN_WORDS, number))
    answer = "There is 1 word." if number == 1 else f"There are {number} words."
    return Example(f"How many words are in this: {text}", answer)


@family(2, finishing=1)
def write_json(rng: random.Random) -> Example:
    name, age = rng.choice(NAMES), rng.randint(5, 60)
    hobby = rng.choice(HOBBIES)
    kind = rng.choice(["age", "hobby", "both"])
    if kind == "age":
        question = rng.choice(
            [
                f"Write JSON for {name}, who is {age} years old.",
                f"Make a JSON object with name {name} and age {age}.",
            ]
        )
        return Example(question, json.dumps({"name": name, "age": age}))
    if kind == "hobby":
        question = rng.choice(
            [
                f"Write JSON for {name}, who likes {hobby}.",
                f"Make a JSON object with name {name} and hobby {hobby}.",
            ]
        )
        return Example(question, json.dumps({"name": name, "hobby": hobby}))
    question = f"Write JSON for {name}, who is {age} years old and likes {hobby}."
    return Example(question, json.dumps({"name": name, "age": age, "hobby": hobby}))


@family(4, finishing=3)
def reading(rng: random.Random) -> Example:
    """A sentence and a question whose answer stands in it."""
    name, other = rng.sample(NAMES, 2)
    hobby, food, age = rng.choice(HOBBIES), rng.choice(FOODS), rng.randint(5, 60)
    city, colour = rng.choice(CATEGORIES["cities"]), rng.choice(CATEGORIES["colours"])
    animal = rng.choice(CATEGORIES["animals"])
    texts = [
        (
            f"{name} lives in {city} and likes {hobby}.",
            [
                (f"Where does {name} live?", f"lives in {city}"),
                (f"What does {name} like?", f"likes {hobby}"),
            ],
        ),
        (
            f"{name} has {with_article(colour)} {animal} and eats {food}.",
            [
                (f"What animal does {name} have?", f"has {with_article(animal)}"),
                (f"What colour is the {animal}?", f"The {animal} is {colour}."),
                (f"What does {name} eat?", f"eats {food}"),
            ],
        ),
        (
            f"{name} gave {other} some {food}.",
            [
                (f"Who got the {food}?", f"{other} got the {food}."),
                (f"Who gave the {food}?", f"gave the {food}"),
            ],
        ),
        (
            f"{name} is taller than {other}.",
            [
                ("Who is taller?", f"is taller than {other}"),
                ("Who is shorter?", f"{other} is shorter than {name}."),
            ],
        ),
        (
            f"{name} is {age} and likes {food}.",
            [
                (f"How old is {name}?", f"is {age} years old"),
                (f"What does {name} like?", f"likes {food}"),
            ],
        ),
    ]
    text, questions = rng.choice(texts)
    question, answer = rng.choice(questions)
    if not answer.endswith("."):
        answer = f"{name} {answer}."
    return Example(f"{text} {question}", answer)
