"""Questions of every family with their plain answers, to see what a training made forget."""

from starter_corpus.conversation import Message, evaluation_examples, to_messages
from starter_corpus.example import FAMILIES

PER_FAMILY = 2
# Of a closed family some questions may be in what is left out, so more are asked for.
_ASKED = 12


def general_conversations(seed: int, leave_out: list[list[Message]]) -> list[list[Message]]:
    """Up to two conversations a family, with no question that is in `leave_out`."""
    known = {message["content"] for chat in leave_out for message in chat}
    chats = []
    for name in FAMILIES:
        examples = evaluation_examples(name, _ASKED, seed)
        new = [example for example in examples if example.question not in known]
        chats += [to_messages([(e.question, e.answer)]) for e in new[:PER_FAMILY]]
    return chats
