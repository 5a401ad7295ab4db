"""What is worth saying while an archive is opened, kept back until it is known that one archive was opened, not parts of two.

Knows when to speak, not what is said. An archive may be exchanged under the hands of who opens it: then it is opened anew,
and what was odd about the mixture means nothing. Outside `kept_back` everything is said at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Remark = Callable[[], object]

_KEPT: ContextVar[list[Remark] | None] = ContextVar("remarks of the archive that is being opened", default=None)


def say(remark: Remark) -> None:
    """Make a remark (call it), now or when the archive has proved to be one."""
    kept = _KEPT.get()
    if kept is None:
        remark()
    else:
        kept.append(remark)


@contextmanager
def kept_back() -> Iterator[list[Remark]]:
    """Collect the remarks of this thread; who collects them makes them afterwards, or does not."""
    kept: list[Remark] = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)
