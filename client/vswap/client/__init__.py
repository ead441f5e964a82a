"""The Python SDK of vswap: store pages at a node and get them back by the same slot numbers.

>>> from vswap.client import Client
>>> with Client("127.0.0.1:7171") as client:
...     space = client.space("default")
...     space.store([1, 2], pages)        # ndarray (2, page_bytes) of uint8, or bytes
...     space.load([2, 1])                # ndarray (2, page_bytes)

`Client` is synchronous and thread-safe, `AsyncClient` is its asyncio twin with the same calls,
`Operator` speaks to the coordinator. Every error is one of `vswap.wire.errors`.
"""

from vswap.client.aio import AsyncClient, AsyncExclusiveLoad, AsyncSpace
from vswap.client.operator import Operator
from vswap.client.sync import Client, ExclusiveLoad, Space

__all__ = [
    "AsyncClient",
    "AsyncExclusiveLoad",
    "AsyncSpace",
    "Client",
    "ExclusiveLoad",
    "Operator",
    "Space",
]
