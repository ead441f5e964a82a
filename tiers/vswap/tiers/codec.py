"""Codecs: how a page is encoded in a record.

The codec id is part of the record's format (4 bits of its header). A page whose encoding saves less
than a sixteenth is kept raw, and marked, so that nobody tries again.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lz4.block
import numpy as np
import zstandard

from vswap.tiers.backend import Buffer
from vswap.tiers.record import U8
from vswap.wire.errors import BadConfig, PageCorrupt

RAW = 0
"""Never tried."""
RAW_INCOMPRESSIBLE = 1
ZSTD = 2
LZ4 = 3

_thread = threading.local()
"""Compressors and decompressors must not be used by two threads at once."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A tier's way to encode pages. Thread-safe."""

    kind: int
    level: int = 0

    @classmethod
    def parse(cls, text: str) -> Codec:
        """``zstd:LEVEL`` (negative levels are faster), ``lz4`` or ``none``. Raises BadConfig."""
        if text == "none":
            return cls(RAW)
        if text == "lz4":
            return cls(LZ4)
        name, _, level = text.partition(":")
        try:
            number = int(level)
        except ValueError:
            number = zstandard.MAX_COMPRESSION_LEVEL + 1
        if name != "zstd" or not -(1 << 17) <= number <= zstandard.MAX_COMPRESSION_LEVEL:
            raise BadConfig(
                f"codec {text!r}: zstd:LEVEL (up to {zstandard.MAX_COMPRESSION_LEVEL}), lz4, none",
                key="codec",
            )
        return cls(ZSTD, number)

    @property
    def is_none(self) -> bool:
        return self.kind == RAW

    def encode(self, pages: U8) -> tuple[list[Buffer], U8]:
        """Encodes pages (n, page_bytes); returns the encodings and their codec ids (n,).

        Raw pages come back as views of ``pages``. The loop costs 0 to 5 % over bare zstandard.
        """
        n, page_bytes = pages.shape
        if self.kind == RAW:
            return [row.data for row in pages], np.zeros(n, np.uint8)
        encoded: list[Any] = list(map(self._compressor(), pages))
        ids = np.full(n, self.kind, np.uint8)
        most = page_bytes - page_bytes // 16
        if max(map(len, encoded), default=0) > most:
            for i, data in enumerate(encoded):
                if len(data) > most:
                    encoded[i], ids[i] = pages[i].data, RAW_INCOMPRESSIBLE
        return encoded, ids

    def _compressor(self) -> Callable[[Any], bytes]:
        if self.kind == LZ4:
            return _lz4_compress
        made = _thread.__dict__.setdefault("compressors", {})
        if self.level not in made:
            made[self.level] = zstandard.ZstdCompressor(
                level=self.level, write_checksum=False, write_content_size=False
            )
        compress: Callable[[Any], bytes] = made[self.level].compress
        return compress


def _lz4_compress(page: Any) -> bytes:
    compressed: bytes = lz4.block.compress(page, store_size=False)
    return compressed


def decode_many(ids: Sequence[int], encoded: Sequence[Buffer], page_bytes: int) -> list[Buffer]:
    """Decodes pages; the result has the same order, each of ``page_bytes``.

    Raw pages come back as the views they were given. Raises PageCorrupt for anything that does not
    decode to exactly a page, and allocates no more than that for it. Frames carry no size and no
    checksum: the page's size is known, and the record has a checksum over its encoded bytes.
    """
    if ids.count(ZSTD) == len(ids):
        return decode_zstd(encoded, page_bytes)
    decompress = _decompressor()
    try:
        _check_frames([data for i, data in zip(ids, encoded, strict=True) if i == ZSTD])
        pages = [
            decompress(data, page_bytes) if i == ZSTD
            else lz4.block.decompress(data, uncompressed_size=page_bytes) if i == LZ4
            else data
            for i, data in zip(ids, encoded, strict=True)
        ]  # fmt: skip
    except (zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise PageCorrupt(f"a page does not decode: {error}") from error
    if max(ids) > LZ4:
        raise PageCorrupt(f"a page has the unknown codec {max(ids)}")
    return _check_sizes(pages, page_bytes)


def decode_zstd(frames: Sequence[Buffer], page_bytes: int) -> list[Buffer]:
    """:func:`decode_many` of zstd frames only."""
    decompress = _decompressor()
    _check_frames(frames)
    try:
        pages: list[Buffer] = [decompress(data, page_bytes) for data in frames]
    except zstandard.ZstdError as error:
        raise PageCorrupt(f"a page does not decode: {error}") from error
    return _check_sizes(pages, page_bytes)


def _check_sizes(pages: list[Buffer], page_bytes: int) -> list[Buffer]:
    if set(map(len, pages)) - {page_bytes}:
        raise PageCorrupt(f"a page decodes to another size than {page_bytes} bytes")
    return pages


_DESCRIPTOR = operator.itemgetter(4)
"""Of a zstd frame, the byte that says which fields its header has."""


def _check_frames(frames: Sequence[Buffer]) -> None:
    """Raises PageCorrupt for a frame that states its size: the library would allocate that much,
    whatever we bound it to."""
    try:
        sized = max(map(_DESCRIPTOR, frames), default=0) >= 0x20
    except IndexError:
        sized = True  # No frame is as short as that.
    if sized:
        raise PageCorrupt("a page does not decode: not a frame of ours")


def decode(codec_id: int, encoded: Buffer, page_bytes: int) -> bytes:
    """One page; see :func:`decode_many`."""
    return bytes(decode_many([codec_id], [encoded], page_bytes)[0])


def _decompressor() -> Callable[[Buffer, int], bytes]:
    found: Callable[[Buffer, int], bytes] | None = getattr(_thread, "decompress", None)
    if found is None:
        found = _thread.decompress = zstandard.ZstdDecompressor().decompress
    return found
