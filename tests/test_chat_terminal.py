"""The chat in a real terminal: what Ctrl-C and Ctrl-D do there."""

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_models import write_base

import dora_mlx

PACKAGE = Path(dora_mlx.__file__).parents[1]
CTRL_C, CTRL_D = b"\x03", b"\x04"
# Makes the terminal the one whose keys send signals to the program, and becomes it.
BECOME = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
BECOME += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A program, seen and driven from the other side of its terminal."""

    def __init__(self, *words):
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", BECOME, "-m", *map(str, words)],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(PACKAGE), "TERM": "dumb"},
        )
        os.close(other)

    def type(self, keys):
        os.write(self._end, keys)

    def type_until_answered(self, keys):
        """Type the keys, and again if nothing is shown, as a person would.

        Python's input() overlooks a signal between its prompt and its first wait for a key.
        """
        self.type(keys)
        while not select.select([self._end], [], [], 5)[0]:
            self.type(keys)

    def read_until(self, text):
        """What is shown up to ``text`` and with it."""
        shown = b""
        while text not in shown:
            assert select.select([self._end], [], [], 120)[0], f"nothing after {shown!r}"
            shown += os.read(self._end, 1)
        return shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def chat(tmp_path):
    base = write_base(tmp_path / "base", bits=4)
    terminal = Terminal("dora_mlx.chat", "--model", base, "--max-tokens", "100000")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(chat):
    chat.read_until(b"an empty line ends it.")
    chat.read_until(b"> ")
    for text in (b"Hello!\n", b"And again?\n"):
        chat.type(text)
        chat.read_until(text.strip() + b"\r\n")
        # It answers, and would go on for minutes.
        chat.read_until(b" ")
        chat.type(CTRL_C)
        chat.read_until(b" ...\r\n")
        chat.read_until(b"> ")
    # With no answer to stop, it says how to end.
    chat.type_until_answered(CTRL_C)
    chat.read_until(b"Ctrl-D ends the chat.\r\n")
    chat.read_until(b"> ")
    chat.type(CTRL_D)
    assert chat.process.wait(timeout=60) == 0
