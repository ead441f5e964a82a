"""Where a daemon listens, and what it may listen on; its state directory and the lock on it."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import stat
from pathlib import Path

import grpc

from vswap.wire.errors import BadConfig, StateInUse, StateInvalid

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` has 108 bytes, with the zero at the end."""


def check_address(address: str) -> str:
    """The address if it reads as ``HOST:PORT`` or ``unix:/path``; BadConfig if not."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise BadConfig(f"address {address!r}: a unix socket needs a full path", key="listen")
        return address
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or not host:
        raise BadConfig(f"address {address!r}: say HOST:PORT or unix:/path", key="listen")
    return address


def check_listen(address: str, *, insecure: bool) -> None:
    """Loopback and unix sockets only, as long as there is no TLS. Raises BadConfig."""
    if check_address(address).startswith("unix:"):
        return
    bare = address.rpartition(":")[0].strip("[]")
    try:
        local = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        local = bare == "localhost"
    if not local and not insecure:
        raise BadConfig(
            f"listen address {address!r} is reachable from other machines, and there is no TLS "
            "yet: listen on loopback or unix:/path, or accept that with --insecure",
            key="listen",
        )


def bind(server: grpc.aio.Server, address: str) -> str:
    """Binds a server to its address; returns it with the port that port 0 became.

    Raises BadConfig where it cannot be had. gRPC itself would take a unix socket away from the
    process that listens on it.
    """
    try:
        check_free(address)
        port = server.add_insecure_port(address)
    except OSError as error:
        raise BadConfig(f"cannot listen on {address}: {error.strerror}", key="listen") from error
    except RuntimeError as error:
        raise BadConfig(f"cannot listen on {address}: {error}", key="listen") from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def check_free(address: str) -> None:
    """Raises OSError with the reason why nothing can listen there.

    What is in the way of a unix socket is removed by who binds it: so that must be a socket.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                if not Path(path).parent.is_dir():
                    raise
                return  # Nobody there, or the socket of a process that died.
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # A port whose last connections still linger is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


class StateDirectory:
    """A process's own directory, mode 0700, locked while the process lives.

    The kernel drops the lock when the process dies, however it dies. A directory with other
    people's files is refused, since a daemon removes what earlier lives left behind; one that
    holds nothing but the file called ``backup`` is taken.
    """

    def __init__(self, path: Path, backup: str = "") -> None:
        self.path = path
        self._backup = backup
        self._fd = -1

    def lock(self) -> None:
        """Makes and locks it. Raises StateInUse (naming the holder's pid) or StateInvalid."""
        try:
            self._make()
            self._fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateInvalid(
                f"state directory {self.path} is not usable: {error.strerror}", path=str(self.path)
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            self._fd = -1
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise StateInUse(
                f"state directory {self.path} belongs to a running process (pid {pid})",
                path=str(self.path), pid=pid,
            ) from error  # fmt: skip
        try:
            os.ftruncate(self._fd, 0)
            os.write(self._fd, str(os.getpid()).encode())
        except OSError as error:
            self.unlock()
            raise StateInvalid(
                f"state directory {self.path} cannot be written: {error.strerror}",
                path=str(self.path),
            ) from error

    def _make(self) -> None:
        for missing in reversed([p for p in (self.path, *self.path.parents) if not p.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        # Who owns the directory above could put another one in our place: /dev/shm is everybody's.
        for directory, owners in (
            (self.path.parent, (0, os.geteuid())),
            (self.path, (os.geteuid(),)),
        ):
            if directory.stat().st_uid not in owners:
                raise StateInvalid(f"{directory} belongs to another user", path=str(self.path))
        held = {file.name for file in self.path.iterdir()}
        if "lock" not in held and held - {self._backup}:
            raise StateInvalid(
                f"{self.path} holds files that are not vswap's: name an empty directory or one "
                "that does not exist yet",
                path=str(self.path),
            )
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            self.path.chmod(0o700)

    def write_address(self, address: str) -> None:
        """Tells where the process listens, in the file ``address``."""
        temporary = self.path / "address.new"
        temporary.write_text(address + "\n")
        temporary.replace(self.path / "address")

    def unlock(self) -> None:
        if self._fd >= 0:
            (self.path / "address").unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def runtime_directory(name: str, environ: os._Environ[str] | dict[str, str]) -> Path:
    """Where state lives that need not outlive the host: shared memory."""
    base = environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():
        return Path(base) / "vswap" / name
    return Path(f"/dev/shm/vswap-{os.geteuid()}") / name
