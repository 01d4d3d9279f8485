"""Fetches the files of a data set, once for all processes that ask at the same time.

torchvision knows the mirrors and md5 sums, and does the download itself; the waiting is bounded here.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stderr, redirect_stdout, suppress
from http.client import HTTPException
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from filelock import FileLock, Timeout
from torchvision.datasets import MNIST
from torchvision.datasets.utils import download_and_extract_archive

from ray_mnist.data.sources import Source, source_of
from ray_mnist.errors import RequestError

MIRROR_SECONDS = 5.0  # the longest silence of a mirror, before its first answer and during a transfer
LOCK_SECONDS = 900.0  # the longest wait for another process that is fetching the same data set
LOCK_NOTICE_SECONDS = 5.0  # a wait for it that is longer than this is announced

logger = logging.getLogger(__name__)


def prepare(dataset: str, data_dir: Path, mirror: str | None = None) -> None:
    """Make sure that the files of `dataset` are in `data_dir`, downloading them if they are not.

    Files already there are used as they are, without network or write permission. Any number of
    processes, on any number of nodes that share `data_dir`, may call this at once: one of them fetches.

    `mirror` is a base URL that takes the place of torchvision's own mirrors. Raises RequestError if it is
    not an http(s) URL, if no mirror delivers, or if `data_dir` cannot be written.
    """
    source = source_of(dataset)
    mirrors = None if mirror is None else [_base_url(mirror)]
    if source.find(data_dir):
        return
    try:
        with _alone(dataset, data_dir):
            if not source.find(data_dir):
                _fetch(dataset, source, data_dir, mirrors)
    except OSError as error:
        raise RequestError(
            f"{dataset} is not in {data_dir} and cannot be put there ({error.strerror or error}): make that "
            "folder writable or name another one with --data.data_dir DIR."
        ) from error


def _base_url(mirror: str) -> str:
    """`mirror` with exactly one slash at its end. Raises RequestError if it is not an http(s) URL."""
    try:
        parts = urlsplit(mirror)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or brackets that are no IPv6 address
        usable = False
    if not usable or parts.query or parts.fragment or any(c.isspace() for c in mirror):
        raise RequestError(
            f"The mirror {mirror!r} is not an http:// or https:// URL of a folder: write --data.mirror "
            "http://HOST/FOLDER/, or name a folder of this machine with --data.data_dir DIR."
        )
    return mirror.rstrip("/") + "/"


def _alone(dataset: str, data_dir: Path) -> AbstractContextManager[Any]:
    """The lock of `dataset` in `data_dir`, held until the `with` ends or the system finds its holder dead.

    Raises RequestError after LOCK_SECONDS, OSError if `data_dir` cannot be written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / f".{dataset}.lock")
    with suppress(Timeout):
        return lock.acquire(timeout=LOCK_NOTICE_SECONDS)
    holder = f"another process that is fetching {dataset} (it holds {lock.lock_file})"
    logger.warning("Waiting up to %g s for %s.", LOCK_SECONDS, holder)
    try:
        return lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RequestError(
            f"Waited {LOCK_SECONDS:g} s in vain for {holder}: end it, or name another folder with --data.data_dir DIR."
        ) from error


def _fetch(dataset: str, source: Source, data_dir: Path, mirrors: Sequence[str] | None) -> None:
    """Download `dataset` from the first mirror that delivers all of it intact.

    The files take their places complete and one at a time, so a process killed in between leaves fewer
    files than `Source.find` asks for, and never half of one. Needs the lock: it removes what killed
    processes left. Raises RequestError if no mirror delivers, OSError if `data_dir` cannot be written.
    """
    home = data_dir / source.folders[0]
    published_mirrors, archives = _published(source.published)
    failures = []
    for leftover in data_dir.glob(f".{dataset}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for mirror in mirrors or published_mirrors:
        with TemporaryDirectory(dir=data_dir, prefix=f".{dataset}-") as temporary:
            logger.info("Downloading %s from %s into %s.", dataset, mirror, home)
            try:
                _download(mirror, archives, temporary)
            except (OSError, HTTPException, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{mirror} ({reason.rstrip('.')})")
                continue
            home.mkdir(parents=True, exist_ok=True)
            for name in source.files:
                os.replace(next(Path(temporary).rglob(name)), home / name)
            return
    raise RequestError(
        f"{dataset} could not be downloaded from {' or '.join(failures)}: name a mirror with --data.mirror "
        f"URL, put the files in {home} or name the folder they are in with --data.data_dir DIR, or take "
        "--dataset digits, which needs no network."
    )


def _published(publisher: Any) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """The base URLs that torchvision knows for one of its data sets, and the (name, md5) of each archive there."""
    if issubclass(publisher, MNIST):
        return publisher.mirrors, publisher.resources
    return [publisher.url.removesuffix(publisher.filename)], [(publisher.filename, publisher.tgz_md5)]


def _download(mirror: str, archives: Sequence[tuple[str, str]], folder: str) -> None:
    """Download, check and extract `archives` into `folder`, quietly.

    Raises OSError, HTTPException, RuntimeError or ValueError, as urllib and torchvision do.
    """
    _await_answer(mirror + archives[0][0])
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_SECONDS)  # torchvision calls urllib without one
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for name, md5 in archives:
                download_and_extract_archive(mirror + name, folder, filename=name, md5=md5, remove_finished=True)
    finally:
        socket.setdefaulttimeout(before)


def _await_answer(url: str) -> None:
    """Raise TimeoutError unless the server answers, be it with an error, within MIRROR_SECONDS.

    A socket's own time-out does not cover the look-up of the name, and starts anew for each address.
    """
    answered = Event()

    def ask() -> None:
        # What goes wrong here at once goes wrong again in the download, which reports it. The socket gets
        # more time than the wait below, so that silence is reported by that, and only once.
        with suppress(Exception):
            urlopen(url, timeout=2 * MIRROR_SECONDS).close()
        answered.set()

    Thread(target=ask, daemon=True).start()
    if not answered.wait(MIRROR_SECONDS):
        raise TimeoutError(f"no answer within {MIRROR_SECONDS:g} s")
