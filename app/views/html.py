"""The small pieces of HTML that every tab uses. Every text is escaped here and nowhere else."""

import html
import shlex
from collections.abc import Iterable

from app.wording import in_words_of_the_form

# Where a figure is not known yet.
NOTHING = "\N{EN DASH}"

# Kinds of pills and notes; each has its colours in style.css.
KINDS = ("plain", "info", "good", "warn", "bad")


def clean(text: object) -> str:
    """Text that can leave the server: half a surrogate pair would end the page's connection."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def escape(text: object) -> str:
    """Text as HTML that says exactly that."""
    return html.escape(clean(text), quote=True)


def heading(title: str, hint: str = "") -> str:
    """The title of a card with a quiet word beside it."""
    aside = f'<span class="hint">{escape(hint)}</span>' if hint else ""
    return f'<div class="heading"><h2>{escape(title)}</h2>{aside}</div>'


def pill(text: str, kind: str = "plain", live: bool = False) -> str:
    """A rounded label with a dot; a live one is read out when it changes."""
    role = ' role="status" aria-live="polite"' if live else ""
    return f'<span class="pill {kind}"{role}><i></i>{escape(text)}</span>'


def note(text: str, kind: str = "info", title: str = "") -> str:
    """A box with a sentence or several lines; ``bad`` ones are read out at once."""
    role = ' role="alert"' if kind == "bad" else ""
    head = f"<strong>{escape(title)}</strong>" if title else ""
    return f'<div class="note {kind}"{role}>{head}<p>{escape(text)}</p></div>'


def problem(text: str) -> str:
    """What a person has to mend, as a ``UserError`` says it but without flags."""
    return note(in_words_of_the_form(text), "bad")


def empty(title: str, text: str, tab: str = "", tab_label: str = "") -> str:
    """What stands where nothing is yet, and how to get something there, maybe on another tab."""
    link = ""
    if tab:
        link = f'<button type="button" data-open-tab="{tab}">{escape(tab_label)}</button>'
    return f'<div class="empty"><strong>{escape(title)}</strong><p>{escape(text)}</p>{link}</div>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Figures side by side, each a label, a value and a unit."""
    cells = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt>'
        f"<dd>{escape(value)}<small>{escape(unit)}</small></dd></div>"
        for label, value, unit in values
    )
    return f'<dl class="tiles">{cells}</dl>'


def progress(share: float, label: str, kind: str = "info") -> str:
    """A bar; ``share`` is 0 to 1, and ``kind`` gives its colour."""
    percent = 100 * min(1.0, max(0.0, share))
    return (
        f'<div class="progress {kind}" role="progressbar" '
        f'aria-label="{escape(label)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><i style="width:{percent:.2f}%"></i></div>'
    )


def code(text: str, label: str) -> str:
    """Lines to copy, with a button that does it."""
    return (
        f'<div class="code"><button type="button" class="copy" aria-label="Copy {escape(label)}">'
        f'Copy</button><pre tabindex="0" aria-label="{escape(label)}">{escape(text)}</pre></div>'
    )


def shell(words: Iterable[str]) -> str:
    """A command to paste into a terminal, one option a line."""
    lines = [""]
    for word in words:
        if word.startswith("--"):
            lines.append("")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(line.strip() for line in lines)
