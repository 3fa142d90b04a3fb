"""From a data file to a downloaded model, as a person does it who never opens a terminal."""

import json
import re

from playwright.sync_api import expect

QUESTION = "What is the capital of France?"


def chat_file(path, rows):
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def good_rows(count):
    for number in range(count):
        turns = [("user", f"What is {number} plus 1?"), ("assistant", f"Arr! It be {number + 1}.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        yield json.dumps({"messages": messages})


def test_whole_job(server, open_page, tmp_path):
    page = open_page()
    upload_bad_and_good_data(page, tmp_path)
    train_reload_stop_and_resume(page)
    chat_with_both(page)
    see_what_changed(page)
    export_and_download(page, server, tmp_path)


def upload_bad_and_good_data(page, tmp_path):
    bad = [*good_rows(3), '{"messages": []}', "{not json", '{"messages": "<img src=x>"}']
    page.locator("#data-upload input[type=file]").set_input_files(
        chat_file(tmp_path / "bad.jsonl", bad)
    )
    checks = page.locator("#data-checks")
    expect(checks).to_contain_text("line 4")
    expect(checks).to_contain_text("line 5")
    expect(checks).to_contain_text("line 6")
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-start")).to_be_disabled()
    page.get_by_role("tab", name="Data").click()
    good = chat_file(tmp_path / "good.jsonl", good_rows(60))
    page.locator("#data-upload input[type=file]").set_input_files(good)
    expect(checks).to_contain_text("60")
    expect(checks).not_to_contain_text("line 4")
    example = page.locator("#data-example")
    expect(example).to_contain_text("Arr! It be")
    first = example.inner_text()
    page.locator("#data-next").click()
    expect(example).not_to_have_text(first)


def train_reload_stop_and_resume(page):
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-name :is(input, textarea)").fill("pirate")
    page.locator("#train-steps :is(input, textarea)").fill("24")
    expect(page.locator("#train-start")).to_have_text("Start training")
    page.locator("#train-start").click()
    status = page.locator("#run-status")
    expect(status).to_contain_text(re.compile(r"step [1-9]\d* of 24"))
    page.reload()
    expect(page.locator("#run-stop")).to_be_visible()
    page.locator("#run-stop").click()
    expect(status).to_contain_text("Stopped")
    page.locator("#run-resume").click()
    expect(status).to_contain_text("Completed")
    expect(status).to_contain_text("step 24 of 24")
    # The data is remembered after the reload, so that the next run needs no other click.
    expect(page.locator("#train-start")).to_have_text("Start training")


def chat_with_both(page):
    page.get_by_role("tab", name="Chat").click()
    # The run that was just trained, whatever others there are.
    expect(page.locator("#chat-run input")).to_have_value(re.compile("pirate"))
    page.locator("#chat-message textarea").fill(QUESTION)
    page.locator("#chat-send").click()
    for column in ("#chat-adapted", "#chat-base"):
        expect(page.locator(f"{column} .bot").last).to_contain_text(re.compile(r"\w{3}"))
    expect(page.locator("#chat-pace")).to_contain_text("tokens/s")


def see_what_changed(page):
    page.get_by_role("tab", name="What changed").click()
    page.locator("#changes-measure").click()
    expect(page.locator("#changes-result")).to_contain_text("down_proj")


def export_and_download(page, server, tmp_path):
    page.get_by_role("tab", name="Export").click()
    page.locator("#export-format").get_by_text("gguf", exact=True).click()
    page.locator("#export-start").click()
    # By its name: other tests leave exports too.
    link = page.locator("#export-files").get_by_role("link", name=re.compile(r"^pirate.*\.gguf$"))
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    saved = tmp_path / "model.gguf"
    download.value.save_as(saved)
    exported = server.exports_dir / download.value.suggested_filename
    assert saved.read_bytes() == exported.read_bytes()
    assert saved.read_bytes()[:4] == b"GGUF"


def test_by_keyboard_alone(page):
    press = page.keyboard.press
    focused = page.locator(":focus")
    step_to(page, '[role="tab"]')
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    for key, tab in (("End", "export"), ("ArrowRight", "data"), ("ArrowLeft", "export")):
        press(key)
        expect(focused).to_have_attribute("data-tab-id", tab)
        expect(focused).to_have_attribute("aria-selected", "true")
    press("Home")
    step_to(page, "#data-sample")
    press("Enter")
    expect(page.locator("#data-checks")).to_contain_text("usable examples")
    # A list that the Tab key leaves does not stay open over what comes next.
    step_to(page, "#data-chosen input")
    expect(page.get_by_role("listbox")).to_be_visible()
    press("Tab")
    expect(page.get_by_role("listbox")).to_have_count(0)
    expect(focused).to_have_text(re.compile("Other sources"))


def step_to(page, place):
    """Press Tab until something has the focus, which it shows."""
    wanted = page.locator(f"{place}:focus")
    for _ in range(30):
        page.keyboard.press("Tab")
        if wanted.count():
            return
    raise AssertionError(f"{place} cannot be reached")
