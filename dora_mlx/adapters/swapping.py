"""Any number of adapters on one loaded base model, of which one at a time is in use.

An adapter here is what takes the place of modules of the base: swapping it exchanges references,
so it costs no time and no memory, and the base weights are in memory once. The norms of a DoRA
adapter are computed when it is first used and kept as long as it is there: nothing trains it.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dora_mlx.adapters.attach import adapter_layers, dense_twins
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.errors import UserError
from dora_mlx.layers.dora import hoisted_norms

Modules = list[tuple[str, nn.Module]]
Arrays = list[tuple[str, mx.array]]


@dataclass(frozen=True)
class _Parts:
    """What has to be put into the model: modules by path, then arrays by name."""

    modules: Modules
    arrays: Arrays = field(default_factory=list)

    def put_into(self, model: nn.Module) -> None:
        model.update_modules(tree_unflatten(list(self.modules)))
        model.load_weights(self.arrays, strict=False)


@dataclass(frozen=True)
class _Adapter:
    own: _Parts
    base: _Parts
    # Holds the block of ``hoisted_norms`` open.
    hoisting: ExitStack = field(default_factory=ExitStack)


class SwappableModel:
    """A base model and its adapters by name.

    Args:
        model: The base model, without adapters; it is changed in place by ``use``.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; ``None`` is the base model."""
        return self._active

    def add(self, name: str, stored: StoredAdapter) -> None:
        """Keep an adapter that fits the model under ``name``, in place of another one there."""
        active = None if self._active == name else self._active
        self.use(None)
        self.remove(name)
        adapter = _prepared(self.model, stored)
        adapter.own.put_into(self.model)
        adapter.hoisting.enter_context(hoisted_norms(self.model))
        adapter.base.put_into(self.model)
        self._adapters[name] = adapter
        self.use(active)

    def remove(self, name: str) -> None:
        """Forget an adapter; one in use gives way to the base model."""
        if name == self._active:
            self.use(None)
        if name in self._adapters:
            self._adapters.pop(name).hoisting.close()

    def use(self, name: str | None) -> None:
        """Put the adapter ``name`` into the model; ``None`` leaves the base model.

        Raises:
            UserError: If there is no such adapter.
        """
        if name is not None and name not in self._adapters:
            known = ", ".join(self.names) or "none"
            raise UserError(f"There is no adapter {name!r} here; there are: {known}.")
        if name == self._active:
            return
        if self._active is not None:
            self._adapters[self._active].base.put_into(self.model)
        if name is not None:
            self._adapters[name].own.put_into(self.model)
        self._active = name


def _prepared(model: nn.Module, stored: StoredAdapter) -> _Adapter:
    """An adapter and what it replaces, evaluated; ``model`` is the base and stays so."""
    if stored.spec.method == "full":
        layers = dict(dense_twins(model))
    else:
        layers = dict(adapter_layers(model, stored.spec))
    places = dict(model.named_modules())
    left = dict(stored.arrays)
    for path, layer in layers.items():
        names = [name for name in stored.arrays if name.rpartition(".")[0] == path]
        layer.load_weights([(name.rpartition(".")[2], left.pop(name)) for name in names], False)
        mx.eval(layer.eval().parameters())
    replaced = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    return _Adapter(
        _Parts(list(layers.items()), list(left.items())),
        _Parts([(path, places[path]) for path in layers], [(n, replaced[n]) for n in left]),
    )
