"""A run's output is whole or absent, and belongs to one run."""

from pathlib import Path

import pytest

from pinrec_hf.training.run_folder import RunFolder


def test_output_appears_whole_and_the_checkpoints_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "model", resume=False)
    with folder.locked(), folder.publish() as output:
        (output / "weights").write_text("w")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_publication_leaves_nothing_but_the_checkpoints(tmp_path: Path, error: BaseException) -> None:
    folder = RunFolder(tmp_path / "model", resume=False)
    with pytest.raises(type(error)), folder.locked(), folder.publish() as output:  # noqa: PT012
        (output / "weights").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["model.training"]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "model", resume=False)
    with first.locked():
        second = RunFolder(tmp_path / "model", resume=True)
        with pytest.raises(FileExistsError, match="another run is writing"), second.locked():
            pass


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no interrupted run"):
        RunFolder(tmp_path / "model", resume=True)
    (tmp_path / "model.training").mkdir()
    with pytest.raises(FileExistsError, match="--resume True"):
        RunFolder(tmp_path / "model", resume=False)
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="choose another"):
        RunFolder(tmp_path / "model", resume=False)
