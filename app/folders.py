"""Folders shown in the Finder, or in what stands for it elsewhere."""

import subprocess
import sys
from pathlib import Path

from app.context import Context
from dora_mlx import UserError


def open_folder(context: Context, folder: Path) -> None:
    """Show a folder on the screen of this machine.

    Raises:
        UserError: If the page may be open on another machine, or nothing here shows folders.
    """
    if not context.is_local:
        raise UserError(f"The folder is on the machine that runs the app: {folder}.")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    try:
        subprocess.run([opener, str(folder)], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"No file manager could be opened. The folder is {folder}.") from error
