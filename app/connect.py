"""How a handler is tied to its event: the one way, for every tab.

``connect`` gives every event the same manners. A ``UserError`` becomes a note where it belongs
and leaves everything else on the page as it was, and no text with half a surrogate pair leaves
the server. Any other exception is a bug: Gradio prints it in the terminal and says on the page
only that there was an error.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from app.views import html
from dora_mlx import UserError


def connect(
    triggers: Any,
    handler: Callable[..., Any],
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (),
    *,
    notice: gr.HTML | None = None,
    **options: Any,
) -> Any:
    """Call ``handler`` on events of Gradio components.

    Args:
        triggers: An event such as ``button.click``, or a list of them.
        handler: A function or generator; gives one value for each of ``outputs`` (a bare value
            for one, a tuple for several, nothing for none).
        inputs: Components whose values it takes.
        outputs: Components that it sets.
        notice: Where a ``UserError`` of it is shown; emptied when it succeeds. Without one the
            error pops up.
        options: Passed on to ``gr.on``.

    Returns:
        The event as Gradio knows it, for the ``cancels`` of another.
    """
    inputs, outputs = list(inputs), list(outputs)
    count = len(outputs)

    def settle(produced: Any) -> Any:
        values = () if count == 0 else (produced,) if count == 1 else tuple(produced)
        values = tuple(_cleaned(value) for value in values)
        values = (*values, "") if notice is not None else values
        return values[0] if len(values) == 1 else values or None

    def fail(error: UserError) -> Any:
        if notice is None:
            raise gr.Error(html.escape(error), duration=8, print_exception=False) from None
        values = (*([gr.skip()] * count), html.problem(str(error)))
        return values[0] if len(values) == 1 else values

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*arguments: Any) -> Iterator[Any]:
            try:
                for produced in handler(*_read(inputs, arguments)):
                    yield settle(produced)
            except UserError as error:
                yield fail(error)
    else:

        @functools.wraps(handler)
        def wrapped(*arguments: Any) -> Any:
            try:
                return settle(handler(*_read(inputs, arguments)))
            except UserError as error:
                return fail(error)

    return gr.on(
        triggers if isinstance(triggers, list) else [triggers],
        wrapped,
        inputs,
        outputs if notice is None else [*outputs, notice],
        api_visibility="private",
        # What Gradio itself cannot read it answers with an error of the server. Files are its
        # own, because it knows which ones were uploaded.
        preprocess=any(isinstance(item, gr.File) for item in inputs),
        **{"show_progress": "hidden", **options},
    )


def follow(
    triggers: Any,
    handler: Callable[..., Any],
    inputs: Any,
    outputs: Any,
    *,
    queue: bool = False,
) -> Any:
    """Keep ``outputs`` up to date: ``connect`` for short handlers, of which the last call counts.

    What triggers one while it runs makes it run once more.
    """
    return connect(triggers, handler, inputs, outputs, queue=queue, trigger_mode="always_last")


def _read(inputs: Sequence[Any], sent: Sequence[Any]) -> Iterator[Any]:
    """What a browser sent for each of ``inputs``, in the types that their components have.

    What Gradio adds to it, such as the place of a click, stays as it is.

    Raises:
        UserError: If a component cannot have a value.
    """
    components = iter(inputs)
    for value in sent:
        component = None if isinstance(value, gr.EventData) else next(components)
        if component is None or value is None or isinstance(component, gr.File):
            yield value
        elif isinstance(component, gr.Dropdown):
            # Its list may have changed since the page got it: handlers look the choice up.
            yield str(value)
        else:
            try:
                yield component.preprocess(value)
            except gr.Error as error:
                raise UserError(str(error.message)) from error


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return html.clean(value)
    if isinstance(value, list | tuple):
        return type(value)(_cleaned(item) for item in value)
    if type(value) is dict:
        return {key: _cleaned(item) for key, item in value.items()}
    return value
