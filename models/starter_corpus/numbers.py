"""Families about numbers: sums, comparing, counting, sorting, units."""

import random

from starter_corpus.example import Example, family, number_words
from starter_corpus.words import NAMES

THINGS = ["apples", "books", "coins", "pencils", "flowers", "cookies", "balls", "eggs"]


def _sum_question(rng: random.Random, a: int, sign: str, b: int, result: int) -> Example:
    """Asks in words or in signs; the answer repeats the form of the question."""
    word = "plus" if sign == "+" else "minus"
    if rng.random() < 0.6:
        question = rng.choice(
            [
                f"What is {a} {word} {b}?",
                f"What is {a} {word} {b}?",
                f"How much is {a} {word} {b}?",
                f"{a} {word} {b}?",
                f"Calculate {a} {word} {b}.",
            ]
        )
        return Example(question, f"{a} {word} {b} is {result}.", str(result))
    question = rng.choice(
        [
            f"What is {a} {sign} {b}?",
            f"{a} {sign} {b} = ?",
            f"{a} {sign} {b}",
            f"{a}{sign}{b}",
            f"Calculate {a} {sign} {b}.",
        ]
    )
    return Example(question, f"{a} {sign} {b} = {result}.", str(result))


@family(8, finishing=13)
def add_small(rng: random.Random) -> Example:
    most = rng.choice([10, 20])
    a, b = rng.randint(0, most), rng.randint(0, most)
    return _sum_question(rng, a, "+", b, a + b)


@family(5, finishing=8)
def subtract_small(rng: random.Random) -> Example:
    most = rng.choice([10, 20])
    low, high = sorted([rng.randint(0, most), rng.randint(0, most)])
    return _sum_question(rng, high, "-", low, high - low)


@family(3, finishing=3)
def add_large(rng: random.Random) -> Example:
    a, b = rng.randint(10, 99), rng.randint(1, 60)
    return _sum_question(rng, a, "+", b, a + b)


@family(1.5, finishing=0.8)
def subtract_large(rng: random.Random) -> Example:
    low, high = sorted([rng.randint(1, 60), rng.randint(10, 99)])
    return _sum_question(rng, high, "-", low, high - low)


@family(3, finishing=3)
def multiply(rng: random.Random) -> Example:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    question = rng.choice(
        [
            f"What is {a} times {b}?",
            f"What is {a} times {b}?",
            f"Calculate {a} x {b}.",
            f"{a} times {b}?",
            f"Multiply {a} by {b}.",
        ]
    )
    return Example(question, f"{a} times {b} is {a * b}.", str(a * b))


@family(1, finishing=1.5)
def divide(rng: random.Random) -> Example:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    question = rng.choice([f"What is {a * b} divided by {a}?", f"Divide {a * b} by {a}."])
    return Example(question, f"{a * b} divided by {a} is {b}.", str(b))


@family(1.5, finishing=3)
def next_number(rng: random.Random) -> Example:
    number = rng.randint(1, 99)
    if rng.random() < 0.5:
        where, answer = "after", number + 1
    else:
        where, answer = "before", number - 1
    question = rng.choice(
        [f"What comes {where} {number}?", f"Which number comes {where} {number}?"]
    )
    return Example(question, f"The number {where} {number} is {answer}.", str(answer))


@family(1, finishing=0.6)
def even_or_odd(rng: random.Random) -> Example:
    number = rng.randint(0, 99)
    kind = "odd" if number % 2 else "even"
    question = rng.choice([f"Is {number} even or odd?", f"Is {number} an even number?"])
    return Example(question, f"{number} is an {kind} number.", kind)


@family(2, finishing=2.5)
def compare(rng: random.Random) -> Example:
    low, high = sorted(rng.sample(range(100), 2))
    a, b = rng.sample([low, high], 2)
    if rng.random() < 0.6:
        question = rng.choice(
            [f"Which is bigger, {a} or {b}?", f"Which number is larger, {a} or {b}?"]
        )
        return Example(question, f"{high} is bigger than {low}.", str(high))
    return Example(f"Which is smaller, {a} or {b}?", f"{low} is smaller than {high}.", str(low))


@family(1.5, finishing=1.5)
def double_or_half(rng: random.Random) -> Example:
    number = rng.randint(1, 50) if rng.random() < 0.4 else rng.randint(1, 20)
    if rng.random() < 0.5:
        question = rng.choice([f"What is double {number}?", f"What is twice {number}?"])
        return Example(question, f"Double {number} is {2 * number}.", str(2 * number))
    return Example(
        f"What is half of {2 * number}?", f"Half of {2 * number} is {number}.", str(number)
    )


