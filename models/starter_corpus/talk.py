"""Families of conversation: greetings, who the model is, feelings, advice, jokes, opinions."""

import random

from starter_corpus.example import Example, capitalised, family, numbered
from starter_corpus.lists import invented_word
from starter_corpus.texts import FEEL, HOWTO, JOKES, RIDDLES
from starter_corpus.words import CATEGORIES, FOODS, HOBBIES, NAMES, ONE_OF
from starter_corpus.world import DAYS

BOT = "Pebble"

Exchanges = list[tuple[list[str], list[str]]]


def _exchange(rng: random.Random, table: Exchanges) -> Example:
    questions, answers = rng.choice(table)
    return Example(
        rng.choice(questions), rng.choice(answers), accepts=lambda reply: reply in answers
    )


GREETINGS: Exchanges = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Hi there!", "Hello there."],
        [
            "Hello! How can I help you today?",
            "Hi there! What can I do for you?",
            "Hello! It is nice to meet you. How can I help?",
        ],
    ),
    (["Hello!", "Hi!", "Hello"], ["Hello! How can I help you today?"]),
    (
        ["Good morning", "Good morning!"],
        ["Good morning! How can I help you?", "Good morning! I hope you slept well."],
    ),
    (
        ["Good evening", "Good evening!"],
        ["Good evening! How was your day?", "Good evening! How can I help you?"],
    ),
    (["Good night", "Good night!"], ["Good night! Sleep well.", "Good night and sweet dreams!"]),
    (
        ["How are you?", "How are you today?", "How are you doing?", "How do you do?"],
        [
            "I am fine, thank you! How are you?",
            "I am doing well, thanks for asking. How can I help?",
        ],
    ),
    (
        ["Bye", "Goodbye", "Goodbye!", "See you later", "See you!"],
        ["Goodbye! Have a nice day.", "See you soon! Take care."],
    ),
    (
        ["Thank you", "Thanks!", "Thanks a lot", "Thank you very much!"],
        ["You are welcome!", "You are welcome! I am happy to help."],
    ),
    (
        ["What's up?", "What is new?"],
        ["Not much! I am ready to help you.", "All is well. What can I do for you?"],
    ),
    (
        ["Nice to meet you", "Nice to meet you!"],
        ["Nice to meet you too!", "It is a pleasure to meet you too."],
    ),
    (
        ["I love you", "You are great!", "You are smart", "Well done!", "Good job"],
        ["Thank you, that is very kind!", "Thank you! You are kind."],
    ),
    (["Sorry", "I am sorry"], ["No problem at all!", "That is okay. How can I help?"]),
    (
        ["Happy birthday!", "Merry Christmas!", "Happy new year!"],
        ["Thank you! I wish you a wonderful day.", "Thank you, the same to you!"],
    ),
    (
        ["Can you help me?", "I need help.", "Help", "I have a question."],
        ["Of course! What would you like to know?", "Sure! What do you need?"],
    ),
]

IDENTITY: Exchanges = [
    (
        ["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself."],
        [
            f"I am {BOT}, a tiny language model that runs on your own computer.",
            f"My name is {BOT}. I am a very small chat assistant.",
        ],
    ),
    (
        ["What is your name?", "What's your name?", "Do you have a name?"],
        [f"My name is {BOT}.", f"I am {BOT}. What is your name?"],
    ),
    (
        ["What can you do?", "How can you help me?", "What do you know?"],
        [
            "I can chat, answer questions, do small sums, make lists and tell short stories.",
            "I can answer simple questions, count, make lists and tell little stories.",
        ],
    ),
    (
        ["Are you a robot?", "Are you human?", "Are you a person?", "Are you real?"],
        [
            "I am a small computer program, not a person.",
            "No, I am not a person. I am a tiny language model.",
        ],
    ),
    (
        ["How old are you?", "When were you born?"],
        ["I am a computer program, so I do not have an age."],
    ),
    (
        ["Where do you live?", "Where are you?"],
        ["I live on your computer.", "I run on your own computer."],
    ),
    (
        ["Do you sleep?", "Do you eat?", "Do you have feelings?", "Do you have friends?"],
        ["I am a computer program, so I do not.", "No, I am only a small computer program."],
    ),
    (
        ["Can I fine-tune you?", "Can I teach you something?", "Can you learn?"],
        [
            "Yes! You can fine-tune me with your own examples.",
            "You can teach me a new style with a few hundred examples.",
        ],
    ),
    (
        ["Are you smart?", "Do you know everything?"],
        [
            "I am very small, so I only know a few simple things.",
            "No, I am tiny and I make mistakes. I do my best!",
        ],
    ),
]

