"""Downloads of what was exported: from the exports folder and from nowhere else."""

from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse


def add_downloads(server: FastAPI, exports_dir: Path) -> None:
    """Serve ``/exports/NAME`` and ``/exports/NAME/FILE``, streamed from the disk as they lie."""

    @server.get("/exports/{path:path}")
    def download(path: str) -> FileResponse:
        file = exported_file(exports_dir, path)
        if file is None:
            raise HTTPException(404, "There is no such export.")
        return FileResponse(
            file, media_type="application/octet-stream", filename=file.name, stat_result=file.stat()
        )


def exported_file(exports_dir: Path, path: str) -> Path | None:
    """The exported file of a path as a browser sends it; ``None`` unless it is one.

    Each part of the path has to be the name of an entry that is there, and no link leads out.
    """
    parts = path.split("/")
    place = exports_dir
    if len(parts) > 2:
        return None
    for part in parts:
        names = {entry.name: entry for entry in place.iterdir()} if place.is_dir() else {}
        if part not in names or names[part].is_symlink() or part.startswith("."):
            return None
        place = names[part]
    return place if place.is_file() else None
