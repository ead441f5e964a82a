"""Encoding and decoding in bulk: small batches on the event loop, large ones in worker threads."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

from vswap.tiers.backend import Buffer
from vswap.tiers.codec import RAW, Codec, decode_many
from vswap.tiers.record import (
    U8,
    U32,
    U64,
    Mask,
    Records,
    concatenate,
    meta_codec,
    meta_page_bytes,
    meta_sequence,
    pack,
)

T = TypeVar("T")

_TURN_PAGES = 32
"""Pages that are encoded or decoded in one turn of the loop: about 0.4 ms."""
_SPLIT_PAGES = 128
_SHIFT_MASK = np.uint64(31)


class Codecs:
    """Runs codecs of pages on an executor. zstandard and lz4 release the GIL per page."""

    def __init__(self, executor: Executor, threads: int) -> None:
        self._executor = executor
        self._threads = threads

    async def encode(
        self, codec: Codec, pages: U8, *, space: U32, slot: U32, sequence: U64, page_shift: U64
    ) -> Records:
        """Records of pages (n, page_bytes); the columns have shape (n,)."""

        def work(part: slice) -> Records:
            encoded, ids = codec.encode(pages[part])
            return pack(
                encoded, ids, space=space[part], slot=slot[part], sequence=sequence[part],
                page_shift=page_shift[part],
            )  # fmt: skip

        if codec.is_none:
            return work(slice(0, len(pages)))
        return concatenate(await self._spread(work, len(pages)))

    async def decode(self, records: Records, page_bytes: int) -> tuple[Mask, list[Buffer]]:
        """Verifies and decodes; a page whose record fails its check comes back empty."""

        def work(part: slice) -> tuple[Mask, list[Buffer]]:
            return _decode(records.take(part), page_bytes)

        if _all_raw(records):
            return work(slice(0, len(records)))
        parts = await self._spread(work, len(records))
        return np.concatenate([ok for ok, _ in parts]), [p for _, pages in parts for p in pages]

    async def transcode(self, records: Records, codec: Codec) -> Records:
        """What a destination's codec asks for: raw pages are compressed for a codec that
        compresses, compressed ones decoded for a tier of plain pages; all others stay as they are.

        The records are known to be valid. Order, sequence and identity are kept.
        """
        ids = meta_codec(records.meta)
        change = (ids > 1) if codec.is_none else (ids == RAW)
        if not change.any():
            return records
        index = [np.flatnonzero(~change)]
        parts = [records.take(index[0])]
        sizes = meta_page_bytes(records.meta)
        for page_bytes in np.unique(sizes[change]).tolist():
            index.append(np.flatnonzero(change & (sizes == page_bytes)))
            some = records.take(index[-1])
            _, pages = await self.decode(some, page_bytes)
            encoded = await self.encode(
                codec,
                np.frombuffer(b"".join(pages), np.uint8).reshape(-1, page_bytes),
                space=some.space,
                slot=some.slot,
                sequence=meta_sequence(some.meta),
                page_shift=some.meta & _SHIFT_MASK,
            )
            parts.append(encoded)
        return concatenate(parts).take(np.argsort(np.concatenate(index), kind="stable"))

    async def _spread(self, work: Callable[[slice], T], count: int) -> list[T]:
        """Runs ``work`` over slices of ``range(count)``, in order: in the worker threads, or, where
        that gains no parallelism, here, a turn of the loop at a time.

        One thread beside the loop is slower than the loop itself, and no kinder to its neighbours:
        handing over and fighting for the interpreter cost 0.3 ms.
        """
        pieces = min(self._threads, -(-count // _SPLIT_PAGES))
        if pieces < 2:
            parts = [work(slice(0, min(count, _TURN_PAGES)))]
            for start in range(_TURN_PAGES, count, _TURN_PAGES):
                await asyncio.sleep(0)
                parts.append(work(slice(start, min(count, start + _TURN_PAGES))))
            return parts
        bounds = [count * i // pieces for i in range(pieces + 1)]
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                loop.run_in_executor(self._executor, work, slice(a, b))
                for a, b in itertools.pairwise(bounds)
            )
        )


def _all_raw(records: Records) -> bool:
    return bool((meta_codec(records.meta) <= 1).all())


def _decode(records: Records, page_bytes: int) -> tuple[Mask, list[Buffer]]:
    encoded = records.encoded()
    ok = records.valid(encoded) & (meta_page_bytes(records.meta) == page_bytes)
    pages: list[Buffer]
    ids: Sequence[int] = meta_codec(records.meta).tolist()
    if ok.all():
        return ok, decode_many(ids, encoded, page_bytes)
    good = np.flatnonzero(ok).tolist()
    decoded = decode_many([ids[i] for i in good], [encoded[i] for i in good], page_bytes)
    pages = [b""] * len(records)
    for i, page in zip(good, decoded, strict=True):
        pages[i] = page
    return ok, pages
