"""What the app shows, without a browser: HTML from state, and options from the form."""

import dataclasses
import html as plain_html
import json
import re
from pathlib import Path

import pytest

from app.controls import ADVANCED, DATA_OPTIONS, SHORT_FORM, config_from, help_of, shown
from app.presets import PRESETS
from app.run_watch import RunLook
from app.views import chart, html, plan, run, runs
from app.views.numbers import count, duration, gigabytes
from app.wording import OPTIONS, in_words_of_the_form
from dora_mlx import MemoryPlan, RunFolder, RunSummary, TrainConfig, UserError

EVIL = "<img src=x onerror=alert(1)>\"'&\ud800"
DRAWN = re.compile(r'data="([^"]*)"')


def summary(name="one", **changes):
    run = RunSummary(
        folder=RunFolder(Path("/runs") / name),
        status="training",
        model="starter",
        method="dora",
        created=0.0,
        step=10,
        steps=100,
        loss=1.0,
        best_validation=2.0,
        has_adapter=True,
    )
    return dataclasses.replace(run, **changes)


def step(number, **values):
    return {
        "event": "step",
        "time": float(number),
        "step": number,
        "loss": 3.0,
        "learning_rate": 1e-4,
        "tokens": 10 * number,
        "tokens_per_second": 50.0,
        "peak_memory_bytes": 2_000_000_000,
        "grad_norm": 1.0,
        **values,
    }


def look(count=10, extra=(), **changes):
    events = [{"event": "start", "time": 0.0, "resumed_from": None}]
    events += [step(number) for number in range(1, count + 1)]
    return RunLook("one", summary(**changes), [*events, *extra], None)


def drawn(page):
    return [json.loads(plain_html.unescape(found)) for found in DRAWN.findall(page)]


def test_every_text_is_escaped_and_clean():
    warning = {"event": "warning", "time": 1.0, "step": 1, "message": EVIL}
    end = {"event": "end", "time": 2.0, "step": 1, "reason": "failed", "message": EVIL}
    evil = look(extra=[warning, end], model=EVIL, method=EVIL, status="failed")
    evil = dataclasses.replace(evil, name=EVIL)
    pages = [
        html.heading(EVIL, EVIL),
        html.pill(EVIL),
        html.note(EVIL, title=EVIL),
        html.empty(EVIL, EVIL),
        html.tiles([(EVIL, EVIL, EVIL)]),
        html.progress(0.5, EVIL),
        html.code(EVIL, EVIL),
        run.status_card(evil),
        run.status_card(RunLook(EVIL, None, [], None), EVIL),
        run.loss_chart(evil),
        runs.table([summary(EVIL)], EVIL, [EVIL]),
        runs.comparison([evil]),
        plan.bar(MemoryPlan({EVIL: 1}, 1, 1, "fits", (EVIL,), 1, 1, False)),
    ]
    for page in pages:
        assert "<img" not in page
        assert "'&" not in page.replace("&#x27;&amp;", "")
        page.encode()


def test_chart_of_a_long_run_is_as_small_as_that_of_a_short_one():
    page = run.loss_chart(look(5000, steps=5000))
    (data,) = drawn(page)
    assert sum(len(series["points"]) for series in data["series"]) < 1000
    assert len(page) < 60_000
    for series in data["series"]:
        assert series["points"][-1][0] == 5000


def test_thinning_keeps_the_peaks():
    points = [(x, float(x % 7)) for x in range(10_000)]
    points[4321] = (4321, 99.0)
    points[8765] = (8765, -99.0)
    thin = chart.thinned(points)
    assert len(thin) <= 360
    assert {points[4321], points[8765]} <= set(thin)
    assert thin == sorted(thin)


def test_smoothing_starts_at_the_first_value_and_follows_the_mean():
    smooth = chart.smoothed([(x, 5.0) for x in range(300)])
    assert smooth[0][1] == pytest.approx(5.0)
    assert smooth[-1][1] == pytest.approx(5.0)
    assert chart.smoothed([]) == []


def test_odd_peaks_do_not_flatten_the_curve():
    raw = [(x, 1.0 + x / 1000) for x in range(1000)]
    raw[500] = (500, 1e6)
    low, high = chart.value_range(raw, [(0, 1.5)])
    assert high < 3
    assert low < 1.1


def test_status_tells_steps_time_and_best():
    page = run.status_card(look(10))
    assert "step 10 of 100" in page
    assert "1 min 30 s" in page
    assert "best 2.000" in page
    assert 'aria-valuenow="10"' in page
    assert "1.000<small>recent mean" in page
    # A training that is over has no time left, and a loss that was not finite is no figure.
    over = run.status_card(look(3, [step(4, loss=None)], status="stopped", step=4, loss=None))
    assert "1 min 30 s" not in over
    assert f"{html.NOTHING}<small>recent mean" in over


def test_time_between_an_end_and_a_resume_does_not_count():
    again = {"event": "start", "time": 1000.0, "resumed_from": 10}
    page = run.status_card(look(10, [again, step(11) | {"time": 1005.0}]))
    assert "15 s so far" in page


def test_plan_over_the_limit_is_marked_in_the_bar():
    parts = {"weights": 30, "activations": 10}
    page = plan.bar(MemoryPlan(parts, 40, 20, "does not fit", ("Less.",), 4, 512, True))
    assert "left:50.00%" in page
    assert "with gradient checkpointing" in page
    assert "width:75.00%" in page
    assert "does not fit" in page


def test_numbers():
    sizes = [gigabytes(size) for size in (6.59e9, 12.3e9, 8.4e8, 1200)]
    assert sizes == ["6.59 GB", "12 GB", "840 MB", "1 kB"]
    assert [duration(s) for s in (8, 185, 8050)] == ["8 s", "3 min 05 s", "2 h 14 min"]
    assert [count(n) for n in (205_000, 4_060_000, 14.8e9)] == ["205,000", "4.1 M", "14.8 B"]


def test_every_option_is_in_the_form_or_decided_by_the_data():
    assert {*ADVANCED, *SHORT_FORM, *DATA_OPTIONS, "model"} == set(OPTIONS)


def test_untouched_form_means_the_defaults():
    values = {name: shown(name, OPTIONS[name].default) for name in (*SHORT_FORM, *ADVANCED)}
    assert config_from(values, {}) == TrainConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_through_the_form_unchanged(preset):
    options = PRESETS[preset]
    values = {
        name: shown(name, options.get(name, OPTIONS[name].default))
        for name in (*SHORT_FORM, *ADVANCED)
    }
    assert config_from(values, {"data": "x.jsonl"}) == TrainConfig(data="x.jsonl", **options)


def test_form_names_all_that_is_wrong_by_its_labels():
    with pytest.raises(UserError) as caught:
        config_from({"rank": 0, "learning_rate": "fast", "batch_size": None, "epochs": -1.0}, {})
    text = str(caught.value)
    for part in ("“Rank” must be at least 1", "“Epochs” must", "'fast'", "Batch size needs"):
        assert part in text
    assert "--" not in text


def test_advice_speaks_of_the_form():
    said = in_words_of_the_form("This keeps it: --format gguf --quant bf16.")
    assert said == "This keeps it: format gguf, precision bf16."
    assert "“Skip bad rows”" in html.problem("Leave them out with --skip-bad-rows.")
    warning = {"event": "warning", "time": 4.0, "message": "2 are left out (--skip-bad-rows)"}
    assert "(“Skip bad rows”)" in run.status_card(look(3, [warning]))


def test_help_texts_speak_of_the_form():
    for name in OPTIONS:
        assert "--" not in help_of(name), name
