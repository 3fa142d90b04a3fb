"""Memory between two pages that nothing may touch."""

import ctypes
import mmap

import numpy as np

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)


class GuardedArray:
    """A copy of ``values`` that starts right after, or ends right before, a forbidden page."""

    def __init__(self, name: str, values: np.ndarray, at_end: bool):
        values = np.ascontiguousarray(values)
        self.name = name
        self._shape, self._dtype, self._bytes = values.shape, values.dtype, values.nbytes
        inner = -(-values.nbytes // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, inner + 2 * _PAGE)
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._size = inner + 2 * _PAGE
        for page in (self._first, self._first + _PAGE + inner):
            if _LIBC.mprotect(ctypes.c_void_p(page), _PAGE, _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = self._first + _PAGE + (inner - values.nbytes if at_end else 0)
        ctypes.memmove(self.address, values.ctypes.data, values.nbytes)

    def values(self) -> np.ndarray:
        """A copy of what the memory holds now."""
        data = ctypes.string_at(self.address, self._bytes)
        return np.frombuffer(data, self._dtype).reshape(self._shape).copy()

    def surrounds(self, address: int) -> bool:
        """Whether ``address`` lies in this memory or in one of its two guard pages."""
        return self._first <= address < self._first + self._size

    def describe(self, address: int) -> str:
        """Where ``address`` is, seen from the array: ``weight[+3]`` is past its end."""
        offset = address - self.address
        past = offset - self._bytes
        where = f"{past} bytes past the end" if past >= 0 else f"{-offset} bytes before the start"
        return f"{where} of {self.name}"
