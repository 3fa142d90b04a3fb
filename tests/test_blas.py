"""MLX's products on Linux run on OpenBLAS, from the system or from the Python package."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="macOS has Accelerate and Metal"
)

# Stands in for a machine without the system's OpenBLAS, and maybe without the package.
HIDE = """
import ctypes, ctypes.util, importlib.util, sys
real_library, real_spec = ctypes.CDLL, importlib.util.find_spec
def library(name, *rest, **options):
    if "libopenblas" in str(name):
        raise OSError("hidden")
    return real_library(name, *rest, **options)
ctypes.CDLL = library
if {hide_package}:
    hidden = lambda name, *rest: None if name == "scipy_openblas32" else real_spec(name, *rest)
    importlib.util.find_spec = hidden
"""
# Where a product really runs shows in the library that holds the symbol MLX resolved.
REPORT = """
import dora_mlx
import mlx.core as mx
import numpy as np
a, b = np.random.rand(70, 50).astype("f"), np.random.rand(50, 90).astype("f")
assert np.allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, atol=1e-4)
maps = open("/proc/self/maps").read()
print("system" if "/libopenblas" in maps else "", "package" if "scipy_openblas32/" in maps else "")
print(dora_mlx.blas_notice)
"""


def report(code, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    where, notice = result.stdout.splitlines()
    return where.strip(), notice


def test_package_serves_where_the_system_has_none(tmp_path):
    for _ in range(2):  # The second time from the cache.
        where, notice = report(HIDE.format(hide_package=False) + REPORT, tmp_path)
        assert where == "package"
        assert notice == "None"
    assert [path.suffix for path in (tmp_path / "dora_mlx").iterdir()] == [".so"]


def test_without_any_everything_works_and_one_line_says_how_to_get_it(tmp_path):
    where, notice = report(HIDE.format(hide_package=True) + REPORT, tmp_path)
    assert where == ""
    assert "apt install libopenblas0-pthread" in notice


def test_late_import_is_noticed(tmp_path):
    code = HIDE.format(hide_package=True) + "import mlx.core\n" + REPORT
    assert "MLX was imported before dora_mlx" in report(code, tmp_path)[1]
