"""The pure parts of the tabs Data, Chat, What changed and Export, and the jobs behind them."""

import asyncio
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.state_holder import SessionState

from app import work
from app.connect import connect
from app.context import Context
from app.exports import Exports
from app.run_picker import step_of
from app.run_watch import RunWatch
from app.sampling import sampling_from
from app.tabs.chat import _Answers
from app.trainings import Trainings
from app.uploads import keep_upload, uploaded_file, uploads
from app.views import changes, chat, data, export
from app.workers import Worker
from dora_mlx import (
    EXPORT_FORMATS,
    DataLook,
    Sampling,
    TrainConfig,
    UserError,
    find_run,
    inspect_run,
)
from dora_mlx.__main__ import main
from dora_mlx.registry import samples_dir

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "runs"
    options = [
        "--steps",
        "4",
        "--steps-per-save",
        "2",
        "--num-layers",
        "1",
        "--steps-per-eval",
        "4",
    ]
    assert main(["train", "--runs-dir", str(folder), "--run", "small", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def run(runs_dir):
    return find_run("small", runs_dir)


def test_closed_worker_lets_go_of_whoever_waits_for_it(tmp_path):
    worker = Worker("data")
    process = worker.call(os.getpid)
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(worker.call, Path.read_text, tmp_path / "pipe")
        # It opens as soon as the worker reads from it, which then waits for what never comes.
        with open(tmp_path / "pipe", "w"):
            worker.close()
        with pytest.raises(UserError):
            waiting.result()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(UserError, match="is ending"):
        worker.call(os.getpid)


def test_choice_that_has_just_gone_from_its_list_gets_a_note(runs_dir):
    with gr.Blocks() as blocks:
        run, at, share = gr.Dropdown(["small"]), gr.State(3), gr.Slider(0, 1)
        shown, note = gr.HTML(), gr.HTML()
        connect(run.change, lambda *given: f"{find_run(given[0], runs_dir).name} {given[1:]}",
                [run, at, share], [shown], notice=note)  # fmt: skip

    def shown_for(name, share):
        sent = [name, None, share]
        return asyncio.run(blocks.process_api(0, sent, SessionState(blocks)))["data"]

    assert shown_for("small", 0.5) == ["small (3, 0.5)", ""]
    for problem, sent in {"There is no run": ("renamed", 0), "greater than": ("small", 2)}.items():
        unchanged, said = shown_for(*sent)
        assert "value" not in unchanged
        assert problem in said


@pytest.mark.parametrize("name", ["../small", "x" * 300, "a\0b", ""])
def test_no_run_has_such_a_name(name, runs_dir):
    with pytest.raises(UserError, match="There is no run"):
        find_run(name, runs_dir)


@pytest.mark.parametrize("state", [None, "", "\u0663", "9" * 5000, "../1"])
def test_no_run_has_such_a_state(state):
    with pytest.raises(UserError, match="no such state"):
        step_of(state)


def test_server_never_loads_mlx(run, tmp_path):
    # Seconds of the start and hundreds of MB: whatever the workers answer has to be read without.
    config = TrainConfig()
    answers = [
        work.plan(config),
        work.look_at_data(config.to_dict()),
        work.example_of_data(config.to_dict(), 0),
        work.talk_about(run),
        [*work.inspect(run, None)],
    ]
    (tmp_path / "answers").write_bytes(pickle.dumps(answers))
    code = (
        "import pickle, sys\nimport app.layout\npickle.load(open(sys.argv[1], 'rb'))\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "answers"], check=True)


def test_uploads_keep_their_name_and_never_replace_another(tmp_path):
    folder, source = tmp_path / "kept", tmp_path / "chat.jsonl"
    source.write_text("one")
    assert keep_upload(source, folder) == "chat.jsonl"
    assert keep_upload(source, folder) == "chat.jsonl"
    source.write_text("two")
    # A run may refer to the first one.
    assert keep_upload(source, folder) == "chat-2.jsonl"
    assert (folder / "chat.jsonl").read_text() == "one"
    os.utime(folder / "chat.jsonl", (1, 1))
    assert uploads(folder) == ["chat-2.jsonl", "chat.jsonl"]


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".hidden", "", "no.jsonl"])
def test_uploads_are_named_by_names_alone(tmp_path, name):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / ".hidden").write_text("x")
    with pytest.raises(UserError):
        uploaded_file(folder, name)


