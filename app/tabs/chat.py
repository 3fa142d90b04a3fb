"""The tab Chat: the adapted model and its base side by side, from one set of weights."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from app import work
from app.connect import connect
from app.context import Context, Page
from app.run_picker import keep_runs, no_run, run_dropdown, state_dropdown, states_of, step_of
from app.sampling import sampling_controls, sampling_from
from app.views import chat as view
from app.views import html
from dora_mlx import UserError, find_run

Turn = dict[str, str]
Talk = dict[str, list[Turn]]

_FIRST = "Ask something; both models answer."
_FIRST_BASE = "The base model answers here, without the adapter."


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Chat", "the same question, with and without the adapter"))
        nothing = no_run(
            "chat-empty", "Train a run first, then compare its answers with those of its base."
        )
        with gr.Column(visible=False, elem_classes="bare") as body:
            ui = _body()
    _wire(context, page, ui, nothing, body)


def _body() -> dict[str, Any]:
    with gr.Row(elem_classes="columns", equal_height=False):
        run = run_dropdown("chat-run", scale=3, min_width=220)
        state = state_dropdown("chat-state")
        with_base = gr.Checkbox(
            True, label="Base model beside it", elem_id="chat-base-too", scale=1, min_width=160
        )
    with gr.Row(elem_classes="columns"):
        with gr.Column(min_width=300, elem_classes="bare"):
            adapted_who = gr.HTML(view.who("Adapted", ""))
            adapted = _chatbot("chat-adapted", "Answers of the adapted model", _FIRST)
        with gr.Column(min_width=300, elem_classes="bare") as base_column:
            base_who = gr.HTML(view.who("Base", ""))
            base = _chatbot("chat-base", "Answers of the base model", _FIRST_BASE)
    questions = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[],
        label="Ask what it was not trained on",
        visible=False,
        elem_id="chat-questions",
    )
    expected = gr.HTML(elem_id="chat-expected")
    problem = gr.HTML(elem_id="chat-problem")
    with gr.Row(elem_classes="ask"):
        message = gr.Textbox(
            label="Message",
            show_label=False,
            placeholder="Ask something",
            lines=1,
            max_lines=8,
            scale=6,
            min_width=220,
            elem_id="chat-message",
            max_length=100_000,
        )
        send = gr.Button("Send", variant="primary", min_width=86, scale=0, elem_id="chat-send")
        stop = gr.Button(
            "Stop", variant="stop", interactive=False, min_width=80, scale=0, elem_id="chat-stop"
        )
        again = gr.Button("Regenerate", min_width=110, scale=0, elem_id="chat-again")
        clear = gr.Button("Clear", min_width=80, scale=0, elem_id="chat-clear")
    pace = gr.HTML(elem_id="chat-pace")
    with gr.Accordion("Sampling and system message", open=False, elem_id="chat-sampling"):
        system = gr.Textbox(
            label="System message", lines=2, elem_id="chat-system", max_length=100_000
        )
        sampling = sampling_controls()
    return {
        "run": run, "state": state, "with_base": with_base, "adapted_who": adapted_who,
        "adapted": adapted, "base_column": base_column, "base_who": base_who, "base": base,
        "questions": questions, "expected": expected, "problem": problem, "message": message,
        "send": send, "stop": stop, "again": again, "clear": clear, "pace": pace,
        "system": system, "sampling": sampling,
    }  # fmt: skip


def _chatbot(elem_id: str, label: str, empty: str) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id=elem_id,
        label=label,
        show_label=False,
        height=380,
        editable="user",
        buttons=["copy"],
        latex_delimiters=[],
        feedback_options=None,
        placeholder=empty,
        group_consecutive_messages=False,
    )


def _wire(context: Context, page: Page, ui: dict[str, Any], nothing: Any, body: Any) -> None:
    held_out = gr.State([])
    # Kept here: what a browser sends as a conversation could name files of this machine.
    talk = gr.State({"adapted": [], "base": []})

    def choose(name: str | None) -> Any:
        """What there is of a run: its kept states, its base, and questions it did not learn."""
        if not name:
            return [gr.skip()] * 6
        folder = find_run(name, context.runs_dir)
        steps, questions = context.data.call(work.talk_about, folder)
        samples = [[view.question_label(q.messages[-1]["content"])] for q in questions]
        model = folder.read_config()["options"]["model"].rsplit("/", 1)[-1]
        return [
            states_of(steps), questions,
            gr.Dataset(samples=samples, visible=bool(samples)), "",
            view.who("Adapted", name), view.who("Base", model),
        ]  # fmt: skip

    def pick(questions: list[Any], picked: gr.SelectData) -> Any:
        question = questions[picked.index if isinstance(picked.index, int) else picked.index[0]]
        return question.messages[-1]["content"], view.expected(question.answer)

    def keep_expected(text: str, questions: list[Any]) -> Any:
        asked = text in (question.messages[-1]["content"] for question in questions)
        return gr.skip() if asked else ""

    conversation = [ui["adapted"], ui["base"]]
    asking = [ui["run"], ui["state"], ui["with_base"], ui["system"], *ui["sampling"].values()]
    outputs = [talk, *conversation, ui["message"], ui["pace"], ui["stop"]]
    answers = _Answers(context, list(ui["sampling"]))
    events = [
        connect(
            triggers,
            handler,
            [*first, talk, *asking],
            outputs,
            notice=ui["problem"],
            concurrency_limit=1,
            concurrency_id="chat",
        )
        for triggers, handler, first in (
            ([ui["send"].click, ui["message"].submit], answers.to_message, [ui["message"]]),
            ([ui["again"].click], answers.again, []),
            ([ui["adapted"].edit, ui["base"].edit], answers.to_edited, []),
        )
    ]
    connect(ui["stop"].click, lambda: gr.update(interactive=False), [], [ui["stop"]],
            queue=False, cancels=events)  # fmt: skip
    connect(
        ui["clear"].click,
        lambda: ({"adapted": [], "base": []}, [], [], "", "", ""),
        [],
        [talk, *conversation, ui["message"], ui["expected"], ui["pace"]],
    )  # fmt: skip
    connect(ui["with_base"].change, lambda on: gr.update(visible=on), [ui["with_base"]],
            [ui["base_column"]])  # fmt: skip
    connect([ui["send"].click, ui["message"].submit], keep_expected, [ui["message"], held_out],
            [ui["expected"]])  # fmt: skip
    connect([ui["adapted"].edit, ui["base"].edit], lambda: "", [], [ui["expected"]])
    connect(ui["questions"].select, pick, [held_out], [ui["message"], ui["expected"]])
    connect(ui["run"].change, choose, [ui["run"]],
            [ui["state"], held_out, ui["questions"], ui["expected"], ui["adapted_who"],
             ui["base_who"]], notice=ui["problem"])  # fmt: skip
    keep_runs(context, page, ui["run"], nothing, body)


class _Answers:
    """Handlers that answer: generators of both columns, the message box, the pace and Stop."""

    def __init__(self, context: Context, sampling_names: list[str]):
        self._context = context
        self._names = sampling_names

    def to_message(self, text: str, talk: Talk, *asking: Any) -> Iterator[Any]:
        """Answer a new message."""
        if not (text or "").strip():
            raise UserError("Write a message first.")
        new = {"role": "user", "content": text}
        yield from self._answer([*talk["adapted"], new], [*talk["base"], new], *asking)

    def again(self, talk: Talk, *asking: Any) -> Iterator[Any]:
        """Answer the last message again."""
        question = _up_to_question(talk["adapted"])
        if not question:
            raise UserError("There is no message to answer again yet.")
        yield from self._answer(question, _up_to_question(talk["base"]), *asking)

    def to_edited(self, edited: gr.EditData, talk: Talk, *asking: Any) -> Iterator[Any]:
        """Answer an earlier message in its new wording; what came after it goes."""
        place = edited.index if isinstance(edited.index, int) else edited.index[0]
        new = {"role": "user", "content": view.text_of(edited.value)}
        before, before_base = talk["adapted"][:place], talk["base"][:place]
        yield from self._answer([*before, new], [*before_base, new], *asking)

    def _answer(
        self,
        adapted: list[Turn],
        base: list[Turn],
        run: str | None,
        state: str,
        with_base: bool,
        system: str | None,
        *sampling: Any,
    ) -> Iterator[Any]:
        """Stream the answers of the adapted model and, if it is shown, of the base model."""
        settings = sampling_from(dict(zip(self._names, sampling, strict=True)))
        if not run:
            raise UserError("Choose a run to talk to first.")
        folder = find_run(run, self._context.runs_dir)
        step = step_of(state)
        checkpoint = None if step is None else str(step)
        questions = {"adapted": adapted, "base": base if with_base else []}
        opening = [{"role": "system", "content": system}] if (system or "").strip() else []
        asked = {who: [*opening, *turns] for who, turns in questions.items() if turns}
        yield (
            questions,
            questions["adapted"],
            questions["base"],
            "",
            view.pace(0, 0, self._is_training),
            gr.update(interactive=True),
        )
        answers: dict[str, list[Turn]] = {who: [] for who in questions}
        stream = self._context.chat.stream(work.answer, folder, checkpoint, asked, settings)
        ended = *[gr.skip()] * 5, gr.update(interactive=False)
        try:
            for who, text, tokens, seconds in stream:
                answers[who] = [{"role": "assistant", "content": text}]
                columns = [[*turns, *answers[name]] for name, turns in questions.items()]
                yield (
                    dict(zip(questions, columns, strict=True)),
                    *columns,
                    gr.skip(),
                    view.pace(tokens, seconds, self._is_training),
                    gr.skip(),
                )
        except UserError:
            yield ended
            raise
        yield ended

    @property
    def _is_training(self) -> bool:
        activity = self._context.trainings.status()
        return activity is not None and activity.alive


def _up_to_question(turns: list[Turn]) -> list[Turn]:
    """A conversation without what follows its last message from the user."""
    while turns and turns[-1]["role"] != "user":
        turns = turns[:-1]
    return turns
