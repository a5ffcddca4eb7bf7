"""What of a folder goes to the Hub: a closed list by kind of folder, so that nothing else ever does."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

CARD = "README.md"
SURFACE_CONFIG = "surface_config.json"
SPACE_APP = "app.py"
PICTURES = ("recall-by-surface.png", "learning-curve.png")
# left out on purpose: trainer_state.json and training.json (paths of this machine), report.json (rows of the log)
MODEL = (
    CARD,
    *PICTURES,
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer_config.json",
    "catalogue.safetensors",
    "queries.safetensors",
    "items.parquet",
    "index.json",
    "index.faiss",
    "index.safetensors",
    "data.json",
    "*_pinrec.py",  # the code for trust_remote_code
)
ADAPTER = (CARD, *PICTURES, "adapter_config.json", "adapter_model.safetensors", SURFACE_CONFIG, "data.json")
DATASET = (
    CARD,
    "metadata.json",
    "train/part-*.parquet",
    "validation/part-*.parquet",
    "test/part-*.parquet",
    "items.parquet",
    "queries.parquet",
)
SPACE = (CARD, SPACE_APP, "requirements.txt")
# the file that marks a folder of each kind
KINDS = {
    "adapter": ("adapter_config.json", ADAPTER),
    "model": ("config.json", MODEL),
    "dataset": ("metadata.json", DATASET),
    "space": (SPACE_APP, SPACE),
}


@dataclass(frozen=True)
class Listing:
    """The files of one folder that are pushed.

    Attributes:
        folder: where they are.
        kind: `"model"`, `"adapter"`, `"dataset"` or `"space"`.
        sizes: bytes by path below `folder`, in the order of the list.
    """

    folder: Path
    kind: str
    sizes: dict[str, int]

    @property
    def repo_type(self) -> str:
        return self.kind if self.kind in ("dataset", "space") else "model"

    def may_hold(self, path: str) -> bool:
        """Whether a folder of this kind may have a file of that name."""
        patterns = (p for p in KINDS[self.kind][1] if p.count("/") == path.count("/"))  # whose * is no /
        return any(fnmatch(path, pattern) for pattern in patterns)


def list_files(folder: str | os.PathLike[str]) -> Listing:
    """The files of a model's, an adapter's, a prepared dataset's or a Space's folder that go to the Hub.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is none of the four.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} is no folder")
    for kind, (mark, patterns) in KINDS.items():
        if (root / mark).is_file():
            found = (path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file())
            return Listing(root, kind, {path.relative_to(root).as_posix(): path.stat().st_size for path in found})
    marks = ", ".join(f"{mark} ({kind})" for kind, (mark, _) in KINDS.items())
    raise ValueError(f"{folder} is neither model, adapter, prepared dataset nor Space: it holds none of {marks}")
