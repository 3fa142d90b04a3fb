"""The bar on top of the page: what this is, on which machine, and what is going on."""

from app.views.html import escape, pill

_LOGO = (
    '<svg class="logo" viewBox="0 0 28 28" aria-hidden="true"><rect width="28" height="28" rx="7"/>'
    '<path d="M7 7h5.5a7 7 0 0 1 0 14H7z"/><path class="turn" d="M16 21 21 9"/></svg>'
)


def bar(machine: str, status: tuple[str, str], step: str = "") -> str:
    """The bar; ``status`` is a text and a kind of pill, ``step`` says how far a training is."""
    text, kind = status
    counter = f'<span class="pill figure">{escape(step)}</span>' if step else ""
    return (
        f'<header class="bar">{_LOGO}<div class="brand"><h1>dora_mlx</h1>'
        '<span class="hint">fine-tune on this machine</span></div>'
        f'<div class="state">{pill(text, kind, live=True)}{counter}'
        f'<span class="pill machine">{escape(machine)}</span>'
        '<button type="button" class="theme" aria-label="Switch between light and dark" '
        'title="Light or dark">'
        '<svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="6.2"/>'
        '<path d="M8 1.8a6.2 6.2 0 0 1 0 12.4z"/></svg></button></div></header>'
    )
