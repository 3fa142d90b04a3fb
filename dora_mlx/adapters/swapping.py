"""Any number of adapters on one loaded base model, of which one at a time is in use.

An adapter here is what takes the place of modules of the base: swapping it exchanges references,
so it costs no time and no memory, and the base weights are in memory once. The norms of a DoRA
adapter are computed when it is first used and kept as long as it is there: nothing trains it.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dora_mlx.adapters.attach import adapter_layers, dense_twins
from dora_mlx.adapters.reading import read_adapter
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.adapters.trained import adapter_of, load_base_of
from dora_mlx.errors import UserError
from dora_mlx.layers.dora import hoisted_norms
from dora_mlx.loading import LoadedModel, load_base
from dora_mlx.registry import resolve
from dora_mlx.run_folder import RunFolder

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
        base: The base model, freshly loaded; it belongs to this object from now on.
    """

    def __init__(self, base: LoadedModel):
        self.base = base
        self.model: nn.Module = base.model.eval()
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None

    @classmethod
    def load(cls, model: str) -> "SwappableModel":
        """The base model of that alias, folder or Hub name, without adapters.

        Raises:
            UserError: If there is no such model, or it cannot be loaded.
        """
        return cls(load_base(resolve(model)))

    @classmethod
    def of_run(cls, folder: RunFolder, checkpoint: str | None = None) -> "SwappableModel":
        """The base model of a run with the run's adapter, under the run's name and in use.

        Raises:
            UserError: If the run has no such adapter, or its base model is gone or has changed.
        """
        adapter_of(folder, checkpoint)
        swappable = cls(load_base_of(folder)[0])
        swappable.add(folder.name, swappable.read(folder, checkpoint))
        swappable.use(folder.name)
        return swappable

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; ``None`` is the base model."""
        return self._active

    def read(self, source: RunFolder | Path, checkpoint: str | None = None) -> StoredAdapter:
        """An adapter for ``add``.

        Args:
            source: A run, or a folder with an adapter of dora_mlx, mlx-lm or PEFT.
            checkpoint: Of a run: ``None`` for the best adapter, ``last`` or a step's number for a
                checkpoint's.

        Raises:
            UserError: If there is none, or listing everything that does not fit.
        """
        folder = adapter_of(source, checkpoint) if isinstance(source, RunFolder) else source
        active = self._active
        # What fits is a matter of the base model's layers.
        self.use(None)
        try:
            return read_adapter(folder, self.base)
        finally:
            self.use(active)

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

    def layers(self, name: str) -> dict[str, nn.Module]:
        """The modules that an adapter has in place of those of the base, by path."""
        return dict(self._adapters[name].own.modules)

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


def load_swappable(
    runs: list[RunFolder], model: str | None, folders: list[Path], checkpoint: str | None = None
) -> SwappableModel:
    """A base model with the adapters that a command line names, the first of them in use.

    Args:
        runs: Runs of one base model; ``checkpoint`` is one of the first.
        model: The base model, where there are no runs.
        folders: Folders with adapters.
        checkpoint: As for ``SwappableModel.read``.

    Raises:
        UserError: If the base model is named by nothing or twice, or an adapter does not fit.
    """
    if model is None and not runs:
        raise UserError("Name a run by --run, or a base model by --model.")
    if model is not None and runs:
        raise UserError("--run says what the base model is, so --model cannot say it as well.")
    if model is not None:
        swappable = SwappableModel.load(model)
    else:
        swappable = SwappableModel.of_run(runs[0], checkpoint)
    problems = []
    sources: list[RunFolder | Path] = [*runs[1:], *folders]
    for source in sources:
        try:
            stored = swappable.read(source)
        except UserError as error:
            problems.append(str(error))
            continue
        name = source.name if isinstance(source, RunFolder) else name_of(source, swappable.names)
        swappable.add(name, stored)
    if problems:
        raise UserError("\n".join(problems))
    swappable.use(swappable.names[0] if swappable.names else None)
    return swappable


def name_of(folder: Path, taken: tuple[str, ...]) -> str:
    """What to call the adapter in ``folder``: its last part, or all of it if that is taken."""
    name = folder.absolute().name
    return str(folder) if name in taken else name


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
