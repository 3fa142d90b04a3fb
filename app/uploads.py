"""Data files that were uploaded: kept in one folder, because runs refer to them.

A browser names an upload only by its name in that folder, never by a path.
"""

import filecmp
import os
import re
import shutil
from pathlib import Path

from dora_mlx import UserError

_LONGEST_NAME = 80


def keep_upload(temporary: Path, folder: Path) -> str:
    """Copy an uploaded file into ``folder``; returns its name there.

    A file of that name with other content stays as it is, and the new one gets a number.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stem, suffixes = _safe_name(temporary.name)
    number = 1
    while (place := folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffixes}").exists():
        if filecmp.cmp(temporary, place, shallow=False):
            os.utime(place)
            return place.name
        number += 1
    partial = folder / f".{place.name}.partial"
    try:
        shutil.copyfile(temporary, partial)
        partial.rename(place)
    finally:
        partial.unlink(missing_ok=True)
    return place.name


def uploads(folder: Path) -> list[str]:
    """Names of the uploaded files, the newest first."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return [path.name for path in sorted(files, key=lambda path: -path.stat().st_mtime)]


def uploaded_file(folder: Path, name: str) -> Path:
    """The file of an upload.

    Raises:
        UserError: If there is none of that name.
    """
    if name not in uploads(folder):
        raise UserError(f"The file {name} is not here any more. Upload it again.")
    return folder / name


def _safe_name(name: str) -> tuple[str, str]:
    """A name as a file may have it, in two parts: what a number goes behind, and the rest."""
    cleaned = re.sub(r"[^\w.-]+", "-", name).strip("-._") or "data"
    stem, dot, suffixes = cleaned.partition(".")
    return stem[:_LONGEST_NAME] or "data", (dot + suffixes)[-20:]
