"""Sizes, durations and counts as people write and read them."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _BYTES[_letter] = _BYTES[_letter + "ib"] = 1024**_power
    _BYTES[_letter + "b"] = 1000**_power
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of "4096", "256MiB", "1G" (both powers of 1024) or "1GB" (power of 1000).

    Raises ValueError with a line for people.
    """
    match = _NUMBER.match(text)
    if match is not None and match[2].lower() in _BYTES:
        return int(float(match[1]) * _BYTES[match[2].lower()])
    raise ValueError(f"not a size: {text!r} (like 4096, 256MiB, 1G, 1GB)")


def parse_rate(text: str) -> int:
    """Bytes a second of "50MiB" or "50MiB/s"."""
    return parse_size(text.strip().removesuffix("/s"))


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "10m", "2h", "1d" or "500ms"."""
    match = _NUMBER.match(text)
    if match is None or match[2].lower() not in _SECONDS:
        raise ValueError(f"not a duration: {text!r} (like 90s, 10m, 2h, 1d)")
    return float(match[1]) * _SECONDS[match[2].lower()]


def size(count: float) -> str:
    """Bytes for people: "0 B", "1.5 GiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    step = 0
    while abs(count) >= 1023.5 and step < len(units) - 1:
        count /= 1024
        step += 1
    digits = 0 if step == 0 or abs(count) >= 99.95 else 1
    return f"{count:.{digits}f} {units[step]}"


def rate(bytes_s: float) -> str:
    return f"{size(bytes_s)}/s"


def duration(seconds: float) -> str:
    """Seconds for people: "0.4 s", "42 s", "3m 07s", "2h 05m"; "?" where unknown (< 0)."""
    if seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"


def count(number: int) -> str:
    """A count with thousands apart: "262,144"."""
    return f"{number:,}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def micros(us: float) -> str:
    """Microseconds for people: "840 us", "12.3 ms", "1.2 s"."""
    if us < 1000:
        return f"{us:.0f} us"
    return f"{us / 1000:.1f} ms" if us < 1_000_000 else f"{us / 1_000_000:.1f} s"
