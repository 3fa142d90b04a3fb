"""Files that are either complete or not there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

_FILE_PROBLEMS = {
    errno.ENOSPC: "could not be written: the disk is full",
    errno.EDQUOT: "could not be written: the disk quota is used up",
    errno.EFBIG: "could not be written: it would be larger than the disk or `ulimit -f` allows",
    errno.EIO: "could not be written: the disk reported an error, or it is full",
    errno.EROFS: "could not be written: the file system is read-only",
    errno.EACCES: "could not be opened: permission denied",
    errno.EPERM: "could not be written: not permitted",
}
# More than a safetensors header holds for one array: its name, type, shape and place.
_HEADER_BYTES = 300


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success it takes the place of ``path``.

    The data is flushed to the disk before the rename, so a crash leaves the old file or the new
    one. After an exception the temporary file is gone and ``path`` is what it was.
    """
    # The suffix stays: mx.save_safetensors adds one where it is missing.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_arrays(path: Path, arrays: "dict[str, mx.array]") -> None:
    """Write ``arrays`` as safetensors to ``path``, which is not atomic by itself.

    Raises:
        OSError: With ``ENOSPC`` if they do not fit on the disk, ``EIO`` for any other failure.
    """
    import mlx.core as mx

    needed = sum(array.nbytes for array in arrays.values()) + _HEADER_BYTES * len(arrays)
    # MLX reports a full disk as a RuntimeError that does not say so.
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    # By name, so that the same arrays give the same bytes whoever collected them.
    ordered = dict(sorted(arrays.items()))
    try:
        mx.save_safetensors(str(path), ordered, {"format": "mlx"})
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an ``OSError`` of the block say which file it is about, as a failed write does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def file_problem(error: OSError) -> str | None:
    """Which file could not be used and why, if that is the person's to mend, for a sentence."""
    if error.errno not in _FILE_PROBLEMS:
        return None
    return f"{error.filename or 'a file'} {_FILE_PROBLEMS[error.errno]}"


def flush_to_disk(path: Path) -> None:
    """Force a file's data, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
