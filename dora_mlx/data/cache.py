"""Tokenized sources kept on the disk, under a key of everything that they depend on.

Place: ``~/Library/Caches/dora_mlx/tokenized`` on a Mac, ``$XDG_CACHE_HOME`` or ``~/.cache`` in
its stead elsewhere; one folder for each source, 4 GB in all, the least recently used deleted
first. It may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dora_mlx
from dora_mlx.data.records import Source
from dora_mlx.data.tokenized import TokenizedSource, read_source

_MOST_BYTES = 4 * 10**9
# A smaller file is tokenized in about the time that reading it back would take.
_WORTH_KEEPING = 1 << 20
_READ_AT_ONCE = 1 << 22


def cache_folder() -> Path:
    """Where tokenized sources are kept."""
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dora_mlx" / "tokenized"


def content_fingerprint(source: Source) -> bytes:
    """SHA-256 of a file's bytes, or of what identifies a split of a Hub data set."""
    if isinstance(source, str):
        from dora_mlx.data.hub import hub_fingerprint

        return hashlib.sha256(hub_fingerprint(source).encode()).digest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.digest()


def cache_key(content: bytes, source: Source, tokenizer: Any, options: dict[str, Any]) -> str:
    """A name that changes with content, place, tokenizer, template, options and this code."""
    template = tokenizer.chat_template
    parts = {
        "content": content.hex(),
        # The report names the source.
        "source": str(source),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [sorted(tokenizer.eos_token_ids), tokenizer.bos_token_id],
        "template": [template, tokenizer.has_chat_template, tokenizer.has_thinking],
        "options": options,
        "code": _code_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_version() -> str:
    from importlib.metadata import version

    digest = hashlib.sha256(dora_mlx.__version__.encode())
    for package in ("tokenizers", "transformers", "mlx-lm", "jinja2"):
        digest.update(f"{package} {version(package)}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_worth_keeping(source: Source) -> bool:
    """Whether a source is large enough to be kept."""
    return isinstance(source, str) or source.stat().st_size >= _WORTH_KEEPING


def load_kept(key: str) -> tuple[TokenizedSource | None, str | None]:
    """What is kept under a key, and a sentence if something is there that cannot be used."""
    folder = cache_folder() / key
    if not folder.is_dir():
        return None, None
    try:
        source = read_source(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"the kept tokens in {folder} are damaged ({error}) and are made again"
        shutil.rmtree(folder, ignore_errors=True)
        return None, reason
    # The time of last use, by which old ones are deleted.
    os.utime(folder)
    return replace(source, kept=True), None


def keep(key: str, write: Callable[[Path], TokenizedSource]) -> TokenizedSource:
    """Run ``write`` on a temporary folder and put that under ``key`` when it is complete.

    Raises:
        OSError: If it cannot be written.
    """
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{key[:16]}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        source = write(temporary)
        if not (root / key).exists():
            os.replace(temporary, root / key)
            source = read_source(root / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _delete_oldest(root, key)
    return source


def _delete_oldest(root: Path, spared: str) -> None:
    """Delete the least recently used until what is kept fits into its bound."""
    folders = sorted(
        (path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.stat().st_mtime,
    )
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in folders}
    total = sum(sizes.values())
    for path in folders:
        if total <= _MOST_BYTES:
            return
        if path.name != spared:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
