"""Model names: from an alias, a folder or a Hub name to a folder on this machine.

The aliases live in ``models/registry.toml``. ``starter`` comes with the package and needs no
network; everything else is downloaded once into the Hugging Face cache.
"""

import difflib
import errno
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_mlx.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIST_HINT = "`dora-mlx models` lists every name"

# Weights, tokenizer and templates; no code and no pickles.
FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]

# Without it the first request to a network that swallows packets would wait for ever.
FIRST_ANSWER_SECONDS = 8.0

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that decide its memory."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(output, input) sizes of the seven linear layers of one block."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(query, self.hidden), (key, self.hidden), (key, self.hidden)]
        mlp = [(self.mlp, self.hidden), (self.mlp, self.hidden), (self.hidden, self.mlp)]
        return [*attention, (self.hidden, query), *mlp]

    @property
    def parameters(self) -> int:
        """Number of weights in the linear layers and the embedding."""
        blocks = self.layers * sum(rows * columns for rows, columns in self.linears)
        return blocks + (1 if self.tied else 2) * self.vocab * self.hidden


@dataclass(frozen=True)
class ModelEntry:
    """One line of the list of models.

    ``train_memory_gb`` is planned (``models/plan_registry.py``), not measured.
    Sizes are in GB of 10^9 bytes. ``hub`` is ``None`` for the embedded model.
    """

    alias: str
    hub: str | None
    parameters: int
    download_gb: float
    train_memory_gb: float
    license: str
    note: str
    shape: ModelShape | None


def models_dir() -> Path:
    """The folder with the registry, the starter model and the samples.

    Inside the package when it was installed from a wheel, beside it in a clone.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "bundled", package.parent / "models"):
        if (folder / "registry.toml").is_file():
            return folder
    raise UserError(
        "This installation of dora-mlx lacks its models folder. "
        "Install it again, or run it from a complete clone."
    )


def samples_dir() -> Path:
    """The folder with the sample data."""
    return models_dir() / "samples"


@functools.cache
def list_models() -> tuple[ModelEntry, ...]:
    """Every model with an alias: the embedded one first, then in the order of the registry."""
    with open(models_dir() / "registry.toml", "rb") as file:
        tables: dict[str, dict[str, Any]] = tomllib.load(file)["models"]
    return tuple(_entry(alias, table) for alias, table in tables.items())


def _entry(alias: str, table: dict[str, Any]) -> ModelEntry:
    shape = ModelShape(**table["shape"]) if "shape" in table else None
    known = {"hub": None, "note": "", **table, "shape": shape}
    return ModelEntry(alias=alias, **known)


def cached_models() -> list[str]:
    """Aliases that can be used without a network: the starter and what was downloaded."""
    return [entry.alias for entry in list_models() if not entry.hub or _cached(entry.hub)]


def public_name(name: str) -> tuple[str, str | None]:
    """What others know a model by, and its licence where the registry says it.

    An alias becomes its Hub name, and a folder its last part: where it lies on this machine is
    nobody else's business.
    """
    for entry in list_models():
        if name.lower() == entry.alias or (entry.hub and name == entry.hub):
            return entry.hub or entry.alias, entry.license
    return (Path(name).name if _looks_like_path(name) and os.path.exists(name) else name), None


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded first if need be.

    An alias wins over a folder of the same name; write ``./name`` for the folder. A model that
    is complete in the Hugging Face cache is used as it is, without asking the network.

    Args:
        name: Alias of the registry, path of a folder, or Hub name ``owner/name``.

    Raises:
        UserError: If the name is unknown, the folder holds no model, or the download fails.
    """
    place = _locate(name)
    return _from_hub(place) if isinstance(place, str) else place


def find_entry(name: str) -> ModelEntry | None:
    """The entry with the alias ``name``, in any case."""
    return next((entry for entry in list_models() if entry.alias == name.lower()), None)


def local_folder(name: str) -> Path | None:
    """The folder of a model if it is complete on this machine; asks no network.

    Raises:
        UserError: If the name is unknown, or the folder holds no model.
    """
    place = _locate(name)
    if isinstance(place, Path):
        return place
    with _explained(place):
        return _cached(place)


def folder_without_weights(name: str) -> Path | None:
    """The folder ``name`` if it describes a model, by its ``config.json``, and has no weights."""
    path = os.path.expanduser(name)
    if not os.path.isfile(os.path.join(path, "config.json")) or _has_weights(Path(path)):
        return None
    return Path(path)


