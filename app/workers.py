"""Heavy work outside the server's process, so that the page never waits for it.

A ``Worker`` is one child process that keeps what it has loaded (a tokenizer, a model) between
calls. It imports MLX; the server never does. It ends with the server, however that ends.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any

from dora_mlx import UserError

# A child made by fork would share MLX's threads and locks with the server.
_PROCESSES = multiprocessing.get_context("spawn")
_SECONDS_TO_TIDY_UP = 2


class Worker:
    """One process that runs functions, one after the other.

    The functions have to be importable by name, and so have their arguments and results to be
    picklable. A second caller waits for the first.
    """

    def __init__(self, name: str):
        self._name = name
        self._turn = threading.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._closed = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(*arguments)`` returns in the worker.

        Raises:
            UserError: As the function raised it, or because the process died.
        """
        with self._turn:
            self._send("call", function, arguments)
            return self._answer()[1]

    def stream(self, function: Callable[..., Any], *arguments: Any) -> Generator[Any, None, None]:
        """What the generator ``function(*arguments)`` yields in the worker, as it comes.

        Closing this iterator ends the generator at its next yield.

        Raises:
            UserError: As the function raised it, or because the process died.
        """
        with self._turn:
            self._send("stream", function, arguments)
            finished = False
            try:
                while True:
                    kind, value = self._answer()
                    if kind == "end":
                        finished = True
                        return
                    yield value
                    self._pipe_or_fail().send("go on")
            except UserError:
                finished = True
                raise
            finally:
                if not finished:
                    self._abandon()

    def stop(self) -> None:
        """End the process and what it holds in memory; the next call starts another."""
        process, self._process, self._pipe = self._process, None, None
        if process is not None:
            process.terminate()
            process.join(_SECONDS_TO_TIDY_UP)
            process.kill()
            process.join()

    def close(self) -> None:
        """End the process; whoever calls again is told so."""
        self._closed = True
        self.stop()

    def _send(self, kind: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._closed:
            raise UserError("The app is ending.")
        if self._process is None or not self._process.is_alive():
            pipe, inner = _PROCESSES.Pipe()
            process = _PROCESSES.Process(
                target=_serve, args=(inner,), name=f"dora-{self._name}", daemon=True
            )
            process.start()
            inner.close()
            # Not before: a process that has not begun cannot be ended by another thread.
            self._process, self._pipe = process, pipe
        self._pipe_or_fail().send((kind, function, arguments))

    def _answer(self) -> tuple[str, Any]:
        try:
            kind, value = self._pipe_or_fail().recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if kind == "error":
            raise value
        return kind, value

    def _death(self) -> UserError:
        """Why the process is gone; a bug has printed itself in the terminal."""
        process = self._process
        if process is not None:
            process.join()
        killed = process is None or process.exitcode is None or process.exitcode < 0
        self.stop()
        if killed:
            return UserError(
                f"The {self._name} process was ended from outside, most likely because the memory "
                "ran out. Close other programs or choose a smaller model, and try again."
            )
        return UserError(f"The {self._name} process failed; the app's terminal says at what.")

    def _abandon(self) -> None:
        """Tell the generator to end, and wait until it has."""
        pipe = self._pipe
        if pipe is None:
            return
        try:
            pipe.send("stop")
            while pipe.recv()[0] == "item":
                pass
        except (EOFError, OSError):
            self.stop()

    def _pipe_or_fail(self) -> Connection:
        if self._pipe is None:
            raise UserError(f"The {self._name} process was stopped.")
        return self._pipe


def _serve(pipe: Connection) -> None:
    """The worker's own loop: a request, its answers, the next request, until the server is gone."""
    import signal

    # Ctrl-C in the terminal ends the server, which then ends the worker in the other way: as an
    # exception, so that an export takes away what it has not finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with suppress(EOFError, OSError, SystemExit):
        while True:
            kind, function, arguments = pipe.recv()
            pipe.send(_run(pipe, kind, function, arguments))
    # The interpreter's own end takes seconds with all that was imported.
    os._exit(0)


def _run(
    pipe: Connection, kind: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[str, Any]:
    try:
        if kind == "call":
            return "result", function(*arguments)
        with closing(function(*arguments)) as items:
            for item in items:
                pipe.send(("item", item))
                if pipe.recv() == "stop":
                    break
        return "end", None
    except UserError as error:
        return "error", error
