"""The machines of a simulated cluster: production nodes and a production coordinator.

A machine's state directory is real (shared memory). When its process is killed the directory is
copied as it is in that moment, and the next life begins with the copy: nothing that the dead one
leaves behind can change it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from sim.link import Channel
from sim.loop import Fuse, Killed, Process
from sim.net import Net

from vswap.coordinator.backends import Backends
from vswap.coordinator.balance import Policy
from vswap.coordinator.events import Now
from vswap.coordinator.runner import Runner
from vswap.coordinator.service import NodeLinkService, OperatorService, add_tier
from vswap.coordinator.store import Store
from vswap.node.control import Control
from vswap.node.departure import Departure
from vswap.node.device import Device
from vswap.node.pacer import Unpaced
from vswap.node.readahead import ReadAhead
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.tiers.backend import Backend
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import BackendRefused, TierUnavailable, VswapError

MIB = 2**20
SPACE, DISK, MAX_SLOTS = "s", "d", 4096
LEASE_S = 6.0

_WINGS = Path(__file__).parents[2]
_NODE, _TIERS = f"{_WINGS}/node/vswap/node/", f"{_WINGS}/tiers/vswap/tiers/"
_COORDINATOR = f"{_WINGS}/coordinator/vswap/coordinator/"
_PUBLISHING = ("log", "ledger", "handles", "reaper", "table", "evacuator", "recover", "spaces")


class Machine:
    """What starts, dies, and starts again with what lay in its directory."""

    code: tuple[str, ...] = ()
    """Where it may be killed."""
    publishing: tuple[str, ...] = ()
    """Where state is made to last: the lines where it matters most."""

    def __init__(self, name: str, root: Path, net: Net) -> None:
        self.name = name
        self.net = net
        self._root = root
        self.lives = 0
        self.process: Process | None = None
        self.directory = root / f"{name}-0"
        self.directory.mkdir(parents=True)
        self.killed_at: list[str] = []

    @property
    def up(self) -> Process | None:
        """Its process, if it runs."""
        return self.process if self.process is not None and self.process.alive else None

    def start(self) -> None:
        self.lives += 1
        process = self.process = Process(self.name)
        process.on_end.append(self._leave_directory)
        self.net.loop.start(process, self._run(process))

    def kill(self) -> None:
        if self.up is not None:
            self.killed_at.append("between turns")
            self.up.kill()

    def kill_soon(self, lines: int, *, publishing: bool) -> None:
        """Between two lines of its code."""
        if self.up is not None and self.up.fuse is None:
            self.up.fuse = Fuse(self.up, lines, self.publishing if publishing else self.code)

    def _leave_directory(self) -> None:
        """The moment of death: what the next life finds is this."""
        assert self.process is not None
        if self.process.fuse is not None and self.process.fuse.where:
            self.killed_at.append(self.process.fuse.where.rpartition(":")[0].rpartition("/")[2])
        fresh = self._root / f"{self.name}-{self.lives}"
        fresh.mkdir()
        for path in self.directory.iterdir():
            _copy(path, fresh / path.name)
            path.unlink()
        self.directory.rmdir()
        self.directory = fresh

    async def _run(self, process: Process) -> None:
        raise NotImplementedError


def _copy(source: Path, target: Path) -> None:
    """What is allocated of it; holes stay holes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        os.ftruncate(new.fileno(), size)
        position = 0
        while position < size:
            try:
                start = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError:
                return
            position = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), position - start, start), start)


