"""Releases on one machine: a folder each below RELEASES, and `current`, a symbolic link that is swapped atomically.

A release holds what a model's folder gives to the Hub, catalogue and index included, and the adapters in its
`adapters/SURFACE`, so that they are served together and rolled back together. A name below RELEASES is a whole release,
or is not there.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

from pinrec_hf.data.output import new_directory, only_run
from pinrec_hf.hub.files import list_files
from pinrec_hf.retrieval.retriever import PinRecRetriever

CURRENT = "current"
PREVIOUS = "previous.txt"
"""In a release: the name of the one that it took the place of."""


def publish(model: str | os.PathLike[str], releases: str | os.PathLike[str]) -> Path:
    """Copy an indexed model's folder to a new release, load it, and only then make it `current`.

    Returns:
        the release's folder, named by the time (UTC) so that names sort by age.

    Raises:
        FileNotFoundError: no such model, or no index in it.
        FileExistsError: another release is under way.
        ValueError: model, catalogue, index and adapters do not belong together.
    """
    source, root = Path(model), Path(releases)
    # one in training is SURFACE.training
    adapters = {
        path.name: path for path in sorted((source / "adapters").glob("*")) if path.is_dir() and not path.suffix
    }
    files = [part / name for part in (source, *adapters.values()) for name in list_files(part).sizes]
    root.mkdir(parents=True, exist_ok=True)
    with only_run(root):
        for left in root.glob("*.partial-*"):  # of a run that was killed: the lock says that nobody writes it
            shutil.rmtree(left)
        now = time.time_ns()
        release = root / f"{time.strftime('%Y-%m-%dT%H%M%S', time.gmtime(now // 10**9))}.{now % 10**9 // 1000:06d}Z"
        with new_directory(release) as folder:
            for file in files:
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)  # with its time: an index is as old as it was
                _flush(copy)
            if (root / CURRENT).is_symlink():
                (folder / PREVIOUS).write_text(os.readlink(root / CURRENT))
            # checks that the parts belong together
            PinRecRetriever.from_pretrained(
                folder, adapters={name: folder / "adapters" / name for name in adapters} or None
            )
        _flush(root)
        _point(root, release.name)
    return release


def roll_back(releases: str | os.PathLike[str]) -> Path:
    """Make `current` the release that was current when the present one came; the present one stays in its folder.

    Raises:
        FileNotFoundError: there is no current release.
        ValueError: nothing was current before it, or that was removed since.
    """
    root = Path(releases)
    if not (root / CURRENT).is_symlink():
        raise FileNotFoundError(errno.ENOENT, f"{root} has no current release; make one with `pinrec release`")
    with only_run(root):
        now = os.readlink(root / CURRENT)
        before = (root / now / PREVIOUS).read_text().strip() if (root / now / PREVIOUS).is_file() else ""
        if not before or not (root / before).is_dir():
            raise ValueError(f"{root} holds no release before {now}: there is nothing to roll back to")
        _point(root, before)
        return root / before


def _point(root: Path, name: str) -> None:
    """`current` names another release, at one moment: readers see the old one or the new one."""
    link = root / f"{CURRENT}.next"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / CURRENT)
    _flush(root)


def _flush(path: Path) -> None:
    """To disk: a power cut must not leave a pointer to what was not written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
