"""Write a file or a folder that is either complete or not there.

The output is written under a temporary name beside its target, flushed to disk and renamed at the
end. Whatever goes wrong before that, an interruption included, leaves the target as it was.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_mlx.atomic import flush_to_disk
from dora_mlx.errors import UserError

# Called with bytes done and bytes in total.
Progress = Callable[[int, int], None]

# One of these is in every folder that may be replaced.
_OURS = ("config.json", "export_report.json")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_BAD_PATH = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR)


@contextmanager
def staged_file(target: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file that becomes ``target`` when the block ends well.

    Args:
        target: The file to write. Missing parent folders are created.
        needed: Bytes that will be written.
        overwrite: Replace an existing file, at the end and in one step.

    Raises:
        UserError: When ``target`` exists, cannot be written, or does not fit on its disk.
    """
    with _staged(target, needed, overwrite, folder=False) as partial:
        yield partial


@contextmanager
def staged_folder(target: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends well.

    Like ``staged_file``. With ``overwrite`` only a folder with a model or another export, or an
    empty folder, is replaced: it is renamed away, and removed once the new one is in its place.
    """
    with _staged(target, needed, overwrite, folder=True) as partial:
        yield partial


@contextmanager
def _staged(target: Path, needed: int, overwrite: bool, folder: bool) -> Iterator[Path]:
    with _explained(target, needed):
        target = target.resolve()
        partial = target.with_name(f"{_partial_prefix(target)}{os.getpid()}")
        check_target(target, overwrite, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        check_space(target, needed)
        if folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        try:
            yield partial
            _flush_tree(partial)
            # Hours may have passed since the first look.
            check_target(target, overwrite, folder)
            _put_in_place(partial, target)
            flush_to_disk(target.parent)
        finally:
            _remove(partial)


@contextmanager
def _explained(target: Path, needed: int) -> Iterator[None]:
    """Turn the errors of a disk into sentences for a person."""
    try:
        yield
    except OSError as error:
        place = error.filename or target
        if error.errno in _FULL:
            raise UserError(
                f"The disk, or your quota on it, filled up while {target} was written, which "
                f"needs {_readable(needed)}. Free some space or choose another disk."
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"{place} cannot be opened or written: {error.strerror}. "
                "Choose a folder that belongs to you."
            ) from error
        if error.errno in _BAD_PATH:
            raise UserError(
                f"{target} cannot be written: {error.strerror} ({place}). Choose another name."
            ) from error
        raise


def check_target(target: Path, overwrite: bool, folder: bool) -> None:
    """Refuse a target that is there, unless it may be overwritten and is what it should be.

    Raises:
        UserError: Saying which of the two it is.
    """
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists already. Choose another name, or add --overwrite.")
    if folder != target.is_dir():
        kind = "file" if folder else "folder"
        raise UserError(f"{target} is a {kind} and will not be replaced. Choose another name.")
    if folder and any(target.iterdir()) and not any((target / n).exists() for n in _OURS):
        raise UserError(
            f"{target} holds something other than a model and will not be replaced. "
            "Choose another name."
        )


def free_space(target: Path) -> int:
    """Free bytes on the disk that ``target`` will be on, whether its folders exist or not."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(target: Path, needed: int) -> None:
    """Refuse to write what does not fit.

    Raises:
        UserError: If fewer than ``needed`` bytes are free on the disk of ``target``.
    """
    free = free_space(target)
    if free < needed:
        raise UserError(
            f"{target} needs {_readable(needed)} and its disk has {_readable(free)} free. "
            "Free some space or choose another disk."
        )


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1000:.0f} kB"


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_abandoned(target: Path) -> None:
    # A killed export cannot clean up, and what it left may be most of the disk.
    prefix = _partial_prefix(target)
    for path in target.parent.iterdir():
        process = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and process.isdecimal() and not _is_running(int(process)):
            _remove(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    flush_to_disk(path)


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(partial, target)
        return
    # No portable call swaps two folders, so the old one steps aside and returns on failure.
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    try:
        os.rename(target, old)
        os.rename(partial, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
    shutil.rmtree(old)


def byte_counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """A function that adds the bytes it is given and reports the sum to ``progress``."""
    done = 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    report(0)
    return report
