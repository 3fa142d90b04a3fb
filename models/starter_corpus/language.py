"""Families about words: opposites, forms, spelling, translation, rewriting sentences."""

import random

from starter_corpus.example import Example, capitalised, family, with_article
from starter_corpus.words import (
    CATEGORIES,
    FRENCH,
    GERMAN,
    NAMES,
    ONE_OF,
    OPPOSITES,
    PAST_TENSES,
    PLURALS,
    RHYMES,
    SPANISH,
    SYNONYMS,
)
from starter_corpus.world import ANIMALS, DEFINITIONS


def _plain_words() -> list[str]:
    tables = [OPPOSITES, OPPOSITES.values(), PAST_TENSES, PLURALS, SYNONYMS.values()]
    tables += [*CATEGORIES.values(), DEFINITIONS]
    words = {word for table in tables for word in table}
    return sorted(word for word in words if word.isalpha() and word.islower())


PLAIN_WORDS = _plain_words()


@family(1.2, closed=True)
def opposite(rng: random.Random) -> Example:
    word, other = rng.choice(list(OPPOSITES.items()))
    # Two words have two opposites each, so these pairs are asked in one direction only.
    if other not in ("light", "short") and rng.random() < 0.4:
        word, other = other, word
    question = rng.choice(
        [
            f"What is the opposite of {word}?",
            f"Opposite of {word}?",
            f"Give me the opposite of {word}.",
        ]
    )
    return Example(question, f"The opposite of {word} is {other}.", other)


@family(0.8, finishing=0.6, closed=True)
def past_tense(rng: random.Random) -> Example:
    word, past = rng.choice(list(PAST_TENSES.items()))
    question = rng.choice([f"What is the past tense of {word}?", f"Put {word} in the past tense."])
    return Example(question, f"The past tense of {word} is {past}.", past)


@family(0.8, finishing=0.6, closed=True)
def plural(rng: random.Random) -> Example:
    word, many = rng.choice(list(PLURALS.items()))
    question = rng.choice([f"What is the plural of {word}?", f"Plural of {word}?"])
    return Example(question, f"The plural of {word} is {many}.", many)


@family(0.8, finishing=0.6, closed=True)
def synonym(rng: random.Random) -> Example:
    word, other = rng.choice(list(SYNONYMS.items()))
    question = rng.choice([f"What is another word for {word}?", f"Give me a synonym for {word}."])
    return Example(question, f"Another word for {word} is {other}.", other)


@family(0.6, finishing=0.5, closed=True)
def rhyme(rng: random.Random) -> Example:
    word, others = rng.choice(list(RHYMES.items()))
    question = rng.choice([f"What rhymes with {word}?", f"Give me words that rhyme with {word}."])
    return Example(question, f"Some words that rhyme with {word} are {others}.")


@family(1.2, finishing=0.3)
def spell(rng: random.Random) -> Example:
    word = rng.choice(PLAIN_WORDS)
    question = rng.choice([f"Spell the word {word}.", f"How do you spell {word}?"])
    return Example(question, "-".join(word) + ".")


@family(1.2, finishing=0.6)
def letters(rng: random.Random) -> Example:
    word = rng.choice(PLAIN_WORDS)
    kind = rng.choice(["first", "capitals", "length"])
    if kind == "first":
        letter = word[0].upper()
        return Example(
            f"What is the first letter of {word}?",
            f"The first letter of {word} is {letter}.",
            letter,
        )
    if kind == "capitals":
        return Example(f"Write {word} in capital letters.", word.upper(), word.upper())
    answer = f"The word {word} has {len(word)} letters."
    return Example(f"How many letters are in {word}?", answer, str(len(word)))


@family(2.5, finishing=3)
def translate(rng: random.Random) -> Example:
    language, table = rng.choice([("French", FRENCH), ("Spanish", SPANISH), ("German", GERMAN)])
    word, foreign = rng.choice(list(table.items()))
    if rng.random() < 0.75:
        question = rng.choice(
            [
                f"How do you say {word} in {language}?",
                f"Translate {word} to {language}.",
                f"What is {word} in {language}?",
                f"Translate into {language}: {word}",
            ]
        )
        return Example(question, f"{capitalised(word)} in {language} is {foreign}.", foreign)
    question = rng.choice(
        [f"What does {foreign} mean in {language}?", f"Translate the {language} word {foreign}."]
    )
    return Example(question, f"The {language} word {foreign} means {word}.", word)


