"""``python -m dora_mlx.inspect``: what a run did to the weights; see ``inspect_command.py``.

This file has the name of a module of the standard library. Inside the package that is no matter,
but a Python that is started in this folder looks for ``import inspect`` here first.
"""

import sys


def _give_name_back() -> None:
    """Load the standard library's ``inspect`` in place of this file."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import abspath, dirname

    here = dirname(abspath(__file__))
    spec = PathFinder.find_spec("inspect", [p for p in sys.path if abspath(p) != here])
    if spec is None or spec.loader is None:
        raise ImportError("the standard library has no module 'inspect'")
    # What sys.modules holds after this file has run is what the import gives.
    sys.modules["inspect"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "inspect":
    _give_name_back()
else:
    from dora_mlx.inspect_command import build_parser, main

    __all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
