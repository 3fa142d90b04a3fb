"""What the Data tab says about a data file."""

from collections.abc import Iterable
from typing import Any

from app.views.html import escape
from app.views.numbers import count
from app.wording import in_words_of_the_form

# More of one example than anybody reads, and more than a browser draws at once.
_TOKENS_SHOWN = 4000
_PROBLEMS_SHOWN = 40
_MARKS = {"good": "✓", "warn": "!", "bad": "!"}


def checks(overview: Any, skip_bad_rows: bool) -> str:
    """What was found, one item for each kind, errors with their lines."""
    items = [_usable(overview), *_problems(overview, "error", skip_bad_rows)]
    items += _problems(overview, "warning", skip_bad_rows)
    items += [_item("warn", notice) for report in overview.reports for notice in report.notices]
    for how, number in overview.counts.items():
        if number:
            title = f"{_TREATED.get(how, how.capitalize())}: {count(number)}"
            items.append(_item("warn", title))
    lengths = overview.train.percentiles
    if lengths:
        items.append(
            _item(
                "good",
                f"{count(overview.train.trained)} of {count(overview.train.tokens)} tokens are "
                f"learned ({overview.train.share_trained:.0%})",
                [f"half of the examples have at most {lengths[3]:,} tokens, the longest "
                 f"{lengths[-1]:,}"],
            )
        )  # fmt: skip
    return f'<ul class="checks">{"".join(items)}</ul>'


_TREATED = {
    "cut": "Cut, because they were longer than the limit",
    "split": "Split, because they were longer than the limit",
    "dropped": "Left out, because they were longer than the limit",
    "without an answer": "Left out, because no answer is within the limit",
}


def _usable(overview: Any) -> str:
    train, valid = overview.train.examples, overview.valid.examples
    rows = sum(report.rows for report in overview.reports)
    detail = [f"{count(train)} to train on, {count(valid)} to validate on, from {count(rows)} rows"]
    if not train:
        return _item("bad", "Nothing to train on", detail)
    return _item("good", f"{count(train + valid)} usable examples", detail)


def _problems(overview: Any, severity: str, skip_bad_rows: bool) -> Iterable[str]:
    for report in overview.reports:
        lines = [in_words_of_the_form(s) for s in report.sentences(severity, _PROBLEMS_SHOWN)]
        if not lines:
            continue
        if severity == "error":
            what = "are left out" if skip_bad_rows else "cannot be used"
            title = f"{report.bad_rows:,} {report.unit}s of {_name(report.source)} {what}"
            if not skip_bad_rows:
                lines = ["Mend them, or leave them out: “Skip bad rows” is under “How it is read”.",
                         *lines]  # fmt: skip
            yield _item("warn" if skip_bad_rows else "bad", title, lines)
        else:
            number = report.count("warning")
            rows = f"{number:,} {report.unit}{'s'[: number > 1]} of {_name(report.source)}"
            title = f"{rows} may deserve a look; what is not called left out is used"
            yield _item("warn", title, lines)


def _name(source: Any) -> str:
    return str(source).rsplit("/", 1)[-1]


def _item(kind: str, title: str, details: Iterable[str] = ()) -> str:
    lines = "".join(f"<li>{escape(detail)}</li>" for detail in details)
    more = f'<ul class="places" tabindex="0">{lines}</ul>' if lines else ""
    return (
        f'<li class="{kind}"><i aria-hidden="true">{_MARKS[kind]}</i>'
        f"<div><strong>{escape(title)}</strong>{more}</div></li>"
    )


def legend() -> str:
    """What the colours of an example mean."""
    kinds = (("trained", "learned"), ("masked", "read only"), ("template", "template"))
    marks = "".join(f'<span><i class="{css}"></i>{label}</span>' for css, label in kinds)
    return f'<div class="marks">{marks}</div>'


def example(spans: Iterable[Any], number: int, of: int) -> str:
    """The text of an example, its tokens coloured by what becomes of them; ``number`` from 1."""
    pieces, tokens, trained = [], 0, 0
    for span in spans:
        tokens += span.tokens
        trained += span.tokens if span.trained else 0
        if tokens <= _TOKENS_SHOWN:
            kind = "trained" if span.trained else "template" if span.special else "masked"
            special = " special" if span.special else ""
            pieces.append(f'<span class="{kind}{special}">{escape(span.text)}</span>')
    hidden = tokens - _TOKENS_SHOWN
    rest = f'<span class="more"> … and {hidden:,} more tokens</span>' if hidden > 0 else ""
    return (
        f'<p class="hint figures">Example {number:,} of {of:,} · {tokens:,} tokens, {trained:,} '
        f'learned</p><div class="spans" tabindex="0">{"".join(pieces)}{rest}</div>'
    )


def histogram(bars: Iterable[tuple[int, int, int]]) -> str:
    """How long the examples are: one bar for each range of length."""
    bars = list(bars)
    if not bars:
        return ""
    low, high = bars[0][0], bars[-1][1]
    if len(bars) == 1:
        long = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f'<p class="hint figures">Every example has {long} tokens.</p>'
    most = max(number for _, _, number in bars)
    drawn = "".join(
        f'<i style="height:{max(2.0, 100 * number / most) if number else 0:.1f}%" '
        f'title="{start:,} to {end:,} tokens: {number:,} examples"></i>'
        for start, end, number in bars
    )
    said = ", ".join(f"{start} to {end} tokens: {number}" for start, end, number in bars)
    return (
        f'<h3 class="group">Length <span class="hint">tokens of an example</span></h3>'
        f'<div class="histogram" role="img" aria-label="Examples by length. {escape(said)}">'
        f"{drawn}</div>"
        f'<div class="axis figures"><span>{low:,}</span><span>{high:,}</span></div>'
    )
