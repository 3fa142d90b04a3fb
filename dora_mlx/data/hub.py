"""Data sets of the Hub, through the ``datasets`` package."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dora_mlx.errors import UserError

if TYPE_CHECKING:
    import datasets

_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "dev": "valid"}


def hub_splits(name: str) -> dict[str, str]:
    """The sources (``hub:owner/name#split``) of a data set's train, valid and test part."""
    found: dict[str, str] = {}
    for split in _datasets().get_dataset_split_names(*_name_and_configuration(name)):
        role = "test" if split == "test" else _SPLITS.get(split)
        if role is not None:
            found.setdefault(role, f"{name}#{split}")
    return found


def hub_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split, numbered from 1, read from the package's cache on disk."""
    yield from enumerate(_load(source), start=1)


def hub_fingerprint(source: str) -> str:
    """What identifies the content of one split."""
    return str(_load(source)._fingerprint)


def _load(source: str) -> "datasets.Dataset":
    name, _, split = source.partition("#")
    package = _datasets()
    try:
        return package.load_dataset(*_name_and_configuration(name), split=split)
    except (OSError, ValueError, package.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The data set {name} cannot be loaded: {first}.") from error


def _name_and_configuration(name: str) -> list[str]:
    """``hub:owner/name:configuration`` -> the arguments that ``datasets`` takes."""
    return name.removeprefix("hub:").split(":", 1)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "A Hub data set needs the datasets package: pip install 'dora-mlx[hub]'."
        ) from error
    return datasets