class Node(Machine):
    """A node: shard and control link. Clients call :attr:`shard` while :attr:`ready`."""

    code = (_NODE, _TIERS)
    publishing = (*(f"{_NODE}{name}.py" for name in _PUBLISHING), f"{_TIERS}ram.py")

    def __init__(
        self, name: str, root: Path, net: Net, *, seed: int, tiers: list[TierSpec],
        make_backend: Callable[[TierSpec], Backend], coordinator: Coordinator, limits: Limits,
    ) -> None:  # fmt: skip
        super().__init__(name, root, net)
        self._limits = limits
        self._rng = random.Random(seed)
        self._tiers = tiers
        self._make_backend = make_backend
        self._coordinator = coordinator
        self.shard: Shard | None = None
        self.disk: Device | None = None
        """Of its space ``DISK``."""
        self.on_open: Callable[[Shard], None] = lambda shard: None
        self._control: Control | None = None
        self.departure: Departure | None = None
        self.retired = False
        """It died for good, or has left."""
        self.failed: str = ""
        """Why it could not start, though it should have."""

    @property
    def ready(self) -> Shard | None:
        return self.shard if self.up is not None else None

    @property
    def connected(self) -> bool:
        """To the coordinator."""
        return self.ready is not None and self._control is not None and self._control.connected

    def start(self) -> None:
        self.shard = None
        super().start()

    async def _run(self, process: Process) -> None:
        seams = Seams(
            clock=self.net.loop.time,
            rng=random.Random(self._rng.getrandbits(64)),
            threads=1,
            make_backend=self._make_backend,
            make_pacer=lambda rate: SlowPacer(rate) if rate else Unpaced(),
            new_uuid=lambda: UUID(int=self._rng.getrandbits(128), version=4),
        )
        try:
            shard = await self._open(seams)
            self.on_open(shard)
            for name in (SPACE, DISK):
                shard.spaces.create(name, max_slots=MAX_SLOTS, limits=self._limits, exist_ok=True)
            disk = shard.spaces.get(DISK)
            ahead = ReadAhead(shard.pager, shard.handles, shard.tiers, disk, Counter())
            self.disk = Device(shard.pager, shard.promoter, ahead, disk)
            control = self._control = Control(
                shard, name=self.name, address=f"{self.name}:1", coordinator="coordinator",
                rng=random.Random(self._rng.getrandbits(64)),
                make_channel=lambda _: Channel(self.net, self._coordinator.listening),  # type: ignore[arg-type,return-value]
            )  # fmt: skip
            departure = self.departure = Departure(shard, done=self._leave)
            departure.control = control
        except (Killed, asyncio.CancelledError):
            raise
        except BaseException as error:
            self.failed = f"{self.name} does not start: {error!r}"
            raise
        self.shard = shard
        await control.run()

    def _leave(self) -> None:
        self.retired = True
        self.kill()

    async def _open(self, seams: Seams) -> Shard:
        """As an init system would: again until the node's own tiers can be opened."""
        while True:
            try:
                return await Shard.open(
                    self.directory, self._tiers, seams=seams, exclusive_timeout_s=10.0
                )
            except (TierUnavailable, BackendRefused):
                await asyncio.sleep(1.0)


class SlowPacer:
    """Virtual time for a rate."""

    def __init__(self, rate_bytes_s: int) -> None:
        self._rate = rate_bytes_s

    async def take(self, amount_bytes: int) -> None:
        await asyncio.sleep(amount_bytes / self._rate)


class Coordinator(Machine):
    """The coordinator: store, runner, services."""

    code = (_COORDINATOR,)
    publishing = (f"{_COORDINATOR}runner.py", f"{_COORDINATOR}store.py", f"{_COORDINATOR}turn.py")

    def __init__(
        self, root: Path, net: Net, *, seed: int, tiers: list[TierSpec],
        make_backend: Callable[[TierSpec], Backend], policy: Policy,
    ) -> None:  # fmt: skip
        super().__init__("coordinator", root, net)
        self._rng = random.Random(seed)
        self.tiers = {spec.name: spec for spec in tiers}
        """What its configuration file says."""
        self._make_backend = make_backend
        self._policy = policy
        self._uuid = str(UUID(int=self._rng.getrandbits(128), version=4))
        self.wall_s = 1.7e9
        """What its wall clock is ahead; jumps."""
        self.runner: Runner | None = None
        self._link: NodeLinkService | None = None
        self.operator: OperatorService | None = None
        self.failed = ""

    def listening(self) -> tuple[Process, NodeLinkService] | None:
        if self.up is None or self._link is None:
            return None
        return self.up, self._link

    def start(self) -> None:
        self.runner = self._link = self.operator = None
        super().start()

    async def _run(self, process: Process) -> None:
        loop = self.net.loop
        try:
            store = Store.open(self.directory / "state.jsonl", self._uuid)
            runner = Runner(
                store,
                Backends(self._make_backend),
                clock=lambda: Now(loop.time(), loop.time() + self.wall_s),
                new_id=lambda: f"{self._rng.getrandbits(24):06x}",
                lease_s=LEASE_S,
                policy=self._policy,
            )
        except (Killed, asyncio.CancelledError):
            raise
        except BaseException as error:
            self.failed = f"the coordinator does not start: {error!r}"
            raise
        self.runner, self._link = runner, NodeLinkService(runner)
        self.operator = OperatorService(runner)
        ticking = loop.create_task(runner.run())
        for spec in list(self.tiers.values()):
            while spec.name in self.tiers and spec.name not in runner.state.tiers:
                try:
                    await add_tier(runner, spec)
                except VswapError:
                    await asyncio.sleep(1.0)
        await ticking


def clean(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
