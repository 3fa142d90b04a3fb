"""Functions that stand in for others are put back, whichever thread comes between."""

import threading
from types import SimpleNamespace

from dora_mlx.training import substitutes
from dora_mlx.training.substitutes import standing_in


def original():
    return "original"


class LockSeen:
    """The lock, which says when somebody asks for it."""

    def __init__(self, lock, asked):
        self._lock, self._asked = lock, asked

    def __enter__(self):
        self._asked.set()
        return self._lock.__enter__()

    def __exit__(self, *error):
        return self._lock.__exit__(*error)


# The second thread took the first one's substitute for the original and left it behind for good.
def test_a_thread_that_waited_puts_the_original_back(monkeypatch):
    owner, found = SimpleNamespace(function=original), []

    def second():
        with standing_in(owner, {"function": lambda: "second"}):
            found.append(owner.function())

    thread = threading.Thread(target=second)
    with standing_in(owner, {"function": lambda: "first"}):
        assert owner.function() == "first"
        asked = threading.Event()
        monkeypatch.setattr(substitutes, "_lock", LockSeen(substitutes._lock, asked))
        thread.start()
        assert asked.wait(60)
        assert owner.function() == "first"
    thread.join(60)
    assert found == ["second"]
    assert owner.function is original
