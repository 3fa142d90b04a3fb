"""The tab Train: start, watch, reload, stop, resume, and losing every process on the way."""

import contextlib
import json
import os
import re
import shutil
import signal

import pytest
from playwright.sync_api import Error, expect

from dora_mlx import RunFolder, TrainConfig
from tests.browser.conftest import CHROMIUM


def start(page, name, steps=400, **fields):
    """Start a run on the sample from the form."""
    page.get_by_role("tab", name="Data").click()
    page.locator("#data-sample").click()
    expect(page.locator("#data-checks")).to_contain_text("usable examples")
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-start")).to_have_text("Start training")
    for field, value in {"name": name, "steps": str(steps), **fields}.items():
        place = f"#train-{field.replace('_', '-')}"
        page.locator(f"{place} :is(input, textarea)").fill(value)
    page.locator("#train-start").click()


def stop(page):
    page.locator("#run-stop").click()
    expect(page.locator("#run-status")).to_contain_text("Stopped")


def events(server, name):
    lines = (server.runs_dir / name / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_run_is_seen_from_everywhere_and_stopped_and_resumed(server, open_page):
    page = open_page("train")
    expect(page.locator("#train-start")).to_be_disabled()
    start(page, "first")
    expect(page.locator("#run-status")).to_contain_text(re.compile(r"step [1-9]\d* of 400"))
    expect(page.locator("#train-start")).to_have_text("A training is running")
    expect(page.locator("#train-start")).to_be_disabled()
    # The chart draws what it is sent.
    expect(page.locator("#loss-chart path.line")).to_have_attribute("d", re.compile("M.*L"))

    page.reload()
    expect(page.locator("#run-status")).to_contain_text("of 400")
    other = open_page("train")
    expect(other.locator("#run-status")).to_contain_text("first")
    other.locator("#run-pause").click()
    expect(page.locator("#run-status")).to_contain_text("Paused")
    expect(page.locator("#run-pause")).to_have_text("Continue")
    page.locator("#run-pause").click()
    expect(page.locator("#run-status .pill")).to_have_text("Training")
    stop(other)
    steps = events(server, "first")[-1]["step"]
    assert 0 < steps < 400

    page.locator("#run-resume").click()
    expect(page.locator("#run-status .pill")).to_have_text("Training")
    expect(page.locator("#run-status")).to_contain_text(re.compile(rf"step (?!{steps} )\d+ of 400"))
    # The trainer dies: nothing is lost, and the page says so.
    os.kill(int((server.runs_dir / "first" / "lock").read_text()), signal.SIGKILL)
    expect(page.locator("#run-status .pill")).to_have_text("Interrupted")
    expect(page.locator("#run-resume")).to_be_visible()


def test_bad_values_are_named_where_they_belong(server, open_page):
    page = open_page("train")
    start(page, "no good/name", rank="0", learning_rate="fast")
    problem = page.locator("#train-problem")
    expect(problem).to_contain_text("Learning rate has to be a number but is 'fast'")
    expect(problem).to_contain_text("“Rank” must be at least 1 but is 0")
    page.locator("#train-rank input").fill("4")
    page.locator("#train-learning-rate :is(input, textarea)").fill("")
    page.locator("#train-start").click()
    expect(problem).to_contain_text("cannot be a run's name: that has up to 100 letters")
    # Half a surrogate pair in an answer would end the connection of the page for good.
    page.locator("#train-name :is(input, textarea)").evaluate(
        "e => { e.value = '\\ud800'; e.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    page.locator("#train-start").click()
    expect(problem).to_contain_text(r"'\ud800' cannot be a run's name")
    assert not [path for path in server.runs_dir.iterdir() if "no good" in path.name]


def test_browser_and_server_die_and_the_training_is_found_again(browser, server, open_page):
    doomed = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = doomed.new_page()
    page.goto(server.url)
    start(page, "second", 300)
    expect(page.locator("#run-status")).to_contain_text(re.compile(r"step [1-9]\d* of 300"))
    with contextlib.suppress(Error):
        doomed.new_browser_cdp_session().send("Browser.crash")
    page = open_page("train")
    seen = events(server, "second")[-1]["step"]
    expect(page.locator("#run-status")).to_contain_text(re.compile(rf"step (?!{seen} )\d+ of 300"))
    server.kill()
    before = len(events(server, "second"))
    server.restart()
    # The page reloads by itself once the server answers again; a new window need not wait for it.
    page.close()
    open_page.faults.clear()
    page = open_page("train")
    expect(page.locator("#run-status")).to_contain_text("second")
    expect(page.locator("#run-status .pill")).to_have_text("Training")
    stop(page)
    assert len(events(server, "second")) > before
    steps = [event["step"] for event in events(server, "second") if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def two_runs(server):
    """Runs named ``compared`` and ``copy``, which have ended."""
    names = ("compared", "copy")
    for name in names:
        folder = RunFolder(server.runs_dir / name)
        folder.path.mkdir(parents=True)
        folder.write_config({"options": TrainConfig(steps=9).to_dict()})
        told = [{"event": "start", "resumed_from": None, "time": 0}]
        told += [
            {
                "event": "step", "step": n, "loss": 9.0 / n, "time": n, "learning_rate": 1e-4,
                "tokens": 9 * n, "tokens_per_second": 9, "peak_memory_bytes": 10**9,
                "grad_norm": 1,
            }
            for n in range(1, 10)
        ]  # fmt: skip
        told += [{"event": "validation", "step": n, "loss": 8.0 / n, "time": n} for n in (3, 9)]
        told += [{"event": "end", "reason": "completed", "step": 9, "time": 9}]
        (folder.path / "events.jsonl").write_text("\n".join(map(json.dumps, told)) + "\n")
    yield names
    for name in names:
        shutil.rmtree(server.runs_dir / name, ignore_errors=True)


def test_runs_are_compared_renamed_and_deleted_when_asked_twice(server, two_runs, open_page):
    page = open_page("train")
    lines = page.locator("#runs-comparison #compared-loss path.line")
    expect(page.locator("[data-compare=copy]")).to_be_visible()
    # As fast as no person clicks: none is lost, and the list shows what is compared.
    for name in two_runs:
        page.locator(f"[data-compare={name}]").evaluate("box => box.click()")
    expect(lines).to_have_count(2)
    page.locator("[data-compare=compared]").click()
    expect(lines).to_have_count(1)
    expect(page.locator("[data-compare=copy]")).to_be_checked()
    expect(page.locator("[data-compare=compared]")).not_to_be_checked()

    page.locator("[data-open=copy]").click()
    expect(page.locator("#run-status .run-name")).to_have_text("copy")
    page.get_by_role("button", name="Command and configuration").click()
    expect(page.locator("#run-command")).to_contain_text("--run copy")

    page.get_by_role("button", name="Rename, delete").click()
    page.locator("#run-new-name :is(input, textarea)").fill("../evil")
    page.locator("#run-rename").click()
    expect(page.locator("#run-manage-problem")).to_contain_text("cannot be a run's name")
    page.locator("#run-new-name :is(input, textarea)").fill("old")
    page.locator("#run-rename").click()
    expect(page.locator("#run-status .run-name")).to_have_text("old")
    # Its box is a new one, in the place of one that was ticked.
    expect(page.locator("[data-compare=old]")).not_to_be_checked()
    page.locator("#run-delete").click()
    page.locator("#run-keep").click()
    expect(page.locator("#run-delete-really")).to_be_hidden()
    assert (server.runs_dir / "old").is_dir()
    page.locator("#run-delete").click()
    page.locator("#run-delete-really").click()
    expect(page.locator("[data-open=old]")).to_have_count(0)
    assert not (server.runs_dir / "old").exists()
