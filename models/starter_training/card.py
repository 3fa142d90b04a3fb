"""Writes the model card from the measured rates."""

from pathlib import Path

from starter_training.evaluation import Score

CARD = """\
---
license: apache-2.0
language: en
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
---

# Pebble, the starter model

A very small chat model that comes with dora_mlx, so that loading, chatting and fine-tuning can be
tried at once and without a network. It is **not an assistant**: it knows a few thousand simple
sentences and invents the rest.

- Llama architecture: {parameters} parameters, 6 layers, width 256, 4 heads (2 key-value heads),
  feed-forward 512, tied embeddings, vocabulary 2048 (byte-level BPE, every digit a token).
- 4-bit MLX weights in groups of 32, scales in float32.
- Context: made for 512 tokens, trained on conversations of up to 384.
- Chat template: `<|im_start|>role`, line break, content, `<|im_end|>`; roles system, user and
  assistant.
- Greedy decoding is the right setting; sampling makes such a small model wander.

## What it can do

Short English questions of the kinds in the table, several turns, and some system prompts ("Speak
like a robot.", "Be very excited.", "Reply with a JSON object."). Ask it for example:

    Hello!
    What is 2 plus 3?
    What is the capital of France?
    What colour is the sky?
    Name three fruits.
    Sort these numbers: 9, 4, 7.
    Tell me a one-line story about a dog.

## What it cannot do

It cannot spell, write in upper case, sort words, or subtract larger numbers, and it miscounts when
counting from other numbers than 1. Anything outside the table it answers with something that looks
like one of these answers. Its facts come from tables of some hundred entries, its stories from
templates; do not rely on any answer.

## Exact-answer rates

Measured on these 4-bit weights, greedy. An answer counts only if it is the expected sentence or
ends in the expected word; a list must have the right number of different, fitting things; a story
or poem must have the right form and topic.

The questions were kept out of training. Some kinds have so few questions that this is not
possible: in groups marked with a star, all or some of the questions were trained on. The other
closed facts (a capital, a sum up to 20) were nearly always seen in other words.

{table}

## How it was made

`python models/build_starter.py`: a seeded generator writes synthetic conversations, the tokenizer
and the network are trained on them from nothing, in torch on two CPU cores:

- {steps} steps, {tokens:.1f} million tokens,
- {minutes:.0f} minutes of the clock, {cpu:.0f} minutes of processor time.

The last two sevenths of the steps have more sums, lists and copying, and the last fifth sees the
weights rounded to 4 bits in the forward pass. No text, data or weights from elsewhere were used.

## Licence

Apache-2.0, like the project.
"""


def write_card(
    file: Path,
    scores: dict[str, Score],
    closed_groups: set[str],
    progress: dict[str, float],
    parameters: str,
) -> None:
    rows = ["| Questions | Right | Share |", "| --- | ---: | ---: |"]
    for title, score in scores.items():
        star = " *" if title in closed_groups else ""
        share = 100 * score.right / score.asked
        rows.append(f"| {title}{star} | {score.right} of {score.asked} | {share:.0f} % |")
    file.write_text(
        CARD.format(
            table="\n".join(rows),
            parameters=parameters,
            tokens=progress["tokens"] / 1e6,
            steps=progress["step"],
            minutes=progress["seconds"] / 60,
            cpu=progress["cpu_seconds"] / 60,
        )
    )
