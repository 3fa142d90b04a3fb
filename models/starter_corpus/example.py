"""One generated question with its answer, and the register of the families that make them."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    question: str
    answer: str
    key: str | None = None  # the shortest right answer, for styles such as "one word"
    accepts: Callable[[str], bool] | None = None  # for questions with many right answers

    def is_right(self, reply: str) -> bool:
        """Whether a reply is exactly right: the expected sentence, or one that ends in the key."""
        reply = reply.strip()
        if self.accepts is not None:
            return self.accepts(reply)
        if reply == self.answer:
            return True
        return self.key is not None and ends_in_word(reply, self.key)


Make = Callable[[random.Random], Example]


@dataclass(frozen=True)
class Family:
    name: str
    weight: float  # relative share of the single questions
    finishing: float  # the same in the last part of the training
    make: Make
    # A closed family has so few questions that none is kept back from training.
    closed: bool = False


FAMILIES: dict[str, Family] = {}


def family(
    weight: float, finishing: float | None = None, closed: bool = False
) -> Callable[[Make], Make]:
    """Registers a function that makes one example under the function's name."""

    def register(make: Make) -> Make:
        late = weight if finishing is None else finishing
        FAMILIES[make.__name__] = Family(make.__name__, weight, late, make, closed)
        return make

    return register


def ends_in_word(reply: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}[.!]?$", reply, re.IGNORECASE) is not None


def with_article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def comma_and(items: list[str]) -> str:
    """Joins as in `one, two and three`."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def bullets(items: list[str]) -> str:
    return "\n".join(f"- {capitalised(item)}" for item in items)


def numbered(items: list[str]) -> str:
    return "\n".join(f"{number}. {capitalised(item)}" for number, item in enumerate(items, 1))


_UNITS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_words(number: int) -> str:
    """Spells 0 to 100."""
    if number < 20:
        return _UNITS[number]
    if number == 100:
        return "one hundred"
    tens = _TENS[number // 10 - 2]
    return f"{tens}-{_UNITS[number % 10]}" if number % 10 else tens
