"""What a crash test does to a directory, and what the directory may look like afterwards.

Knows names of states only; looking at bytes is left to each operation.
"""

from pathlib import Path
from typing import Any


class TornError(Exception):
    """What is on disk is neither the old state nor the new one."""


class Operation:
    """Something a writer does below a directory, and how to tell afterwards what it came to."""

    def setup(self, directory: Path) -> None:
        """Make what is there before."""

    def act(self, directory: Path) -> Any:
        """Do the operation; its time is counted."""
        raise NotImplementedError

    def state(self, directory: Path) -> str:
        """Return "old" or "new", having looked at every byte; raise TornError for anything else."""
        raise NotImplementedError

    def open(self, directory: Path) -> Any:
        """Open what is there before, as a reader would."""

    def check_reader(self, reader: Any) -> None:
        """Raise TornError unless what `open` returned still reads as before."""

    def again(self, directory: Path, state: str) -> None:
        """Do the operation once more, on the state that a death left; raise TornError where that does not end well."""
        self.act(directory)
        if self.state(directory) != "new":
            raise TornError("run once more, the operation left the old state")


class Creation(Operation):
    """An operation that makes something where nothing was, and refuses where something is."""

    def write_next(self, directory: Path) -> None:
        """Change what was made in some way that keeps its rows: the next writer, who tidies up."""

    def again(self, directory: Path, state: str) -> None:
        """Succeed where nothing was made; refuse by FileExistsError where all was, and let the next writer pass."""
        try:
            self.act(directory)
        except FileExistsError:
            if state != "new":
                raise
            self.write_next(directory)
        else:
            if state == "new":
                raise TornError("run once more, the operation did not notice that its result exists")
        if self.state(directory) != "new":
            raise TornError("run once more, the operation left the old state")
