"""The Metal source that MLX itself generates for a kernel call, and a host program around it."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

_INSTANTIATION = re.compile(
    r"template \[\[host_name\(\"[^\"]*\"\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;\n?"
)
_PARAMETERS = re.compile(r"\[\[kernel\]\] void \w+\(\n(.*?)\) \{\n", re.S)
_PARAMETER = re.compile(r"\s*(.*?)\s*(\w+) \[\[(\w+)(?:\(\d+\))?\]\]")
_SHARED = re.compile(r"(?m)^(\s*)threadgroup (\w+) (\w+)\[(.*)\];")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function: ``const device float* x [[buffer(0)]]``."""

    type: str
    name: str
    attribute: str

    @property
    def is_buffer(self) -> bool:
        return self.attribute == "buffer"

    @property
    def is_output(self) -> bool:
        return self.is_buffer and "const" not in self.type


def generated_source(kernel: Callable[..., Any], inputs: Sequence[mx.array], **call: Any) -> str:
    """What MLX would hand to Metal's compiler for ``kernel(inputs=inputs, **call)``.

    Exporting a function traces the call and stores the source, which needs no Metal.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.mlxfn"
        mx.export_function(
            str(path), lambda *arrays: tuple(kernel(inputs=list(arrays), **call)), *inputs
        )
        data = path.read_bytes()
    # A string is stored as its length in eight bytes and its text.
    for start in range(8, len(data)):
        length = int.from_bytes(data[start - 8 : start], "little")
        text = data[start : start + length]
        whole = length == len(text) and b"\0" not in text and text.endswith(b";\n")
        if whole and b"[[kernel]]" in text:
            return text.decode()
    raise AssertionError("the traced function holds no Metal source")


def parameters_of(source: str) -> list[Parameter]:
    """The parameters of the generated function, in order."""
    listed = _PARAMETERS.search(source)
    assert listed, source[:400]
    return [
        Parameter(*_PARAMETER.fullmatch(text).groups())  # type: ignore[union-attr]
        for text in listed.group(1).split(",\n")
    ]


def host_program(sources: Sequence[str], address_spaces: bool = False) -> str:
    """One C++ file in which every source is a namespace with an entry point ``run_<index>``."""
    return '#include "metal_shim.h"\n' + "".join(
        _host_kernel(index, source, address_spaces) for index, source in enumerate(sources)
    )


def _host_kernel(index: int, source: str, address_spaces: bool) -> str:
    instantiated = _INSTANTIATION.search(source)
    assert instantiated, source[-400:]
    body = source[: instantiated.start()]
    # A host function has no storage that the threads of a group share, except static.
    if address_spaces:
        body = _SHARED.sub(r"\1static threadgroup \2 \3[\4];", body)
    else:
        body = _SHARED.sub(r"\1static shim::Shared<\2, (\4)> \3;", body)
    arguments, buffer = [], 0
    for parameter in parameters_of(source):
        if not parameter.is_buffer:
            arguments.append(f"position.{parameter.name}")
            continue
        if parameter.type.endswith("&"):
            pointed = parameter.type[:-1].strip()
            arguments.append(f"*({pointed}*)(buffers[{buffer}])")
        else:
            arguments.append(f"({parameter.type})(buffers[{buffer}])")
        buffer += 1
    # Without a name: the loader would share the static arrays of kernels of the same name.
    return f"""
namespace {{ namespace kernel_{index} {{
#line 1 "kernel_{index}.metal"
{body}
static void thread_body(void** buffers, const shim::Position& position) {{
    {instantiated.group(1)}({", ".join(arguments)});
}}
}} }}
extern "C" int run_{index}(void** buffers, const uint* grid, const uint* group, uint seed,
                           char* message, void** fault) {{
    return shim::run(kernel_{index}::thread_body, buffers, grid, group, seed, message, fault);
}}
"""
