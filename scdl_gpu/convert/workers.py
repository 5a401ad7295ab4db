"""Processes that convert files side by side, and end with the process that started them.

Knows processes and signals, not conversions. They are spawned: forking a process that has threads can hang it.
A worker whose parent is gone, killed with no chance to say so, notices within WATCH_SECONDS.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

from tqdm import tqdm

WATCH_SECONDS = 0.5


class Processes(ProcessPoolExecutor):
    """Worker processes. An interrupt (Ctrl-C) is the parent's to notice: it stops them, and does not wait for their files."""

    def __init__(self, count: int) -> None:
        super().__init__(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))

    stopped = False

    def stop(self) -> None:
        """End the workers at once: what they are at, and what waits for them, fails with BrokenExecutor. Cancel none of it."""
        self.stopped = True
        for process in list((self._processes or {}).values()):
            process.terminate()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> bool | None:
        if kind is not None and not issubclass(kind, Exception):
            self.stop()
        self.shutdown(cancel_futures=kind is not None and not self.stopped)
        return None


def _begin(parent: int) -> None:
    """Set up a worker: deaf to Ctrl-C, which reaches the whole group of processes; warnings in a line each.

    tqdm would make a lock between processes, which one that is stopped leaves behind.
    """
    tqdm.set_lock(threading.RLock())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.showwarning = _show_warning
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {' '.join(str(message).splitlines())}\n")
