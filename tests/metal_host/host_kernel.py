"""A stand-in for the object that ``mx.fast.metal_kernel`` returns, which runs on the host."""

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_host.guarded_memory import GuardedArray
from metal_host.source import generated_source, host_program, parameters_of

HERE = Path(__file__).parent
# C++14 is what the Metal Shading Language is based on.
_FLAGS = ["-std=c++14", "-O1", "-fPIC", "-shared"]
# Not all warnings: those of compilers to come would fail the tests.
_FLAGS += ["-Werror=uninitialized", "-Werror=return-type", "-Werror=type-limits"]
_FLAGS += ["-fsanitize=shift,signed-integer-overflow,integer-divide-by-zero,bounds"]
_FLAGS += ["-fsanitize-undefined-trap-on-error"]
_CONTRACT = ["-O2", "-march=native", "-ffp-contract=fast"]


class KernelFault(AssertionError):
    """What the shim caught a kernel doing."""


class HostCompiler:
    """Compiles every distinct source once; sources that are known up front, in one go.

    Args:
        folder: Where to put programs and libraries.
        contract: Let the compiler fuse multiplications and additions, as Apple's may.
    """

    def __init__(self, folder: Path, contract: bool = False):
        self._folder = folder
        self._flags = [*_FLAGS, *(_CONTRACT if contract else ["-ffp-contract=off"])]
        self._entries: dict[str, Any] = {}

    def entry(self, source: str) -> Any:
        """The C function that launches the kernel with this source."""
        if source not in self._entries:
            self.compile([source])
        return self._entries[source]

    def compile(self, sources: Sequence[str]) -> None:
        """Make ``sources`` known, with one run of the compiler."""
        program = host_program(sources)
        stem = self._folder / hashlib.sha256(program.encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(program)
        compiler = shutil.which("g++")
        if compiler is None:
            raise AssertionError(
                "the tests of the Metal kernels need g++, which was not found "
                "(Debian and Ubuntu: sudo apt install g++)"
            )
        _check_run(
            [compiler, *self._flags, f"-I{HERE}", f"{stem}.cpp", "-o", f"{stem}.so"],
        )
        library = ctypes.CDLL(f"{stem}.so")
        for index, source in enumerate(sources):
            self._entries[source] = getattr(library, f"run_{index}")


def check_address_spaces(sources: Sequence[str], folder: Path) -> None:
    """Let clang type-check ``sources`` with device, constant and threadgroup as distinct spaces.

    Raises:
        AssertionError: With clang's message, if a source mixes them up.
    """
    path = folder / "address_spaces.cpp"
    path.write_text(host_program(sources, address_spaces=True))
    flags = ["-std=c++14", "-fsyntax-only", "-Wno-everything", "-DSHIM_ADDRESS_SPACES"]
    _check_run(["clang++", *flags, f"-I{HERE}", str(path)])


class HostKernel:
    """Called like a Metal kernel: generates its source as MLX does and runs it on the host.

    Args:
        kernel: What ``mx.fast.metal_kernel`` returned.
        compiler: Where compiled sources live.
        seed: 0 runs the threads in order, anything else in an order of its own.
        at_end: Whether the buffers end, or start, at a forbidden page.
        edit: Changes the source before it is compiled, to plant an error.
        sources: If given, the source is added there and nothing runs; the outputs are zeros.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        compiler: HostCompiler,
        seed: int = 0,
        at_end: bool = True,
        edit: Callable[[str], str] | None = None,
        sources: dict[str, None] | None = None,
    ):
        self._kernel, self._compiler = kernel, compiler
        self._seed, self._at_end, self._edit, self._sources = seed, at_end, edit, sources

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        **options: Any,
    ) -> list[mx.array]:
        launch = {"grid": grid, "threadgroup": threadgroup}
        outputs = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        source = generated_source(self._kernel, inputs, **launch, **outputs, **options)
        source = self._edit(source) if self._edit else source
        results = [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        if self._sources is not None:
            self._sources[source] = None
            return results
        buffers, written = self._buffers(source, inputs, results)
        self._launch(self._compiler.entry(source), buffers, grid, threadgroup)
        return [_from_numpy(b.values(), r) for b, r in zip(written, results, strict=True)]

    def _buffers(
        self, source: str, inputs: Sequence[mx.array], results: Sequence[mx.array]
    ) -> tuple[list[GuardedArray], list[GuardedArray]]:
        buffers, written = [], []
        waiting, unwritten = iter(inputs), iter(results)
        current = None
        for parameter in parameters_of(source):
            if not parameter.is_buffer:
                continue
            if parameter.is_output:
                # Bytes of ones are a NaN in every type: an element left out shows.
                values = np.full_like(_to_numpy(next(unwritten)), 0)
                values.view(np.uint8).fill(255)
            elif current is not None and parameter.name.endswith("_shape"):
                values = np.array(current.shape, np.int32)
            else:
                current = next(waiting)
                values = _to_numpy(current)
            buffers.append(GuardedArray(parameter.name, values, self._at_end))
            if parameter.is_output:
                written.append(buffers[-1])
        return buffers, written

    def _launch(
        self,
        entry: Any,
        buffers: Sequence[GuardedArray],
        grid: Sequence[int],
        threadgroup: Sequence[int],
    ) -> None:
        message = ctypes.create_string_buffer(256)
        fault = ctypes.c_void_p()
        failed = entry(
            (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers)),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*threadgroup),
            ctypes.c_uint(self._seed),
            message,
            ctypes.byref(fault),
        )
        if not failed:
            return
        text = message.value.decode()
        address = fault.value
        if address is not None:
            text += ": " + next(
                (b.describe(address) for b in buffers if b.surrounds(address)),
                "far from every buffer",
            )
        raise KernelFault(text)


def _check_run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{command[0]} refused a kernel:\n{done.stderr[:4000]}")


def _to_numpy(array: mx.array) -> np.ndarray:
    # NumPy has no bfloat16; its bits travel as integers.
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _from_numpy(values: np.ndarray, like: mx.array) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if like.dtype == mx.bfloat16 else array


@cache
def shared_compiler() -> HostCompiler:
    """The compiler of this test process; its folder goes when the process does."""
    folder = tempfile.TemporaryDirectory(prefix="metal_host_")
    compiler = HostCompiler(Path(folder.name))
    atexit.register(folder.cleanup)
    return compiler
