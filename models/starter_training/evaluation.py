"""Exact-answer rates of a model folder on held-out questions, family by family."""

import ctypes
import ctypes.util
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# On Linux, MLX's own matrix product is far slower than OpenBLAS, which takes its place when it
# is loaded first.
if ctypes.util.find_library("openblas"):
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load
from starter_corpus.conversation import Message, evaluation_examples
from starter_corpus.example import Example

EVALUATION_SEED = 20_000
LONGEST_REPLY = 100  # tokens

# What the model card calls the families; those that stand in no group have their own line.
GROUPS = {
    "greetings and small talk": ["greet", "identity", "offline", "feeling", "advice", "opinion"],
    "sums up to 20": ["add_small", "subtract_small"],
    "sums with two digits": ["add_large", "subtract_large"],
    "times and divided by, up to 10": ["multiply", "divide"],
    "word problems": ["word_problem"],
    "counting, next number": ["count", "next_number"],
    "comparing, even or odd, double, half": ["compare", "even_or_odd", "double_or_half"],
    "numbers in words": ["numbers_in_words"],
    "sorting 3 to 5 numbers": ["sort_numbers"],
    "biggest, smallest, how many of some numbers": ["pick_number"],
    "units": ["units"],
    "capitals": ["capital"],
    "animals": [
        *("animal_sound", "animal_legs", "animal_home", "animal_food", "animal_baby"),
        *("animal_colour", "describe_animal", "animal_kind", "bigger_animal"),
    ],
    "colours": ["colour", "mix_colours"],
    "calendar, planets, shapes": ["calendar", "space", "shape"],
    "meanings, jobs, tools, body": ["define", "job", "tool", "body"],
    "opposites, synonyms, plurals, past, rhymes": [
        *("opposite", "synonym", "plural", "past_tense", "rhyme"),
    ],
    "spelling and letters": ["spell", "letters"],
    "translating single words": ["translate"],
    "is it a ...": ["category", "odd_one_out"],
    "naming things, also as bullets or numbers": ["name_things", "list_format", "name_one"],
    "first, last, count, reshape of a given list": ["pick_word", "reshape_list"],
    "reversing a given list": ["reverse_list"],
    "alphabetical order": ["sort_words"],
    "repeating and quoting": ["repeat", "quote", "say_times"],
    "upper case": ["uppercase"],
    "counting words": ["count_words"],
    "rewriting a sentence": ["rewrite", "sentence_with", "sentiment"],
    "JSON": ["write_json"],
    "answer stands in the question": ["reading"],
    "stories and poems (form only)": ["story", "story_line", "poem"],
    "short email": ["email"],
    "jokes, how-to": ["joke", "how_to"],
    "admits that it does not know": ["out_of_reach"],
}


@dataclass(frozen=True)
class Score:
    right: int
    asked: int

    def __str__(self) -> str:
        return f"{self.right}/{self.asked}"


def load_for_batches(folder: Path):
    """The model with its 4-bit weights multiplied out once, which is faster on a CPU."""
    model, tokenizer = load(str(folder))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, tokenizer


def _generate(model, tokenizer, prompts: list[list[int]]) -> list[str]:
    """Greedy replies to prompts that all have the same number of tokens."""
    cache = make_prompt_cache(model)
    tokens = mx.array(prompts)
    columns = []
    open_rows = mx.ones(len(prompts), dtype=mx.bool_)
    for _ in range(LONGEST_REPLY):
        chosen = mx.argmax(model(tokens, cache=cache)[:, -1], axis=-1)
        columns.append(chosen)
        open_rows = mx.logical_and(open_rows, chosen != tokenizer.eos_token_id)
        if not mx.any(open_rows).item():
            break
        tokens = chosen[:, None]
    replies = []
    for row in mx.stack(columns, axis=1).tolist():
        length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        replies.append(tokenizer.decode(row[:length]))
    return replies


def replies_to(model, tokenizer, chats: list[list[Message]]) -> list[str]:
    """Greedy replies, computed in batches of equally long prompts."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, messages in enumerate(chats):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        by_length[len(prompt)].append((index, prompt))
    replies = [""] * len(chats)
    for same in by_length.values():
        texts = _generate(model, tokenizer, [prompt for _, prompt in same])
        for (index, _), text in zip(same, texts, strict=True):
            replies[index] = text
    return replies


def family_examples(name: str, number: int = 40) -> list[Example]:
    return evaluation_examples(name, number, EVALUATION_SEED)


def family_scores(folder: Path, number: int = 40) -> tuple[dict[str, Score], list[str]]:
    """The score of each family, and the wrong answers for a reader."""
    model, tokenizer = load_for_batches(folder)
    names = [name for group in GROUPS.values() for name in group]
    asked = [(name, example) for name in names for example in family_examples(name, number)]
    chats = [[{"role": "user", "content": example.question}] for _, example in asked]
    replies = replies_to(model, tokenizer, chats)
    right: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    wrong = []
    for (name, example), reply in zip(asked, replies, strict=True):
        good = example.is_right(reply)
        total[name] += 1
        right[name] += good
        if not good:
            wrong.append(f"{name}: {example.question!r} -> {reply!r} (as {example.answer!r})")
    return {name: Score(right[name], total[name]) for name in total}, wrong


def grouped(scores: dict[str, Score]) -> dict[str, Score]:
    """Adds the families of a group together."""
    result = {}
    for title, names in GROUPS.items():
        parts = [scores[name] for name in names if name in scores]
        result[title] = Score(sum(part.right for part in parts), sum(part.asked for part in parts))
    return result