def download_file(repo: str, name: str, *, required: bool = True) -> Path | None:
    """One small file of a model on the Hub, kept in the Hugging Face cache.

    Returns:
        Its path, or ``None`` if it is not ``required`` and the model has none of that name.

    Raises:
        UserError: If the Hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _explained(repo):
        try:
            return Path(hf_hub_download(repo, name, local_files_only=True))
        except LocalEntryNotFoundError:
            # It tries a network that is not there six times; this request is made once.
            HfApi().model_info(repo, timeout=FIRST_ANSWER_SECONDS)
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            if not required:
                return None
            raise UserError(f"{repo} has no {name}, so it is no model that MLX loads.") from error


def _locate(name: str) -> Path | str:
    """The folder that a name stands for, or its name on the Hub."""
    entry = find_entry(name)
    if entry is not None:
        return entry.hub or _checked(models_dir() / entry.alias)
    # os.path, because pathlib raises for an unknown ~user and for names too long to exist.
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return _checked(Path(path))
    if HUB_NAME.fullmatch(name):
        return name
    if _looks_like_path(name):
        raise UserError(f"There is no folder {name}. Check the path, or name a model: {LIST_HINT}.")
    raise UserError(_unknown_name(name))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~")) or "/" in name or "\\" in name


def _unknown_name(name: str) -> str:
    aliases = [entry.alias for entry in list_models()]
    nearest = difflib.get_close_matches(name.lower(), aliases, n=3, cutoff=0.5)
    nearest = nearest or [alias for alias in aliases if name and name.lower() in alias][:3]
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return (
        f"No model is called {name!r}.{hint} "
        f"{LIST_HINT}; a folder or a Hub name (owner/name) works too."
    )


def _checked(folder: Path) -> Path:
    problem = _folder_problem(folder)
    if problem:
        raise UserError(f"{folder} is not a model folder: {problem}.")
    return folder


def _folder_problem(folder: Path) -> str | None:
    """What keeps a folder from being a model, or ``None``."""
    if not folder.is_dir():
        return "it is a file; give the folder that holds config.json"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no config.json"
    except ValueError as error:
        return f"its config.json is broken ({error})"
    if not isinstance(config, dict) or "model_type" not in config:
        return "its config.json names no model_type"
    if not _has_weights(folder):
        return "it has no weights (model*.safetensors)"
    missing = [name for name in _indexed_files(folder) if not (folder / name).is_file()]
    if missing:
        return f"it lacks {', '.join(missing)}, which model.safetensors.index.json lists"
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return "it has no tokenizer (tokenizer.json or tokenizer.model)"
    return None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors"))


def _indexed_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        # mlx-lm reads no index; one that says nothing cannot tell what is missing.
        return []


def _cached(repo: str) -> Path | None:
    """The folder of a complete model in the Hugging Face cache; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return None if _folder_problem(folder) else folder


def _from_hub(repo: str) -> Path:
    with _explained(repo):
        return _checked(_cached(repo) or _download(repo))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What goes wrong with the Hub within the block becomes a ``UserError``."""
    from huggingface_hub import errors

    # The base of network errors is httpx's in huggingface_hub 1 and httpx2's in 2; it re-exports
    # neither, but its errors module imports the one it raises.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is not a possible Hub name: {error}") from error
    except (http_error, OSError) as error:
        raise UserError(_download_problem(repo, error)) from error


def _download(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # snapshot_download sets no time limit on its own first request.
    HfApi().model_info(repo, timeout=FIRST_ANSWER_SECONDS)
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except RuntimeError as error:
        # hf_xet reports every failed transfer as a RuntimeError, a full disk included.
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _download_problem(repo: str, error: Exception) -> str:
    """One or two sentences on why a download failed and what to do."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"{repo} asks you to accept its licence first: accept it on the page of the model at "
            f"{_hub_page(repo)}, sign in with `hf auth login`, and run the command again."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"The Hub has no model {repo}, or it is private, and there is no folder of that name "
            "here: check the spelling, or sign in with `hf auth login` if you may see it."
        )
    if status == 401:
        return f"The Hub refuses your access token for {repo}: sign in again with `hf auth login`."
    if status is not None and status < 500:
        return f"The Hub refuses to send {repo} (HTTP {status}): wait a minute and try again."
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full: {repo} does not fit into {_cache_folder()}. "
            "Free some space, or set HF_HOME to a folder on a larger disk; finished files are kept."
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"The download of {repo} cannot be written to {_cache_folder()}. "
            "Give yourself access to that folder, or set HF_HOME to another one."
        )
    return _offline_problem(repo, error)


def _offline_problem(repo: str, error: Exception) -> str:
    return (
        f"{repo} is not downloaded, or only in part, and the Hub cannot be reached "
        f"({_reason(error)}): use --model {' or '.join(cached_models())}, which needs no network, "
        "give the path of a copied model folder, or connect and run the command again."
    )


def _reason(error: BaseException) -> str:
    """The first line of the root cause, without the Hub's own advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[Errno -?\d+\] ", "", lines[0]) if lines else type(error).__name__
    return text.rstrip(".")[:160]


def _hub_page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
