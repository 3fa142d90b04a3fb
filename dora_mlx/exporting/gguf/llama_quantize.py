"""Types that only llama.cpp's own program ``llama-quantize`` makes."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_mlx.errors import UserError

PROGRAM = "llama-quantize"


def check_llama_quantize(quant: str) -> str:
    """Path of the program.

    Raises:
        UserError: When it is not installed.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise UserError(
            f"{quant} is written by llama.cpp's program {PROGRAM}, which is not on the PATH. "
            "Install llama.cpp (brew install llama.cpp), or choose a type that needs no other "
            "program: q4_k_m, q5_k_m, q6_k, q8_0."
        )
    return program


@contextmanager
def run_llama_quantize(output: Path, quant: str) -> Iterator[Path]:
    """Yield a path for an f16 file, and turn what was written there into ``output``.

    The f16 file lies beside ``output`` and is removed.

    Raises:
        UserError: When the program is missing or fails, with what it said.
    """
    program = check_llama_quantize(quant)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.f16-") as folder:
        source = Path(folder) / "f16.gguf"
        yield source
        child = subprocess.run(
            [program, str(source), str(output), quant.upper()],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    if child.returncode != 0:
        said = (child.stderr or child.stdout).strip().splitlines()[-3:]
        raise UserError(f"{PROGRAM} could not make {quant} ({child.returncode}): {' '.join(said)}")
