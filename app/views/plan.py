"""The memory plan of a training as a bar."""

from app.views import html
from app.views.numbers import gigabytes
from app.wording import in_words_of_the_form
from dora_mlx import MemoryPlan

_VERDICTS = {
    "fits": ("fits", "good"),
    "tight": ("tight", "warn"),
    "does not fit": ("does not fit", "bad"),
}


def bar(plan: MemoryPlan) -> str:
    """What the peak is made of, against what this machine can give, and what to change."""
    word, kind = _VERDICTS[plan.verdict]
    # A plan over the limit fills the bar; the mark then says where the limit is.
    scale = max(plan.peak, plan.limit, 1)
    parts = [(name, size) for name, size in plan.parts.items() if size > 0]
    pieces = "".join(
        f'<i style="width:{100 * size / scale:.2f}%;--key:var(--series-{number % 8 + 1})" '
        f'title="{html.escape(name)} {gigabytes(size)}"></i>'
        for number, (name, size) in enumerate(parts)
    )
    keys = "".join(
        f'<li><i style="--key:var(--series-{number % 8 + 1})"></i>{html.escape(name)} '
        f"<b>{gigabytes(size)}</b></li>"
        for number, (name, size) in enumerate(parts)
    )
    sentences = "".join(
        f"<li>{html.escape(in_words_of_the_form(sentence))}</li>" for sentence in plan.advice
    )
    advice = f'<ul class="advice">{sentences}</ul>' if sentences else ""
    how = ", with gradient checkpointing" if plan.grad_checkpoint else ""
    return (
        '<div class="plan"><div class="plan-head">'
        f"<span>Estimated memory <b>{gigabytes(plan.peak)}</b> of {gigabytes(plan.limit)}"
        f"{how}</span>"
        f'<span class="verdict {kind}" role="status">{word}</span></div>'
        f'<div class="plan-bar {kind}" role="img" aria-label="Memory {gigabytes(plan.peak)} of '
        f'{gigabytes(plan.limit)}: {word}">{pieces}'
        f'<span style="left:{100 * plan.limit / scale:.2f}%"></span></div>'
        f'<ul class="legend">{keys}</ul>'
        f"{advice}</div>"
    )