@pytest.mark.parametrize(
    "name", [".jsonl", "…/…", "a" * 300 + ".jsonl", "chat (1).tar.gz", "ünï.csv"]
)
def test_names_of_uploads_are_made_safe(tmp_path, name):
    source = tmp_path / "upload"
    source.write_text("x")
    kept = keep_upload(source.rename(tmp_path / Path(name).name[-200:]), tmp_path / "kept")
    assert uploaded_file(tmp_path / "kept", kept).parent == tmp_path / "kept"
    assert kept[0] != "."
    assert len(kept) <= 120


def test_checks_name_lines_and_say_what_happens_to_them():
    overview = DataLook(TrainConfig(data=str(samples_dir() / "broken.jsonl"))).overview
    strict, lenient = data.checks(overview, False), data.checks(overview, True)
    assert "line 2, column" in strict
    assert "cannot be used" in strict
    assert 'class="bad"' in strict
    assert "are left out" in lenient
    assert 'class="bad"' not in lenient


def test_what_is_wrong_with_every_line_is_said_once(tmp_path):
    file = tmp_path / "odd.csv"
    file.write_text("frage,antwort\nWer?,Ich\nWo?,Hier\nWas?,Das\n")
    shown = data.checks(DataLook(TrainConfig(data=str(file))).overview, False)
    assert "lines 2 to 4: neither" in shown
    assert "“Columns” prompt=frage" in shown


def test_examples_show_all_text_escaped_and_coloured():
    spans = [
        SimpleNamespace(text="<|im_start|>", tokens=1, trained=False, special=True),
        SimpleNamespace(text=EVIL, tokens=3, trained=False, special=False),
        SimpleNamespace(text="Arr\ud800", tokens=1, trained=True, special=False),
    ]
    shown = data.example(spans, 1, 2)
    assert EVIL not in shown
    assert "&lt;script&gt;" in shown
    assert '<span class="trained">Arr?' in shown
    assert '<span class="template special">' in shown
    assert "5 tokens, 1 learned" in shown
    shown.encode()


def test_long_examples_do_not_flood_the_page():
    spans = [SimpleNamespace(text="x ", tokens=1, trained=True, special=False)] * 10_000
    shown = data.example(spans, 1, 1)
    assert len(shown) < 300_000
    assert "6,000 more tokens" in shown


def test_worker_looks_at_changed_files_again(tmp_path):
    path = tmp_path / "chat.jsonl"
    row = '{"prompt": "Question %d?", "completion": "Yes."}\n'
    path.write_text("".join(row % n for n in range(10)))
    first = work.look_at_data({"data": str(path)})
    path.write_text("".join(row % n for n in range(20)))
    second = work.look_at_data({"data": str(path)})
    assert (first.reports[0].rows, second.reports[0].rows) == (10, 20)
    assert "".join(span.text for span in work.example_of_data({"data": str(path)}, 0))


def test_adapted_and_base_answer_from_one_loaded_model(run):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    sampling = Sampling(max_tokens=12)
    both = {"adapted": asked, "base": asked}
    said = {who: text for who, text, _, _ in work.answer(run, None, both, sampling)}
    assert set(said) == {"adapted", "base"}
    assert all(said.values())
    model = work._talking["chat"]
    steps, questions = work.talk_about(run)
    assert steps
    assert questions[0].answer
    again = {who: text for who, text, _, _ in work.answer(run, str(steps[0]), both, sampling)}
    assert work._talking["chat"] is model, "another state needs no other base"
    assert again["base"] == said["base"]


def test_stop_has_nothing_to_stop_once_an_answer_failed(runs_dir, tmp_path):
    trainings = Trainings(runs_dir)
    context = Context(runs_dir, tmp_path, True, trainings, RunWatch(trainings))
    context.chat.close()
    sampling = asdict(Sampling())
    answer = _Answers(context, list(sampling)).to_message(
        "Hi", {"adapted": [], "base": []}, "small", "best", True, "", *sampling.values()
    )
    stop = [next(answer)[-1], next(answer)[-1]]
    assert [update["interactive"] for update in stop] == [True, False]
    with pytest.raises(UserError, match="is ending"):
        next(answer)


