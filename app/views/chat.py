"""What the Chat tab says around the conversation."""

from typing import Any

from app.views.html import escape


def text_of(content: Any) -> str:
    """The text of a message as Gradio hands it over: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def expected(answer: str) -> str:
    """The answer that the data give to the question that was picked."""
    if not answer:
        return ""
    return (
        '<div class="expected"><strong>The data answer</strong>'
        f'<p tabindex="0">{escape(answer)}</p></div>'
    )


def pace(tokens: int, seconds: float, training: bool) -> str:
    """How fast the last answers came."""
    speed = f"{tokens / seconds:.0f} tokens/s" if seconds > 0 and tokens else ""
    slow = "a training is under way, which makes answers slower" if training else ""
    said = " · ".join(part for part in (speed, slow) if part)
    return f'<p class="hint figures" role="status">{escape(said)}</p>'


def who(name: str, detail: str) -> str:
    """Whose answers a column holds."""
    return f'<div class="who"><strong>{escape(name)}</strong><span>{escape(detail)}</span></div>'


def question_label(text: str) -> str:
    """A question short enough for a button."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59].rstrip() + "…"
