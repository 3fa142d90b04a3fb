"""What a page asks every second, and whom it tells when the answer is a new one.

An answer costs a browser some 30 ms, whatever is in it, so a page asks one question. Its answer is
two fingerprints of what lies on the disk, and what shows something of it follows them.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr

from app.connect import connect

_SECONDS = 1.0


class Clock:
    """The clock of a page.

    Each of those who follow has a component of its own to listen to. Of two that follow one event,
    both with a call waiting, each would call both again when it is done, and never be done.
    """

    def __init__(self) -> None:
        self._news: list[gr.Textbox] = []
        self._progress: list[gr.Textbox] = []

    def news(self) -> Any:
        """An event: the page was opened, or a run has come, ended or gone."""
        return _listener(self._news)

    def progress(self) -> Any:
        """An event: there is news, or else anything new to see of a run or an export."""
        return _listener(self._progress)

    def start(self, blocks: gr.Blocks, now: Callable[[], tuple[str, str]]) -> None:
        """Tick, for all those who follow by now; ``now`` gives the two fingerprints."""
        boxes = [*self._news, *self._progress]
        for box in boxes:
            box.render()

        def look(news: str, progress: str) -> list[Any]:
            found = now()
            if found == (news, progress):
                return [gr.skip()] * len(boxes)
            return [found[0]] * len(self._news) + [found[1]] * len(self._progress)

        timer = gr.Timer(_SECONDS)
        first = [self._news[0], self._progress[0]]
        connect([timer.tick, blocks.load], look, first, boxes, queue=False)


def _listener(boxes: list[gr.Textbox]) -> Any:
    # A component, because Gradio tells nobody of a state that has changed outside of its queue.
    boxes.append(gr.Textbox(visible="hidden", render=False))
    return boxes[-1].change
