"""Families about the world: capitals, animals, colours, calendar, planets, jobs, meanings."""

import random

from starter_corpus.example import Example, capitalised, family, with_article
from starter_corpus.words import PLURALS
from starter_corpus.world import (
    ANIMALS,
    BODY,
    CAPITALS,
    COLOUR_OF,
    DAYS,
    DEFINITIONS,
    JOBS,
    MIX,
    MONTH_DAYS,
    MONTHS,
    PLANETS,
    SEASON,
    SHAPES,
    SIZES,
    TOOLS,
)


@family(3)
def capital(rng: random.Random) -> Example:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.75:
        question = rng.choice(
            [
                f"What is the capital of {country}?",
                f"What is the capital of {country}?",
                f"What's the capital city of {country}?",
                f"Capital of {country}?",
                f"Name the capital of {country}.",
                f"Which city is the capital of {country}?",
            ]
        )
        return Example(question, f"The capital of {country} is {city}.", city)
    question = rng.choice(
        [
            f"Where is {city}?",
            f"In which country is {city}?",
            f"{city} is the capital of which country?",
        ]
    )
    return Example(question, f"{city} is the capital of {country}.", country)


@family(1, closed=True)
def animal_sound(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    sound = ANIMALS[name].sound
    one = with_article(name)
    question = rng.choice([f"What sound does {one} make?", f"What does {one} say?"])
    key = None if sound.startswith("makes") else sound
    return Example(question, f"{capitalised(one)} {sound}.", key)


@family(0.8, finishing=0.6, closed=True)
def animal_legs(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    legs = str(ANIMALS[name].legs or "no")
    one = with_article(name)
    question = f"How many legs does {one} have?"
    return Example(question, f"{capitalised(one)} has {legs} legs.", legs)


@family(1, closed=True)
def animal_home(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    one = with_article(name)
    question = rng.choice([f"Where does {one} live?", f"Where can I find {one}?"])
    return Example(question, f"{capitalised(one)} lives {ANIMALS[name].home}.")


@family(1, closed=True)
def animal_food(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    one = with_article(name)
    question = rng.choice([f"What does {one} eat?", f"What food does {one} like?"])
    if name in PLURALS and rng.random() < 0.3:
        question = f"What do {PLURALS[name]} eat?"
    return Example(question, f"{capitalised(one)} eats {ANIMALS[name].food}.", ANIMALS[name].food)


@family(0.7, closed=True)
def animal_baby(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    baby = ANIMALS[name].baby
    question = rng.choice([f"What is a baby {name} called?", f"What do you call a baby {name}?"])
    return Example(question, f"A baby {name} is called {with_article(baby)}.", baby)


@family(0.8, closed=True)
def animal_colour(rng: random.Random) -> Example:
    name = rng.choice([animal for animal in ANIMALS if animal != "butterfly"])
    one = with_article(name)
    question = rng.choice([f"What colour is {one}?", f"Which colour does {one} have?"])
    return Example(question, f"{capitalised(one)} is {ANIMALS[name].colour}.", ANIMALS[name].colour)


@family(1.2)
def describe_animal(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    one, animal = with_article(name), ANIMALS[name]
    question = rng.choice(
        [
            f"Tell me about the {name}.",
            f"Describe {one}.",
            f"What is {one}?",
            f"What do you know about {one}?",
            f"Tell me something about {one}.",
        ]
    )
    answer = (
        f"The {name} is {with_article(animal.kind)}. It is {animal.trait}. It eats {animal.food}."
    )
    return Example(question, answer)


@family(1, finishing=2)
def animal_kind(rng: random.Random) -> Example:
    name = rng.choice(list(ANIMALS))
    real = ANIMALS[name].kind
    asked = real if rng.random() < 0.4 else rng.choice(["bird", "insect", "mammal", "fish"])
    right = asked == real
    word = "Yes" if right else "No"
    one = with_article(name)
    return Example(
        f"Is {one} {with_article(asked)}?",
        f"{word}, {one} is {with_article(real)}.",
        word.lower(),
    )


@family(1)
def bigger_animal(rng: random.Random) -> Example:
    a = rng.choice(list(ANIMALS))
    b = rng.choice([name for name in ANIMALS if ANIMALS[name].size != ANIMALS[a].size])
    small, big = sorted([a, b], key=lambda name: SIZES.index(ANIMALS[name].size))
    question = rng.choice(["Which", "What"]) + f" is bigger, {with_article(a)} or "
    answer = f"{capitalised(with_article(big))} is bigger than {with_article(small)}."
    return Example(question + with_article(b) + "?", answer, big)


@family(2.5)
def colour(rng: random.Random) -> Example:
    thing, value = rng.choice(list(COLOUR_OF.items()))
    question = rng.choice(
        [
            f"What colour is {thing}?",
            f"What colour is {thing}?",
            f"Which colour is {thing}?",
            f"What is the colour of {thing}?",
        ]
    )
    return Example(question, f"{capitalised(thing)} is {value}.", value)


@family(1, closed=True)
def mix_colours(rng: random.Random) -> Example:
    pair, result = rng.choice(list(MIX.items()))
    a, b = rng.sample(pair, 2)
    question = rng.choice(
        [
            f"What do you get if you mix {a} and {b}?",
            f"Which colour do {a} and {b} make?",
            f"Mix {a} and {b}.",
        ]
    )
    return Example(question, f"{capitalised(a)} and {b} make {result}.", result)


def _neighbour(rng: random.Random, names: list[str], noun: str) -> Example:
    """Asks for the day or month before or after one."""
    place = rng.randrange(len(names))
    where, step = rng.choice([("after", 1), ("before", -1)])
    answer = names[(place + step) % len(names)]
    question = rng.choice(
        [
            f"What {noun} comes {where} {names[place]}?",
            f"Which {noun} is {where} {names[place]}?",
            f"What is the {noun} {where} {names[place]}?",
        ]
    )
    return Example(question, f"The {noun} {where} {names[place]} is {answer}.", answer)


CALENDAR_FACTS = [
    ("How many days are in a week?", "A week has 7 days."),
    ("How many months are in a year?", "A year has 12 months."),
    ("How many hours are in a day?", "A day has 24 hours."),
    ("How many minutes are in an hour?", "An hour has 60 minutes."),
    ("How many seconds are in a minute?", "A minute has 60 seconds."),
    ("How many days are in a year?", "A year has 365 days."),
    ("How many weeks are in a year?", "A year has 52 weeks."),
    ("How many seasons are there?", "There are 4 seasons: spring, summer, autumn and winter."),
    ("What is the first month of the year?", "The first month of the year is January."),
    ("What is the last month of the year?", "The last month of the year is December."),
    ("What is the last day of the week?", "The last day of the week is Sunday."),
]


@family(3, finishing=4.5)
def calendar(rng: random.Random) -> Example:
    kind = rng.choice(["day", "day", "month", "month", "length", "season", "weekend", "fact"])
    if kind == "day":
        return _neighbour(rng, DAYS, "day")
    if kind == "month":
        return _neighbour(rng, MONTHS, "month")
    if kind == "fact":
        return Example(*rng.choice(CALENDAR_FACTS))
    if kind == "weekend":
        day = rng.choice(DAYS)
        if day in ("Saturday", "Sunday"):
            answer, key = f"Yes, {day} is part of the weekend.", "yes"
        else:
            answer, key = f"No, {day} is not part of the weekend.", "no"
        return Example(f"Is {day} a weekend day?", answer, key)
    index = rng.randrange(12)
    month, days, season = MONTHS[index], MONTH_DAYS[index], SEASON[index]
    if kind == "length":
        question = rng.choice([f"How many days are in {month}?", f"How long is {month}?"])
        return Example(question, f"{month} has {days} days.", str(days))
    question = rng.choice([f"Which season is {month} in?", f"What season is it in {month}?"])
    return Example(question, f"{month} is in {season}.", season)


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
SPACE_FACTS = [
    ("Which planet is the biggest?", "Jupiter is the biggest planet."),
    ("Which planet is red?", "Mars is called the red planet."),
    ("Which planet has big rings?", "Saturn has big rings."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("How many planets are there?", "There are 8 planets in our solar system."),
    ("Which planet is closest to the sun?", "Mercury is closest to the sun."),
    ("Is the sun a star?", "Yes, the sun is a star."),
    ("Is the moon a planet?", "No, the moon goes around the Earth."),
]


@family(1, closed=True)
def space(rng: random.Random) -> Example:
    kind = rng.choice(["place", "planet", "fact"])
    if kind == "fact":
        return Example(*rng.choice(SPACE_FACTS))
    place = rng.randrange(8)
    if kind == "place":
        question = f"What is the {ORDINALS[place]} planet from the sun?"
        answer = f"The {ORDINALS[place]} planet from the sun is {PLANETS[place]}."
        return Example(question, answer, PLANETS[place])
    question = rng.choice(
        [f"Which planet is {PLANETS[place]}?", f"Tell me about {PLANETS[place]}."]
    )
    return Example(question, f"{PLANETS[place]} is the {ORDINALS[place]} planet from the sun.")


@family(1.5, finishing=2)
def job(rng: random.Random) -> Example:
    name, work = rng.choice(list(JOBS.items()))
    one = with_article(name)
    if rng.random() < 0.3:
        return Example(f"Who {work}?", f"{capitalised(one)} {work}.", name)
    question = rng.choice([f"What does {one} do?", f"What is {one}?", f"What is the job of {one}?"])
    return Example(question, f"{capitalised(one)} {work}.")


@family(1.5, finishing=2)
def tool(rng: random.Random) -> Example:
    name, use = rng.choice(list(TOOLS.items()))
    one = name if name == "scissors" else with_article(name)
    if rng.random() < 0.5:
        verb = "are" if name == "scissors" else "is"
        question = rng.choice(
            [f"What do you use {one} for?", f"What {verb} {one} for?", f"Why do I need {one}?"]
        )
        return Example(question, f"You use {one} to {use}.")
    question = rng.choice([f"What do I need to {use}?", f"What can I use to {use}?"])
    return Example(question, f"You can use {one} to {use}.", name)


UNCOUNTED = {
    *("rain", "snow", "wind", "bread", "cheese", "honey", "tea", "soup", "ice", "steam", "gold"),
    *("wood", "glass", "paper", "gravity", "energy", "oxygen", "winter", "summer", "spring"),
    *("autumn",),
}
UNIQUE = {"sun", "moon", "heart", "brain"}


def _named(thing: str) -> str:
    """A thing with the article that English gives it in a definition."""
    if thing in UNCOUNTED:
        return thing
    return f"the {thing}" if thing in UNIQUE else with_article(thing)


@family(2, finishing=2.8)
def define(rng: random.Random) -> Example:
    thing, meaning = rng.choice(list(DEFINITIONS.items()))
    named = _named(thing)
    question = rng.choice(
        [
            f"What is {named}?",
            f"Define {thing}.",
            f"What does {thing} mean?",
            f"Explain what {named} is.",
        ]
    )
    return Example(question, f"{capitalised(named)} is {meaning}.")


@family(0.6, closed=True)
def body(rng: random.Random) -> Example:
    part, use = rng.choice(list(BODY.items()))
    singular = part in ("nose", "tongue", "brain", "heart", "skin")
    question = rng.choice(
        [f"What {'is' if singular else 'are'} the {part} for?", f"What do we use the {part} for?"]
    )
    return Example(question, f"We use the {part} to {use}.", use)


@family(0.5, finishing=0.3, closed=True)
def shape(rng: random.Random) -> Example:
    name, sides = rng.choice(list(SHAPES.items()))
    noun = rng.choice(["sides", "corners"])
    one = with_article(name)
    question = f"How many {noun} does {one} have?"
    return Example(question, f"{capitalised(one)} has {sides} {noun}.", str(sides))
