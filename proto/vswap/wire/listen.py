"""Where a daemon listens, and what it may listen on; its state directory and the lock on it."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import stat
from pathlib import Path

from vswap.wire.errors import BadConfig, StateInUse, StateInvalid


def check_listen(address: str, *, insecure: bool) -> None:
    """Loopback and unix sockets only, as long as there is no TLS. Raises BadConfig."""
    if address.startswith("unix:"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise BadConfig(f"listen address {address!r}: say HOST:PORT or unix:/path", key="listen")
    bare = host.strip("[]")
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


class StateDirectory:
    """A process's own directory, mode 0700, locked while the process lives.

    The kernel drops the lock when the process dies, however it dies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def lock(self) -> None:
        """Makes and locks it. Raises StateInUse (naming the holder's pid) or StateInvalid."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            info = self.path.stat()
            if info.st_uid != os.geteuid():
                raise StateInvalid(f"{self.path} belongs to another user", path=str(self.path))
            if stat.S_IMODE(info.st_mode) & 0o077:
                self.path.chmod(0o700)
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
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())

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
