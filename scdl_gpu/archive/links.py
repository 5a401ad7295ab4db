"""Files under a second name: what a new directory shares with an old one costs no bytes.

Knows names and modes, not what files hold. Where the file system has no hard links files are copied.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def stop(error: OSError) -> None:
    """Stop a walk at what it cannot read, which it would pass over."""
    raise error


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be; a symbolic link stays one."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def link_tree(source: Path, target: Path, replaced: Collection[str]) -> None:
    """Give every file below `source` a second name below `target`, but not those that `replaced` names."""
    for parent, directories, names in os.walk(source, onerror=stop):
        relative = Path(parent).relative_to(source)
        directories[:] = [name for name in directories if str(relative / name) not in replaced]
        (target / relative).mkdir(exist_ok=True)
        (target / relative).chmod(stat.S_IMODE(Path(parent).stat().st_mode) | stat.S_IRWXU)
        for name in (*names, *(name for name in directories if Path(parent, name).is_symlink())):
            if str(relative / name) in replaced:
                continue
            link(Path(parent, name), target / relative / name)


def keep_modes(source: Path, target: Path) -> None:
    """Give what is new below `target` the mode of what it replaces below `source`."""
    for parent, directories, names in os.walk(target, onerror=stop):
        for name in (*directories, *names):
            new = Path(parent, name)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                old = (source / new.relative_to(target)).lstat()
                kind = stat.S_IFMT(old.st_mode)
                if kind in (stat.S_IFREG, stat.S_IFDIR) and kind == stat.S_IFMT(new.lstat().st_mode) and old.st_mode != new.lstat().st_mode:
                    new.chmod(stat.S_IMODE(old.st_mode) | (stat.S_IRWXU if kind == stat.S_IFDIR else 0))
