"""A TCP proxy that a test can break: partitions between processes, without root."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType

UP, DOWN = "up", "down"
"""Directions: from the client to the server, and back."""


class Proxy:
    """Listens on a loopback port and forwards to ``target`` (host:port), from a thread of its own.

    ``hang`` swallows what flows in the given directions: no byte passes, nothing is closed. What
    was swallowed is lost, as after a partition, so :meth:`heal` cuts connections that lost bytes.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._pipes: dict[asyncio.Task[None], bool] = {}
        self._hanging: frozenset[str] = frozenset()
        self._delay_s = 0.0
        self._refusing = False
        self._cut_after: int | None = None
        self.accepted = 0
        self.address = ""

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, work: Callable[[], object]) -> None:
        async def run() -> None:
            result = work()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # ---------------------------------------------------------------- what a test does

    def hang(self, *directions: str) -> None:
        """Swallows all bytes (of both directions, if none is named), and keeps connections open."""
        self._hanging = frozenset(directions or (UP, DOWN))

    def delay(self, seconds: float) -> None:
        """Every piece waits before it is passed on."""
        self._delay_s = seconds

    def refuse(self) -> None:
        """Closes what is open and takes no more: a server that is gone."""
        self._refusing = True
        self.cut()

    def cut(self, *, after_bytes: int | None = None) -> None:
        """Resets all connections; ``after_bytes``: each once so many more bytes came back."""
        if after_bytes is not None:
            self._cut_after = after_bytes
            return

        async def cancel() -> None:
            tasks = list(self._pipes)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(cancel)

    def heal(self) -> None:
        """Everything passes again; connections that lost bytes are reset."""
        lossy, self._hanging = bool(self._hanging), frozenset()
        self._delay_s, self._refusing, self._cut_after = 0.0, False, None
        if lossy:
            self.cut()

    # ---------------------------------------------------------------- forwarding

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        self._pipes[task] = True
        ends = [writer]
        try:
            if self._refusing:
                return
            to_server = await asyncio.open_connection(*self._target)
            ends.append(to_server[1])
            ways = [
                asyncio.ensure_future(self._pump(UP, reader, to_server[1])),
                asyncio.ensure_future(self._pump(DOWN, to_server[0], writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
        except (OSError, asyncio.CancelledError):
            return
        finally:
            del self._pipes[task]
            for end in ends:
                end.transport.abort()

    async def _pump(
        self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        lossy = False
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if way in self._hanging:
                    lossy = True
                    continue
                if lossy:
                    return  # Nothing may follow a gap: healed, and not cut yet.
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                left = self._cut_after if way == DOWN else None
                if left is not None:
                    data = data[:left]
                    self._cut_after = left - len(data)
                sink.write(data)
                await sink.drain()
                if left is not None and len(data) == left:
                    return
