"""One process prepares and the others wait on a file: never in a collective, whose timeout would kill the run."""

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
def exclusive(folder: Path, progress: Callable[[], str]) -> Iterator[None]:
    """Hold a folder, which is created if needed, for this process; while another holds it, wait and log its `progress`.

    The lock is the operating system's. It ends when its holder dies, and the next process in line goes on.

    Raises:
        PreparedDataError: the process that this one waited for failed; with its message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, began = FileLock(folder / _LOCK), time.time()
    while True:
        try:
            lock.acquire(timeout=HEARTBEAT_SECONDS)
            break
        except Timeout:
            logger.warning(
                "waiting for another process to prepare %s: %s, %.0f s", folder, progress(), time.time() - began
            )
    failed = folder / _FAILED
    try:
        if failed.exists():
            failure = json.loads(failed.read_text())
            # A failure while this process stood in line is its own failure; an older one is worth another try.
            if failure["time"] >= began:
                raise PreparedDataError(f"{failure['by']} could not prepare {folder}: {failure['error']}")
            failed.unlink()
        try:
            yield
        except Exception as error:
            by = f"process {os.getpid()} on {platform.node()}"
            failure = {"time": time.time(), "by": by, "error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):  # a full disk has no room for it either
                failed.write_text(json.dumps(failure))
            raise
    finally:
        lock.release()