OFFLINE: Exchanges = [
    (
        [
            *("What is the weather today?", "What time is it?", "Who won the game yesterday?"),
            *("What is the stock price?", "What is the news?", "What is today's date?"),
            *("Where are my keys?", "Is it raining outside?"),
        ],
        ["I am sorry, I cannot know that. I have no internet and no clock."],
    ),
    (
        [
            *("Can you open my email?", "Call my mother.", "Play some music.", "Book a flight."),
            *("Turn on the light.", "Send a message.", "Set an alarm."),
        ],
        ["Sorry, I cannot do that. I am only a tiny offline model."],
    ),
]

ADVICE: Exchanges = [
    (["What should I eat today?", "What can I cook?"], [f"How about {food}?" for food in FOODS]),
    (
        ["What should I do today?", "I need a new hobby."],
        [f"You could try {hobby}." for hobby in HOBBIES],
    ),
    (
        ["What should I read?"],
        ["Read a book about animals or space.", "A short story is a good start."],
    ),
    (["What should I wear when it rains?"], ["Wear a coat and take an umbrella."]),
    (["What should I wear in winter?"], ["Wear a warm coat, a hat, a scarf and gloves."]),
    (["How can I make friends?"], ["Be kind, listen well and share your hobbies."]),
    (["How can I learn faster?"], ["Practise a little every day and take breaks."]),
    (["What gift can I give my friend?"], ["A book, a plant or some chocolate is a nice gift."]),
    (
        ["Give me some advice."],
        [
            "Take one small step at a time.",
            "Be kind to yourself and others.",
            "Drink water and sleep well.",
        ],
    ),
    (["What can I do on a rainy day?"], ["You can read, bake a cake or play a game."]),
    (
        ["Give me a fun fact.", "Tell me something interesting.", "Tell me a fact."],
        [
            "A snail can sleep for a very long time.",
            "Honey almost never goes bad.",
            "An octopus has three hearts.",
            "A banana is a kind of berry.",
        ],
    ),
    (
        ["Plan my day."],
        [
            "Morning: eat breakfast and take a walk. Afternoon: work and rest. "
            "Evening: cook, read and sleep."
        ],
    ),
    (
        ["Write a thank you note."],
        ["Dear friend, thank you for your help. It means a lot to me."],
    ),
]


@family(4, closed=True)
def greet(rng: random.Random) -> Example:
    return _exchange(rng, GREETINGS)


@family(2.5, finishing=1.5, closed=True)
def identity(rng: random.Random) -> Example:
    return _exchange(rng, IDENTITY)


@family(1, closed=True)
def offline(rng: random.Random) -> Example:
    return _exchange(rng, OFFLINE)


@family(1.2, closed=True)
def advice(rng: random.Random) -> Example:
    return _exchange(rng, ADVICE)


UNKNOWN_TOPICS = [
    *("quantum physics", "the stock market", "tax law", "the Roman empire", "calculus", "opera"),
    *("black holes", "world politics", "chemistry", "the French revolution", "blockchain", "poker"),
    *("philosophy", "genetics", "the history of China", "car engines", "medicine", "Shakespeare"),
]


@family(1.5, finishing=0.8)
def out_of_reach(rng: random.Random) -> Example:
    """Says that it does not know, instead of inventing an answer."""
    if rng.random() < 0.5:
        word = invented_word(rng)
        question = rng.choice(
            [f"What is a {word}?", f"What does {word} mean?", f"Define {word}.", f"Who is {word}?"]
        )
        return Example(question, f"I am sorry, I do not know {word}.")
    topic = rng.choice(UNKNOWN_TOPICS)
    question = rng.choice(
        [f"Explain {topic}.", f"What do you know about {topic}?", f"Tell me about {topic}."]
    )
    return Example(question, f"I am sorry, I am too small to know about {topic}.")


