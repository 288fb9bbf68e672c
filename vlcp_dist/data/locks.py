"""One holder at a time: a lock of the kernel on a file, a lease on an object store.

A lease is an object that its holder keeps renewing and that others may take once it is stale. Clocks of two machines
are never compared: that a holder lives is seen by its object changing while one looks on, and how long to look is
shortened by the object's age, which is the difference of two times of the store.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from upath import UPath

from vlcp_dist.data import objects
from vlcp_dist.errors import InputError

RENEW_EVERY = 20.0  # seconds
STALE_AFTER = 90.0
CONDITIONAL = ("s3", "s3a")  # stores whose file system passes on a put "if its ETag is still this"
# A file system without locks says so in one of these ways.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HOLDER = "process {pid} on {host} since {since}"


class Seen(NamedTuple):
    """A lease as it lies in the store. Its identity (ETag or the like) changes with every renewal."""

    identity: str
    record: dict[str, Any]

    def holder(self) -> str:
        try:
            return HOLDER.format_map(self.record)
        except KeyError:
            return "another process"


class FileLock:
    """A lock of the kernel: nobody takes it from a process that lives."""

    def lost(self) -> bool:
        return False


@contextlib.contextmanager
def hold_file(path: Path) -> Iterator[FileLock]:
    """Hold the lock on the file at `path` while the body runs; the kernel releases it however this process ends.

    Raises:
        InputError: another process holds it, it cannot be written, or the file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written to: {error.strerror}; choose another root") from error
    with opened as file:
        try:
            flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, path.parent)
        except BlockingIOError:
            holder = path.read_text().strip() or "another process"
            raise InputError(
                f"{path.parent} is in use by {holder}; wait for it, stop it, or choose another root"
            ) from None
        file.truncate(0)
        file.write(HOLDER.format_map(_this_process()) + "\n")
        file.flush()
        yield FileLock()


