"""Data sets of the Hub, through the ``datasets`` package."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dora_mlx.errors import UserError
from dora_mlx.registry import FIRST_ANSWER_SECONDS

if TYPE_CHECKING:
    import datasets

# Whether to go to the network is one setting of the ``datasets`` package for all threads.
_asking_now = threading.RLock()

_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "dev": "valid"}


def hub_splits(name: str) -> dict[str, str]:
    """The sources (``hub:owner/name#split``) of a data set's train, valid and test part."""
    with _asking(name) as package:
        splits = package.get_dataset_split_names(*_name_and_configuration(name))
    found: dict[str, str] = {}
    for split in splits:
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
    with _asking(name) as package:
        loaded: datasets.Dataset = package.load_dataset(*_name_and_configuration(name), split=split)
    return loaded


@contextmanager
def _asking(name: str) -> Iterator[Any]:
    """The ``datasets`` package; what goes wrong with it in the block becomes a ``UserError``.

    Without a network it goes to its cache at once.
    """
    package = _datasets()
    from huggingface_hub import errors

    with _asking_now:
        offline = package.config.HF_HUB_OFFLINE
        try:
            # It tries a network that is not there six times for every file.
            package.config.HF_HUB_OFFLINE = offline or not _is_hub_there(name)
            yield package
        except ConnectionError as error:
            raise UserError(
                f"The data set {name} is not downloaded and the Hub cannot be reached: connect and "
                "try again, or give a file."
            ) from error
        except (
            OSError, ValueError, RuntimeError, package.exceptions.DatasetsError,
            errors.HTTPError,  # type: ignore[attr-defined]
        ) as error:  # fmt: skip
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"The data set {name} cannot be loaded: {first}.") from error
        finally:
            package.config.HF_HUB_OFFLINE = offline


def _is_hub_there(name: str) -> bool:
    """Whether the Hub answers a question about a data set, be it by a refusal."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(_name_and_configuration(name)[0], timeout=FIRST_ANSWER_SECONDS)
    except errors.HfHubHTTPError:
        # What is wrong is said where the data set is loaded.
        return True
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]
        return False
    return True


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
