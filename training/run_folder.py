"""The folders of one training run: checkpoints beside the output, and the output whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pinrec_hf.data.output import new_directory, only_run


class RunFolder:
    """Checkpoints live in `<output_dir>.training`; `output_dir` appears when the run is finished.

    Args:
        output_dir: folder of the finished model.
        resume: whether an interrupted run may be there.

    Raises:
        FileExistsError: the output exists, or an interrupted run is there and `resume` is off.
        FileNotFoundError: `resume` is on and there is nothing to resume.
    """

    def __init__(self, output_dir: str | Path, resume: bool) -> None:
        self.output = Path(output_dir)
        self.checkpoints = self.output.with_name(self.output.name + ".training")
        self.is_first_process = int(os.environ.get("RANK", 0)) == 0
        if not self.is_first_process:
            return  # the first process of the run checks and locks for all
        if self.output.exists():
            raise FileExistsError(f"{self.output} exists; choose another --output_dir or remove it")
        if self.checkpoints.exists() and not resume:
            raise FileExistsError(
                f"{self.checkpoints} holds an interrupted run: add --resume True to go on, or remove it to start again"
            )
        if resume and not self.checkpoints.exists():
            raise FileNotFoundError(f"{self.checkpoints} does not exist: there is no interrupted run to resume")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run's lock, so that two runs never write to one folder.

        Raises:
            FileExistsError: another process holds it.
        """
        if not self.is_first_process:
            yield
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with only_run(self.checkpoints):
            yield

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """A folder to fill; it becomes `output_dir` when the block ends without an error, and the checkpoints go."""
        with new_directory(self.output) as partial:
            yield partial
        shutil.rmtree(self.checkpoints)