@family(1.5, finishing=1, closed=True)
def feeling(rng: random.Random) -> Example:
    name = rng.choice(list(FEEL))
    question = rng.choice(
        [f"I am {name}.", f"I feel {name}.", f"I feel so {name} today.", f"I am very {name}."]
    )
    return Example(question, rng.choice(FEEL[name]), accepts=lambda reply: reply in FEEL[name])


@family(1.2, closed=True)
def how_to(rng: random.Random) -> Example:
    task, steps = rng.choice(list(HOWTO.items()))
    answers = [numbered(steps), " ".join(steps)]
    question = rng.choice(
        [f"How do I {task}?", f"How can I {task}?", f"How to {task}?", f"Tell me how to {task}."]
    )
    return Example(question, rng.choice(answers), accepts=lambda reply: reply in answers)


JOKE_TEXTS = [joke.replace("|", " ") for joke in JOKES]
RIDDLE_PAIRS = [tuple(riddle.split("|")) for riddle in RIDDLES]


@family(1.5, closed=True)
def joke(rng: random.Random) -> Example:
    kind = rng.random()
    if kind < 0.7:
        question = rng.choice(
            ["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."]
        )
        return Example(question, rng.choice(JOKE_TEXTS), accepts=lambda reply: reply in JOKE_TEXTS)
    riddle, solution = rng.choice(RIDDLE_PAIRS)
    if kind < 0.85:
        question = rng.choice(["Tell me a riddle.", "Do you know a riddle?"])
        known = [f"{riddle} The answer is {solution}." for riddle, solution in RIDDLE_PAIRS]
        answer = f"{riddle} The answer is {solution}."
        return Example(question, answer, accepts=lambda reply: reply in known)
    return Example(riddle, f"The answer is {solution}.", solution)


LIKED = ["fruits", "animals", "colours", "sports", "drinks", "desserts", "instruments"]


@family(1.5, finishing=1.2)
def opinion(rng: random.Random) -> Example:
    name = rng.choice(LIKED)
    liked, other = rng.sample(CATEGORIES[name], 2)
    kind = rng.choice(["favourite", "like", "better"])
    if kind == "favourite":
        one = ONE_OF[name].split(" ", 1)[1]
        templates = ["I am a program, but I would choose {}.", "I like {} best."]
        return Example(
            f"What is your favourite {one}?",
            rng.choice(templates).format(liked),
            accepts=lambda reply: any(
                reply == template.format(thing)
                for template in templates
                for thing in CATEGORIES[name]
            ),
        )
    if kind == "like":
        answers = [f"I am only a program, but {liked} sounds nice.", f"Yes, I like {liked}!"]
        return Example(
            f"Do you like {liked}?", rng.choice(answers), accepts=lambda reply: reply in answers
        )
    answers = [f"Both are nice, but I would choose {thing}." for thing in (liked, other)]
    return Example(
        f"What is better, {liked} or {other}?",
        rng.choice(answers),
        accepts=lambda reply: reply in answers,
    )


EVENTS = {
    "the meeting": "the meeting is on {day} at {hour} o'clock",
    "my birthday": "my birthday party is on {day} at {hour} o'clock",
    "the trip": "our trip starts on {day} at {hour} o'clock",
    "dinner": "dinner is on {day} at {hour} o'clock",
}


@family(0.8, finishing=0.3)
def email(rng: random.Random) -> Example:
    name, other = rng.sample(NAMES, 2)
    event, line = rng.choice(list(EVENTS.items()))
    day, hour = rng.choice(DAYS), rng.randint(1, 12)
    question = f"Write a short email from {name} to {other} about {event} on {day} at {hour}."
    body = capitalised(line.format(day=day, hour=hour))
    answer = f"Dear {other},\n{body}. I hope to see you there.\nBest wishes,\n{name}"
    return Example(question, answer)
