"""Numbers the way a person reads them."""


def gigabytes(count: float) -> str:
    """Bytes as ``6.59 GB``, ``840 MB``, ``12 kB`` or ``90 bytes``; GB are 10^9 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            digits = 2 if count < 10 * size else 0
            return f"{count / size:.{digits}f} {unit}"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as ``8 s``, ``3 min 05 s`` or ``2 h 14 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: float) -> str:
    """A count with separators, from a million on as ``1.2 M`` and ``1.2 B``."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,.0f}"
