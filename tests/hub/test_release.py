"""`pinrec release`: what is current is whole at every moment, also when the command is killed."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from pinrec_hf import PinRecRetriever
from pinrec_hf.cli import main
from pinrec_hf.hub.release import publish, roll_back


def test_released_swapped_and_rolled_back(saved_model, tmp_path, capsys):
    root = tmp_path / "releases"
    first, second = publish(saved_model, root), publish(saved_model, root)
    assert os.readlink(root / "current") == second.name > first.name
    assert len(PinRecRetriever.from_pretrained(root / "current").index) == 60
    assert main(["release", "--rollback", "--to", str(root)]) == 0
    assert (root / "current").resolve() == first.resolve()
    third = publish(saved_model, root)
    assert roll_back(root) == first  # not the second, which was rejected
    assert third.is_dir()
    assert main(["release", "--rollback", "--to", str(root)]) == 2
    assert "nothing to roll back to" in capsys.readouterr().err


def test_what_is_not_whole_never_becomes_current(saved_model, tmp_path):
    root, broken = tmp_path / "releases", tmp_path / "broken"
    good = publish(saved_model, root)
    shutil.copytree(saved_model, broken)
    (broken / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no complete index"):
        publish(broken, root)
    assert os.readlink(root / "current") == good.name
    assert sorted(path.name for path in root.iterdir()) == [good.name, "current"]
    with pytest.raises(FileNotFoundError, match="no current release"):
        roll_back(tmp_path)


def test_a_killed_release_leaves_the_old_one_and_the_next_run_cleans_up(saved_model, tmp_path):
    root = tmp_path / "releases"
    good = publish(saved_model, root)
    command = [sys.executable, "-m", "pinrec_hf", "release", "--model", str(saved_model), "--to", str(root)]
    with subprocess.Popen(command) as process:
        while not list(root.glob("*.partial-*")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -9
    assert list(root.glob("*.partial-*"))
    assert os.readlink(root / "current") == good.name
    after = publish(saved_model, root)
    assert sorted(path.name for path in root.iterdir()) == [good.name, after.name, "current"]
    assert os.readlink(root / "current") == after.name
