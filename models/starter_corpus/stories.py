"""Families of stories and poems."""

import random

from starter_corpus.example import Example, capitalised, family, with_article
from starter_corpus.words import NAMES
from starter_corpus.world import ANIMALS, JOBS

ADJECTIVES = ["little", "brave", "old", "young", "clever", "kind", "happy", "lonely", "curious"]
ADJECTIVES += ["tiny", "sleepy", "friendly"]
PLACES = [
    *("in a green forest", "near a quiet lake", "in a small village", "on a high mountain"),
    *("by the sea", "in a big city", "in an old castle", "on a sunny farm"),
]
THINGS = [
    *("a golden key", "a lost map", "a shiny stone", "a red kite", "an old book", "a small boat"),
    *("a magic lamp", "a broken clock", "a silver bell", "a warm blanket"),
]
POEM_LINES = [
    ("shines the morning sun", "and all of us have fun"),
    ("it is a lovely day", "come out with me and play"),
    ("under the old green tree", "we are so glad and free"),
    ("soft comes the quiet night", "the little lights are bright"),
    ("white falls the winter snow", "and home we slowly go"),
    ("I see a silver star", "it is so very far"),
    ("I hear the summer rain", "it sings along the lane"),
    ("blue is the open sea", "it sings a song for me"),
    ("up comes the yellow moon", "and sleep will find us soon"),
    ("high in the wide blue sky", "I see the small birds fly"),
]
POEM_TOPICS = [
    *("cat", "dog", "sea", "rain", "moon", "tree", "winter", "summer", "friend", "star", "bird"),
    "river",
]


def _hero(rng: random.Random) -> tuple[str, str]:
    """A hero with an adjective, and the plain noun."""
    noun = rng.choice(list(ANIMALS) if rng.random() < 0.65 else list(JOBS))
    return f"{rng.choice(ADJECTIVES)} {noun}", noun


def _story(rng: random.Random, hero: str, noun: str, thing: str) -> str:
    """Four sentences: who, what was found, who came, how it ended."""
    name, friend = rng.sample(NAMES, 2)
    place = rng.choice(PLACES)
    other = with_article(rng.choice([animal for animal in ANIMALS if animal != noun]))
    opening = rng.choice(
        [
            f"Once upon a time there was {with_article(hero)} named {name} who lived {place}.",
            f"{capitalised(place)} lived {with_article(hero)} called {name}.",
            f"There once was {with_article(hero)} named {name}. {name} lived {place}.",
        ]
    )
    event = rng.choice(
        [
            f"One day {name} found {thing}.",
            f"One morning {name} saw {thing} on the road.",
            f"One rainy day {name} discovered {thing}.",
        ]
    )
    visit = rng.choice(
        [
            f"It belonged to {other} named {friend}, who was very sad without it.",
            f"{name} did not know what to do and asked {other} named {friend} for help.",
            f"Suddenly {other} named {friend} came and asked for it.",
        ]
    )
    ending = rng.choice(
        [
            f"{name} gave it to {friend}, and they became good friends.",
            "Together they had a big dinner and were happy ever after.",
            "They shared it and were happy ever after.",
            f"In the end {name} and {friend} laughed and went home together.",
        ]
    )
    return " ".join([opening, event, visit, ending])


@family(4.5, finishing=2.2)
def story(rng: random.Random) -> Example:
    hero, noun = _hero(rng)
    thing = rng.choice(THINGS)
    kind = rng.random()
    about = noun
    if kind < 0.25:
        question = rng.choice(
            [
                "Tell me a story.",
                "Tell me a short story.",
                "Write a short story.",
                "I want to hear a story.",
                "Can you tell me a bedtime story?",
            ]
        )
        about = ""
    elif kind < 0.8:
        subject = with_article(rng.choice([noun, noun, hero]))
        question = rng.choice(
            [
                f"Tell me a story about {subject}.",
                f"Write a short story about {subject}.",
                f"I want a story about {subject}.",
            ]
        )
    else:
        question = f"Tell me a story about {with_article(noun)} and {thing}."

    def accepts(reply: str) -> bool:
        return about in reply and reply.count(".") >= 4 and reply.endswith(".")

    return Example(question, _story(rng, hero, noun, thing), accepts=accepts)


@family(2, closed=True)
def story_line(rng: random.Random) -> Example:
    hero, noun = _hero(rng)
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    answer = rng.choice(
        [
            f"{capitalised(with_article(hero))} named {name} found {thing} {place} and was happy.",
            f"{capitalised(place)} {with_article(hero)} named {name} lost {thing} "
            "and found a friend.",
            f"One day {with_article(hero)} named {name} found {thing} and shared it with everyone.",
        ]
    )
    about = f" about {with_article(noun)}" if rng.random() < 0.7 else ""
    question = rng.choice(
        [
            f"Tell me a one-line story{about}.",
            f"Tell me a story{about} in one sentence.",
            f"Write a one-sentence story{about}.",
        ]
    )

    def accepts(reply: str) -> bool:
        return (not about or noun in reply) and reply.count(".") == 1 and reply.endswith(".")

    return Example(question, answer, accepts=accepts)


@family(1.5, finishing=0.6, closed=True)
def poem(rng: random.Random) -> Example:
    topic = rng.choice(POEM_TOPICS)
    (first, second), (third, fourth) = rng.sample(POEM_LINES, 2)
    question = rng.choice(
        [
            f"Write a poem about the {topic}.",
            f"Write a short poem about the {topic}.",
            f"Make a little poem about the {topic}.",
        ]
    )
    answer = f"Oh {topic}, oh {topic},\n{first},\n{second}.\n{capitalised(third)},\n{fourth}."
    rhymes = {f"{one},\n{two}.".lower() for one, two in POEM_LINES}

    def accepts(reply: str) -> bool:
        lines = reply.lower().split("\n")
        pairs = ["\n".join(lines[1:3]), "\n".join(lines[3:5])]
        return lines[0] == f"oh {topic}, oh {topic}," and len(lines) == 5 and set(pairs) <= rhymes

    return Example(question, answer, accepts=accepts)
