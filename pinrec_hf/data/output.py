"""Files and directories that are either complete or not there, however a run ends."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the place of what is there when the block ends without an
    exception, and is removed when it does not.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(final.parent))
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a directory beside its final place; it gets its name when the block ends without an exception.

    Whatever ends the block early (an error, Ctrl-C, a full disk) removes what was written; what a run left that was
    killed is removed by the next one of the same name.

    Raises:
        FileExistsError: something is at `path`, at the start or, from another run, at the end.
    """
    final = Path(path)
    taken = f"{final} exists: choose another output directory, or remove it first"
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, taken)
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove_left(final.parent.glob(f"{glob.escape(final.name)}.partial-*"))
    partial.mkdir()
    try:
        with only_run(partial):
            yield partial
            try:
                os.rename(partial, final)
            except OSError as error:
                if os.path.lexists(final):
                    raise FileExistsError(errno.EEXIST, f"another run wrote it meanwhile: {taken}") from error
                raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def only_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps every other run out of an existing folder until the block ends.

    Raises:
        FileExistsError: another process is in such a block.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process: nothing to clean up
        except BlockingIOError:
            raise FileExistsError(
                errno.EEXIST, f"another run is writing to {folder}; wait for it, or stop it"
            ) from None
        yield
    finally:
        os.close(lock)


def remove_left(folders: Iterable[Path]) -> None:
    """Remove folders of runs that were killed: those that no `only_run` holds."""
    for folder in folders:
        with suppress(OSError), only_run(folder):
            shutil.rmtree(folder)
