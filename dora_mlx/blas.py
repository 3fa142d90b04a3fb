"""Give MLX's CPU backend a fast BLAS on Linux.

The PyPI wheel for Linux links reference BLAS: 2 to 5 GFLOP/s. Symbols of an OpenBLAS that is
already in the global scope win when ``mlx.core`` is loaded afterwards, and float32 products run
about 70 times faster. macOS uses Accelerate and Metal and needs none of this.

The system's OpenBLAS is used if there is one. If not, the package ``scipy-openblas32`` has one
whose symbols begin with ``scipy_``: a library of a few jumps, assembled once into the user's
cache folder, gives them their usual names.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

INSTALL_HINT = "Debian and Ubuntu: sudo apt install libopenblas0-pthread"

# The products that MLX calls; its LAPACK functions stay what they are.
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_JUMPS = {"x86_64": "jmp scipy_{name}@PLT", "aarch64": "b scipy_{name}"}


def load_openblas() -> str | None:
    """Load OpenBLAS into the global symbol scope; call before ``import mlx.core``.

    Returns one sentence for the log when MLX will run without a fast BLAS, else ``None``.
    """
    if not sys.platform.startswith("linux"):
        return None
    if "mlx.core" in sys.modules and not _is_loaded():
        return "MLX was imported before dora_mlx, so its CPU products stay on slow reference BLAS."
    if _load(ctypes.util.find_library("openblas") or "libopenblas.so.0") or _load_from_package():
        return None
    return f"OpenBLAS was not found, so training runs many times slower. {INSTALL_HINT}"


def _load(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_from_package() -> bool:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return False
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    jumps = _assemble_jumps()
    return jumps is not None and _load(str(library)) and _load(str(jumps))


def _assemble_jumps() -> Path | None:
    """The library that gives the products their usual names; ``None`` without an assembler."""
    machine = platform.machine()
    if machine not in _JUMPS:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora_mlx"
    library = cache / f"blas-names-{machine}.so"
    if library.exists():
        return library
    lines = ["        .text"]
    for name in _PRODUCTS:
        jump = _JUMPS[machine].format(name=name)
        lines += [f"        .globl {name}", f"        .type {name}, %function", f"{name}: {jump}"]
    lines.append('        .section .note.GNU-stack,"",%progbits')
    partial = cache / f".{library.name}.{os.getpid()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cc", "-shared", "-x", "assembler", "-o", str(partial), "-"],
            input="\n".join(lines) + "\n",
            text=True,
            capture_output=True,
            check=True,
        )
        partial.replace(library)
    except (OSError, subprocess.CalledProcessError):
        # No compiler, or no place to write: the caller says that there is no fast BLAS.
        return None
    return library


def _is_loaded() -> bool:
    with open("/proc/self/maps") as maps:
        # Not any OpenBLAS: NumPy brings one of its own, under other names.
        return any("/libopenblas" in line or "/blas-names" in line for line in maps)