def flock(descriptor: int, how: int, folder: Path) -> None:
    """`fcntl.flock`, with a word on file systems in `folder` that do not have it.

    Raises:
        InputError: this one does not.
        BlockingIOError: another process has the lock, and `how` says not to wait.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise InputError(
            f"{folder}: this file system has no locks ({error.strerror}); mount it with them (Lustre: -o flock, "
            f"NFS: its lock daemon), or use a folder elsewhere or an object store"
        ) from error


@contextlib.contextmanager
def hold_lease(path: UPath, *, renew_every: float = RENEW_EVERY, stale_after: float = STALE_AFTER) -> Iterator["Lease"]:
    """Hold the lease at `path` while the body runs; `lost()` of what is yielded says whether it still does.

    Raises:
        InputError: another process holds it, or the store cannot be written to.
    """
    lease = Lease(path, renew_every, stale_after)
    try:
        lease.take()
    except InputError:
        raise
    except Exception as error:  # every store has its own kinds
        raise InputError(
            f"{path.parent} cannot be written to: {type(error).__name__}: {error}; "
            f"check the bucket, its region and your credentials, or choose another root"
        ) from error
    try:
        yield lease
    finally:
        lease.release()


class Lease:
    """The lease of this process."""

    def __init__(self, path: UPath, renew_every: float, stale_after: float):
        self._path, self._fs, self._name = path, path.fs, path.path
        self._renew_every, self._stale_after = renew_every, stale_after
        # A count of renewals, because equal bytes would have equal ETags.
        self._record: dict[str, Any] = {**_this_process(), "renewed": 0, "nonce": uuid.uuid4().hex}
        self._identity = ""
        self._confirmed = 0.0  # when the request was sent that last made or renewed it
        self._taken = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {path}", daemon=True)

    def lost(self) -> bool:
        """Whether others may be holding it. A holder stops trusting its lease well before they may take it."""
        return self._taken or time.monotonic() - self._confirmed > self._stale_after * 2 / 3

    def take(self) -> None:
        """Take it: at once if there is none or one gone stale, else after watching that nobody renews it.

        Raises:
            InputError: another process holds it.
        """
        while True:
            seen = self._look()
            if seen is None:
                if self._put(None):
                    break
            elif self._abandoned(seen) and self._put(seen.identity):
                print(f"{self._path}: taken over from {seen.holder()}, which is gone", file=sys.stderr)
                break
        self._thread.start()

    def release(self) -> None:
        """Delete it if it is still this process's."""
        self._released.set()
        self._thread.join()
        try:
            seen = None if self.lost() else self._look()
            if seen is not None and self._ours(seen):
                self._fs.rm_file(self._name)
        except Exception as error:  # the work is done, and the lease goes stale by itself
            print(f"{self._path}: not released: {type(error).__name__}: {error}", file=sys.stderr)

    def _abandoned(self, seen: Seen) -> bool:
        """Look on until it has not been renewed for too long (true) or is gone (false).

        Raises:
            InputError: it was renewed: its holder lives.
        """
        left = self._stale_after - self._age()
        if left > 0:
            print(
                f"{self._path}: held by {seen.holder()}; looking for up to {left:.0f} s whether that still runs",
                file=sys.stderr,
            )
        end = time.monotonic() + left
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._renew_every / 4))
            now = self._look()
            if now is None:
                return False
            if now.identity != seen.identity:
                raise InputError(
                    f"{self._path.parent} is in use by {now.holder()}, which has just renewed its lease; "
                    f"wait for it, stop it, or choose another root"
                )
        return True

    def _age(self) -> float:
        """Seconds since it was last renewed, at least, by the store's clock: a second object tells what that shows."""
        probe = f"{self._name}.{self._record['nonce']}"
        self._fs.pipe_file(probe, b"")
        try:
            age = self._fs.modified(probe) - self._fs.modified(self._name)
        except FileNotFoundError:
            return 0.0
        finally:
            self._fs.rm_file(probe)
        return max(0.0, age.total_seconds() - 1)  # stores give whole seconds

    def _keep(self) -> None:
        while not self._released.wait(self._renew_every):
            self._record["renewed"] += 1
            try:
                if not self._put(self._identity):
                    break
            except Exception as error:  # of the store or the network: it may work the next time
                print(f"{self._path}: not renewed: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            return
        self._taken = True
        print(f"{self._path}: this lease was taken by another process or deleted; stopping", file=sys.stderr)

    def _put(self, expected: str | None) -> bool:
        """Put it if what lies there is still of identity `expected` (None: nothing). Whether it is now ours."""
        conditional = expected is None or self._path.protocol in CONDITIONAL
        if not conditional and _identity_of(self._look()) != expected:
            return False
        condition = {"mode": "create"} if expected is None else {"IfMatch": expected} if conditional else {}
        sent, failure = time.monotonic(), None
        try:
            self._fs.pipe_file(self._name, json.dumps(self._record).encode(), **condition)
        except Exception as error:
            failure = error
        if not conditional:
            # Another may have looked in the same moment. The later put stands; after a pause all see whose that was.
            time.sleep(min(2.0, self._renew_every / 4))
        seen = self._look()
        # What lies there decides, not the answer: an answer that got lost makes botocore put again, and that one fails.
        if seen is not None and self._ours(seen):
            self._identity = seen.identity
            if failure is not None and seen.record["renewed"] != self._record["renewed"]:
                raise failure
            self._confirmed = sent
            return True
        if failure is not None and not isinstance(failure, FileExistsError) and _identity_of(seen) == expected:
            raise failure
        return False

    def _look(self) -> Seen | None:
        try:
            info = self._fs.info(self._name)
            content = objects.get(self._path)
        except FileNotFoundError:
            return None
        try:
            record = json.loads(content)
        except ValueError:
            record = {}
        return Seen(objects.identity(info), record if isinstance(record, dict) else {})

    def _ours(self, seen: Seen) -> bool:
        return bool(seen.record.get("nonce") == self._record["nonce"])


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def _identity_of(seen: Seen | None) -> str | None:
    return None if seen is None else seen.identity
