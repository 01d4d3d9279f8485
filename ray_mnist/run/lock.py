"""The lock of a run folder: one run at a time writes there, whichever machine it was started on.

Object stores have no locks. So a run puts a claim into the folder, a file of its own, and only then looks for those of
others: of two runs that begin at once, at least one finds the other. A claim is renewed for as long as its run lives.
"""

import json
import os
import posixpath
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs

from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.folder import RunFolder

CLAIM = ".lock-"
RENEW_S = 10
LAST_WRITE_S = 20  # for a renewal that is under way as the run ends, which would leave the claim behind
DEAD_S = 60  # a claim that was not renewed for so long; no hiccup of a storage lasts that long


@contextmanager
def held(folder: RunFolder) -> Iterator[bool]:
    """Keeps other runs out of the folder for the time of the `with`; gives whether it was there before.

    Raises:
        RequestError: a run that is alive has the folder, or nothing can be written there.
    """
    existed = folder.exists()
    claim, ended = f"{CLAIM}{uuid.uuid4().hex}", threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # it may be renewed next time
                folder.write(claim, myself())

    renewing = threading.Thread(target=renew, daemon=True)
    with folder.empty_ones_removed():
        try:
            refuse_others(folder, claim)
            renewing.start()
            yield existed
        finally:
            ended.set()
            if renewing.is_alive():
                renewing.join(LAST_WRITE_S)
            with suppress(OSError):
                folder.fs.delete_file(folder.at(claim))


@contextmanager
def entered(folder: RunFolder, resume: bool, what: str = "run") -> Iterator[None]:
    """Keeps other runs out of a folder that is new or, to `resume`, has a run or whatever it is that goes on in it.

    Raises:
        RequestError: it is not so, or as for `held`.
    """
    with held(folder) as existed:
        if resume and not folder.has("config.yaml"):
            raise RequestError(f"--resume: there is no {what} in {folder} to go on with.")
        if not resume and existed:
            raise RequestError(f"The {what} folder {folder} exists: give --resume to go on with it, or another --name.")
        yield


def refuse_others(folder: RunFolder, claim: str) -> None:
    """Puts the claim into the folder, and removes those of runs that are dead.

    Raises:
        RequestError: another's is alive, or nothing can be written there.
    """
    try:
        folder.write(claim, myself())
        found = folder.fs.get_file_info(pyarrow.fs.FileSelector(folder.path))
    except OSError as error:
        raise RequestError(
            f"--storage-path {folder.storage_path} cannot be written to: {one_line(error)}; use another folder."
        ) from error
    claims = {posixpath.basename(info.path): info for info in found}
    for name in claims:
        if name.startswith(CLAIM) and name != claim:
            # Both by the clock of the storage: those of two machines may differ.
            refuse_living(folder, name, unrenewed_s=(claims[claim].mtime - claims[name].mtime).total_seconds())
            with suppress(OSError):
                folder.fs.delete_file(folder.at(name))


def in_use(folder: RunFolder) -> bool:
    """Whether a run that is alive has the folder, as far as the clock of this machine is right."""
    for info in folder.fs.get_file_info(pyarrow.fs.FileSelector(folder.path)):
        name = posixpath.basename(info.path)
        if name.startswith(CLAIM):
            try:
                refuse_living(folder, name, unrenewed_s=time.time() - info.mtime.timestamp())
            except RequestError:
                return True
    return False


def refuse_living(folder: RunFolder, name: str, unrenewed_s: float) -> None:
    """Raises RequestError if the run of another's claim, not renewed for so many seconds, is alive."""
    try:
        holder = json.loads(folder.read(name))
    except (FileNotFoundError, ValueError):  # it has just ended; its machine lost power as it wrote
        return
    here = holder["machine"] == machine()
    if (begun(holder["pid"]) == holder["begun"]) if here else unrenewed_s < DEAD_S:
        if_dead = "" if here else f" (if it died, try again in {DEAD_S - unrenewed_s:.0f} s)"
        raise RequestError(
            f"The folder {folder} is in use by process {holder['pid']} on {holder['host']}: wait until that has ended, "
            f"or end it{if_dead}, or give another --name."
        )


def myself() -> str:
    """What a claim says of this process."""
    pid = os.getpid()
    return json.dumps({"host": socket.gethostname(), "pid": pid, "begun": begun(pid), "machine": machine()})


def machine() -> str:
    """What tells whether a process id means the same here as there: since when the kernel runs, and its namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"not Linux: {uuid.uuid4().hex}"  # so that claims tell by their age alone


def begun(pid: int) -> str | None:
    """When the process began, since its id may be another's by and by; None if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