def test_history_is_read_in_every_form_that_gradio_sends():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert chat.text_of("Hi") == "Hi"
    assert chat.text_of(parts) == "Hi there"
    assert EVIL not in chat.expected(EVIL)


def test_sampling_comes_from_the_controls():
    defaults = {"max_tokens": 64.0, "temperature": 0.5, "top_p": 0.9, "top_k": 40.0, "min_p": 0.0,
                "repetition_penalty": 1.1}  # fmt: skip
    made = sampling_from({**defaults, "seed": " 7 ", "stop": "END\n\n###"})
    assert (made.seed, made.stop, made.top_k) == (7, ("END", "###"), 40)
    assert sampling_from({**defaults, "seed": "", "stop": None}).seed is None
    with pytest.raises(UserError, match="whole number"):
        sampling_from({**defaults, "seed": "-1", "stop": ""})


def test_maps_show_every_weight(run):
    found = inspect_run(run)
    drawn = changes.summary(found) + changes.heat_maps(found) + changes.largest(found.weights)
    modules = {weight.module for weight in found.weights}
    assert all(drawn.count(f'<th scope="row">{module}</th>') == 2 for module in modules)
    events = list(work.inspect(run, None))
    assert events[-1][0] == "result"
    assert events[0][0] == "progress"
    assert events[-1][1].weights == found.weights


def test_map_has_one_form_of_number():
    weights = [
        SimpleNamespace(module="q", block=block, direction_change=value, magnitude_change=0.0,
                        magnitude=1.0)
        for block, value in enumerate((0.0071, 0.00045))
    ]  # fmt: skip
    drawn = changes.heat_maps(SimpleNamespace(weights=weights))
    assert "mean of 1 - cos over rows, in units of 1e-3" in drawn
    assert ">7.10</td>" in drawn
    assert ">0.45</td>" in drawn
    # A map of zeros has no unit.
    assert drawn.count("in units of") == 1


def test_size_is_known_before_an_export_in_every_format(run, tmp_path):
    for chosen in EXPORT_FORMATS:
        found = work.size_of_export(run, chosen.name, tmp_path / "x", chosen.quants[0].name)
        assert 0 < found.needed < found.free


def test_export_is_one_job_at_a_time_with_a_report(run, tmp_path):
    exports = Exports(tmp_path, Worker("export"))
    exports.start(run, "safetensors", "bf16", overwrite=False)
    with pytest.raises(UserError, match="not finished yet"):
        exports.start(run, "gguf", "f16", overwrite=False)
    exports.wait()
    job = exports.job
    assert not job.running
    assert not job.error
    assert job.report.keeps_training
    assert exports.names() == ["small-safetensors-bf16"]
    shown = export.job(job, job.output.name)
    assert "small-safetensors-bf16 is written" in shown
    assert "Last export: small-safetensors-bf16" in export.job(job, "small-f16.gguf")
    assert "Trained model" in shown
    links = export.downloads(tmp_path, job.output.name)
    assert 'href="/exports/small-safetensors-bf16/model.safetensors"' in links
    with pytest.raises(UserError, match="there already"):
        exports.start(run, "safetensors", "bf16", overwrite=False)


def test_list_of_exports_follows_no_link(tmp_path):
    exports = Exports(tmp_path / "exports", Worker("export"))
    (exports.exports_dir / "model").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("x")
    (exports.exports_dir / "linked").symlink_to(tmp_path)
    (exports.exports_dir / "link.gguf").symlink_to(tmp_path / "secret.txt")
    (exports.exports_dir / "model" / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert exports.names() == ["model"]
    assert "link" not in export.downloads(exports.exports_dir, "model")


def test_stopped_export_leaves_nothing(run, tmp_path):
    exports = Exports(tmp_path, Worker("export"))
    exports.start(run, "safetensors", "bf16", overwrite=False)
    exports.stop()
    exports.wait()
    assert exports.job.error
    assert not list(tmp_path.iterdir())
    assert "Stopped" in export.job(exports.job, "")


def test_size_says_when_there_is_no_room():
    assert 'role="alert"' in export.size(10, 5, Path("x.gguf"))
    assert 'role="alert"' not in export.size(5, 10, Path("x.gguf"))
