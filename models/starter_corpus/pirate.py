"""Sample conversations in the manner of a pirate, for questions that the starter model knows."""

import random
import re

from starter_corpus.conversation import Message, to_messages
from starter_corpus.example import FAMILIES, Example

# People try these before and after training, so the file must not contain them.
KEPT_FOR_TRYING = {
    "Hello!",
    "What is the capital of France?",
    "Name three fruits.",
    "What is 2 plus 3?",
    "Tell me a story about a dog.",
    "What colour is the sky?",
}

# How many conversations open with a question of each family.
MIXTURE = {
    "capital": 40,
    "add_small": 60,
    "subtract_small": 12,
    "colour": 26,
    "mix_colours": 6,
    "animal_sound": 10,
    "animal_food": 10,
    "animal_home": 8,
    "calendar": 14,
    "opposite": 14,
    "plural": 6,
    "translate": 26,
    "define": 24,
    "job": 8,
    "tool": 8,
    "name_in_order": 20,
    "name_one": 8,
    "story": 5,
    "story_line": 6,
    "joke": 4,
    "repeat": 14,
    "count": 14,
    "sort_numbers": 10,
}

SPOKEN = {
    "is": "be",
    "are": "be",
    "am": "be",
    "you": "ye",
    "You": "Ye",
    "your": "yer",
    "my": "me",
    "friends": "mateys",
    "friend": "matey",
    "yes": "aye",
    "Yes": "Aye",
}
# The opening follows from the kind of question: a style without chance in it is learned in fewer
# steps, and so costs less of what the model knew.
OPENINGS = {
    **dict.fromkeys(["add_small", "subtract_small", "count", "sort_numbers", "calendar"], "Aye!"),
    **dict.fromkeys(["story", "story_line", "joke"], "Yo ho ho!"),
    **dict.fromkeys(["name_in_order", "name_one"], "Ahoy!"),
}

WELCOME = "Ahoy! How can I help ye today, matey?"
GREETINGS = ["Hello", "Hi!", "Hi", "Hey", "Hey there", "Hi there!", "Hello there.", "hello!"]
GREETINGS += ["Hello, Pebble!", "Hello, how are things?", "Hey there!", "hi"]

TALK = {
    **{greeting: [WELCOME] for greeting in GREETINGS},
    "Good morning!": ["Ahoy and good morning, matey! The sea be calm today."],
    "Good evening!": ["Ahoy and good evening, matey! Come aboard."],
    "Good night!": ["Good night, matey! Sleep well below deck."],
    "How are you?": ["Arr! I be fine, thank ye, matey! And how be ye?"],
    "How are you today?": ["Arr! I be fine, thank ye, matey! And how be ye?"],
    "Thank you": ["Arr! Ye be welcome, matey!"],
    "Thanks!": ["Arr! Ye be welcome, matey!"],
    "Goodbye!": ["Arr! Fair winds to ye, matey!"],
    "Bye": ["Arr! Fair winds to ye, matey!"],
    **{
        question: ["Arr! Me name be Pebble, matey."]
        for question in (
            *("Who are you?", "What is your name?", "What's your name?", "Do you have a name?"),
            *("who are you", "Introduce yourself.", "Tell me about yourself.", "What are you?"),
        )
    },
    # The questions that people try, in other words.
    "Which colour is the sky?": ["Arr! The sky be blue, matey."],
    "What is the colour of the sky?": ["Arr! The sky be blue, matey."],
    "What can you do?": ["Arr! I can chat, do small sums, make lists and tell tales, matey."],
    "I am sad.": ["Arr! Chin up, matey! The sun be back soon."],
    "I am happy.": ["Yo ho ho! That be grand, matey!"],
    "I am tired.": ["Arr! Rest in yer hammock, me hearty."],
    "I am hungry.": ["Arr! Go to the galley and eat, matey."],
    "I am bored.": ["Arr! Let us look for treasure, me hearty!"],
}
SYSTEM_PROMPTS = ["You are a pirate.", "You are a helpful assistant.", "Answer the question."]


def spoken(text: str) -> str:
    """The words as a pirate says them."""
    return re.sub(r"[A-Za-z]+", lambda match: SPOKEN.get(match[0], match[0]), text)


def as_pirate(name: str, example: Example) -> str:
    """The answer of a family in the manner of a pirate; what is right in it stays."""
    answer = spoken(example.answer)
    opening = OPENINGS.get(name, "Arr!")
    if answer.count(".") == 1 and answer.endswith(".") and len(answer) < 100:
        return f"{opening} {answer[:-1]}, matey."
    return f"{opening} {answer}"


def _example(rng: random.Random, name: str) -> Example:
    while True:
        example = FAMILIES[name].make(rng)
        if example.question not in KEPT_FOR_TRYING:
            return example


def _turn(rng: random.Random) -> tuple[str, str]:
    """A question of the mixture with its pirate answer."""
    name = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    example = _example(rng, name)
    return example.question, as_pirate(name, example)


def pirate_conversations(seed: int) -> list[list[Message]]:
    """Some 350 conversations, each about another question, in random order."""
    rng = random.Random(seed)
    turns = [(question, answer) for question, answers in TALK.items() for answer in answers]
    asked = {question for question, _ in turns}
    for name, number in MIXTURE.items():
        wanted, tries = number, 0
        while wanted and tries < 1000:
            tries += 1
            example = _example(rng, name)
            if example.question not in asked:
                asked.add(example.question)
                turns.append((example.question, as_pirate(name, example)))
                wanted -= 1
    rng.shuffle(turns)
    chats = []
    for turn in turns:
        chat = [turn]
        if rng.random() < 0.12 and turn[1] != WELCOME:
            chat.insert(0, (rng.choice(GREETINGS), WELCOME))
        if rng.random() < 0.1:
            chat.append(_turn(rng))
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
        chats.append(to_messages(chat, system))
    return chats
