"""Functions that stand in for those of a module or a class, for one thread and for a while."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.RLock()


@contextmanager
def standing_in(owner: Any, substitutes: dict[str, Any]) -> Iterator[None]:
    """Within the block, functions of a module or class are others for this thread.

    Other threads, which may be computing, keep the originals.
    """
    mine = threading.get_ident()

    def chosen(original: Any, substitute: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            function = substitute if threading.get_ident() == mine else original
            return function(*args, **kwargs)

        return call

    with _lock:
        # Read here, because before it they may be what another thread has put there for a while.
        originals = {name: getattr(owner, name) for name in substitutes}
        for name, substitute in substitutes.items():
            setattr(owner, name, chosen(originals[name], substitute))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(owner, name, original)