@family(1.5)
def numbers_in_words(rng: random.Random) -> Example:
    number = rng.randint(0, 100)
    words = number_words(number)
    if rng.random() < 0.6:
        question = rng.choice([f"Write {number} in words.", f"Spell the number {number}."])
        return Example(question, f"{number} is {words}.", words)
    question = rng.choice([f"Write {words} as a number.", f"What number is {words}?"])
    return Example(question, f"{words.capitalize()} is {number}.", str(number))


@family(2.5, finishing=6)
def count(rng: random.Random) -> Example:
    first = rng.choice([1, 1, 1, rng.randint(0, 20)])
    last = first + rng.randint(2, 9)
    kind = rng.random()
    if kind < 0.5:
        question = rng.choice(
            [f"Count from {first} to {last}.", f"Please count from {first} to {last}."]
        )
        if first == 1 and rng.random() < 0.5:
            question = f"Count to {last}."
        numbers = list(range(first, last + 1))
    elif kind < 0.75:
        question = rng.choice(
            [f"Count down from {last} to {first}.", f"Count backwards from {last} to {first}."]
        )
        numbers = list(range(last, first - 1, -1))
    else:
        step, length = rng.choice([2, 3, 5, 10]), rng.randint(3, 7)
        question = f"Count by {step}s up to {step * length}."
        numbers = [step * number for number in range(1, length + 1)]
    return Example(question, ", ".join(map(str, numbers)) + ".")


def _some_numbers(rng: random.Random) -> list[int]:
    most = rng.choice([10, 20, 20, 99])
    return rng.sample(range(most + 1), rng.choice([3, 3, 4, 4, 5]))


@family(4, finishing=6)
def sort_numbers(rng: random.Random) -> Example:
    numbers = _some_numbers(rng)
    listed = ", ".join(map(str, numbers))
    question = rng.choice(
        [
            f"Sort these numbers: {listed}.",
            f"Sort {listed}.",
            f"Put these numbers in order: {listed}.",
        ]
    )
    return Example(question, ", ".join(map(str, sorted(numbers))) + ".")


@family(2.5)
def pick_number(rng: random.Random) -> Example:
    numbers = _some_numbers(rng)
    listed = ", ".join(map(str, numbers))
    kind = rng.choice(["biggest", "smallest", "count"])
    if kind == "count":
        answer = f"There are {len(numbers)} numbers in the list."
        return Example(f"How many numbers are in this list: {listed}?", answer, str(len(numbers)))
    value = max(numbers) if kind == "biggest" else min(numbers)
    return Example(
        f"What is the {kind} number in {listed}?", f"The {kind} number is {value}.", str(value)
    )


@family(3, finishing=4)
def word_problem(rng: random.Random) -> Example:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    kind = rng.choice(["more", "fewer", "boxes"])
    if kind == "more":
        a, b = rng.randint(2, 12), rng.randint(1, 12)
        question = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have?"
        answer = f"{a} plus {b} is {a + b}, so {name} has {a + b} {things}."
        return Example(question, answer, str(a + b))
    if kind == "fewer":
        left, b = rng.randint(2, 10), rng.randint(1, 10)
        a = left + b
        question = f"{name} has {a} {things} and gives away {b}. How many {things} are left?"
        answer = f"{a} minus {b} is {left}, so {left} {things} are left."
        return Example(question, answer, str(left))
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    question = f"{name} has {a} boxes with {b} {things} each. How many {things} are there?"
    return Example(
        question, f"{a} times {b} is {a * b}, so there are {a * b} {things}.", str(a * b)
    )


UNITS = [
    ("kilometre", "metres", 1000),
    ("metre", "centimetres", 100),
    ("centimetre", "millimetres", 10),
    ("kilogram", "grams", 1000),
    ("hour", "minutes", 60),
    ("minute", "seconds", 60),
    ("day", "hours", 24),
    ("week", "days", 7),
    ("year", "months", 12),
    ("euro", "cents", 100),
    ("dollar", "cents", 100),
    ("litre", "millilitres", 1000),
]


@family(1.5)
def units(rng: random.Random) -> Example:
    big, small, factor = rng.choice(UNITS)
    number = rng.randint(1, 9)
    amount = f"{number} {big}" + ("s" if number > 1 else "")
    question = rng.choice([f"How many {small} are in {amount}?", f"Convert {amount} to {small}."])
    verb = "is" if number == 1 else "are"
    result = number * factor
    return Example(question, f"{amount} {verb} {result} {small}.", str(result))
