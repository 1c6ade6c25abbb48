"""One process prepares, the others wait on a file: never in a collective, whose timeout would kill the run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_objectives.errors import PreparedDataError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
_LOCK, _FAILED = ".lock", ".failed"


@contextmanager
def exclusive(folder: Path, progress: Callable[[], str], *, heartbeat: float | None = None) -> Iterator[None]:
    """Hold a folder for this process; while another holds it, wait and say how far that one is.

    The lock is the operating system's: it goes when its holder dies, and the next in line goes on.

    Args:
        folder: the folder; made if need be.
        progress: says how far the preparation is, for the heartbeat line.
        heartbeat: seconds between two lines.

    Raises:
        PreparedDataError: the process that was waited for failed; with its message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, began = FileLock(folder / _LOCK), time.time()
    while True:
        try:
            lock.acquire(timeout=heartbeat or HEARTBEAT_SECONDS)
            break
        except Timeout:
            logger.warning(
                "waiting for another process to prepare %s: %s, %.0f s", folder, progress(), time.time() - began
            )
    try:
        failed = folder / _FAILED
        if failed.exists():
            told = json.loads(failed.read_text())
            # A failure while this process stood in line is its own failure; an older one is worth another try.
            if told["time"] >= began:
                raise PreparedDataError(f"{told['by']} could not prepare {folder}: {told['error']}")
            failed.unlink()
        try:
            yield
        except Exception as error:
            by = f"process {os.getpid()} on {platform.node()}"
            told = {"time": time.time(), "by": by, "error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):  # a full disk has no room for it either
                failed.write_text(json.dumps(told))
            raise
    finally:
        lock.release()