@family(1.5, finishing=3)
def category(rng: random.Random) -> Example:
    name = rng.choice([name for name in CATEGORIES if name in ONE_OF])
    thing = rng.choice(CATEGORIES[name])
    if thing == "orange":
        return Example("Is orange a colour?", "Yes, orange is a colour and also a fruit.", "yes")
    kind = rng.choice(["what", "yes", "no"])
    right = f"{thing} is {ONE_OF[name]}."
    if kind == "what":
        return Example(f"What kind of thing is {thing}?", capitalised(right), ONE_OF[name])
    if kind == "yes":
        return Example(f"Is {thing} {ONE_OF[name]}?", f"Yes, {right}", "yes")
    others = [one for other, one in ONE_OF.items() if thing not in CATEGORIES[other]]
    return Example(f"Is {thing} {rng.choice(others)}?", f"No, {right}", "no")


TRAITS = ["big", "small", "happy", "tired", "quick", "quiet", "old", "young", "brave", "hungry"]
TRAITS += ["clever", "strong", "cold", "wet", "clean", "funny", "nice", "angry", "kind", "slow"]


@family(2.5, finishing=1)
def rewrite(rng: random.Random) -> Example:
    subject = rng.choice([f"The {rng.choice(list(ANIMALS))}", rng.choice(NAMES)])
    trait = rng.choice(TRAITS)
    sentence = f"{subject} is {trait}."
    inner = subject if subject in NAMES else subject.lower()
    kind = rng.choice(["question", "negative", "past", "replace"])
    if kind == "question":
        prompt = rng.choice(["Turn this into a question", "Make this a question"])
        return Example(f"{prompt}: {sentence}", f"Is {inner} {trait}?")
    if kind == "negative":
        prompt = rng.choice(["Make this negative", "Say the opposite with not"])
        return Example(f"{prompt}: {sentence}", f"{subject} is not {trait}.")
    if kind == "past":
        prompt = rng.choice(["Put this in the past tense", "Write this in the past"])
        return Example(f"{prompt}: {sentence}", f"{subject} was {trait}.")
    other = rng.choice([word for word in TRAITS if word != trait])
    return Example(f"Replace {trait} with {other}: {sentence}", f"{subject} is {other}.")


GOOD = ["great", "wonderful", "lovely", "fun", "nice", "perfect", "delicious", "beautiful"]
BAD = ["terrible", "awful", "boring", "bad", "horrible", "sad", "ugly", "broken"]
JUDGED = ["film", "book", "food", "game", "trip", "hotel", "song", "day", "party", "cake", "story"]


@family(1, finishing=0.3)
def sentiment(rng: random.Random) -> Example:
    thing = rng.choice(JUDGED)
    positive = rng.random() < 0.5
    word = rng.choice(GOOD if positive else BAD)
    start = rng.choice(["The", "This"])
    middle = rng.choice(["was", "is", "was very", "is really"])
    sentence = f"{start} {thing} {middle} {word}."
    label = "positive" if positive else "negative"
    question = rng.choice(
        [f"Is this positive or negative? {sentence}", f"Positive or negative: {sentence}"]
    )
    return Example(question, f"That is {label}.", label)


@family(1, finishing=0.5)
def sentence_with(rng: random.Random) -> Example:
    word = rng.choice(PLAIN_WORDS)
    name = rng.choice(NAMES)
    if word in PAST_TENSES:
        answer = f"{name} likes to {word} every day."
    elif word in OPPOSITES or word in SYNONYMS or word in OPPOSITES.values():
        answer = f"{name} thinks that this is {word}."
    else:
        answer = f"{name} has a picture of {with_article(word)}."
    question = rng.choice(
        [f"Write a sentence with the word {word}.", f"Use the word {word} in a sentence."]
    )

    def accepts(reply: str) -> bool:
        return word in reply.rstrip(".").split() and reply.endswith(".") and len(reply.split()) > 3

    return Example(question, answer, accepts=accepts)
