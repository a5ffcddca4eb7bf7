"""Items encoded part by part, by one process or several; whoever is killed, the next run goes on, and half is never
served."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pinrec_hf.cli import main
from pinrec_hf.retrieval import item_parts
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.encode import encode_items, encoder_fingerprint
from pinrec_hf.retrieval.index import ItemIndex
from pinrec_hf.retrieval.item_parts import item_embeddings

ROWS = 16  # of 60 items: 4 parts
PATIENT = "from pinrec_hf.retrieval import build, item_parts; item_parts.ROWS_A_PART = 16\n"
INDEX = "from pinrec_hf.cli import main; import sys; sys.exit(main(['index', '--model', sys.argv[1]]))"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(item_parts, "ROWS_A_PART", ROWS)


@pytest.fixture
def folder(saved_model, tmp_path) -> Path:
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """First rows of the parts that are encoded from now on."""
    first: list[int] = []

    def encode(model, tokenizer, rows):
        first.append(int(rows[0]))
        return encode_items(model, tokenizer, rows)

    monkeypatch.setattr(item_parts, "encode_items", encode)
    return first


def be(monkeypatch, rank: int, processes: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))


def index_of(folder: Path, model, tokenizer) -> ItemIndex:
    return ItemIndex.load(
        folder, encoder_fingerprint=encoder_fingerprint(model), catalogue_fingerprint=tokenizer.catalogue.fingerprint
    )


def test_parts_are_the_catalogue_and_go(model, tokenizer, tmp_path, encoded):
    with item_embeddings(model, tokenizer, tmp_path) as embeddings:
        np.testing.assert_allclose(embeddings, encode_items(model, tokenizer), atol=1e-5)
        assert isinstance(embeddings, np.memmap)
        assert len(list(tmp_path.glob("index.parts-*/part-*.npy"))) == 4
    assert encoded == [0, 16, 32, 48]
    assert list(tmp_path.iterdir()) == []


def test_a_small_catalogue_writes_nothing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(item_parts, "ROWS_A_PART", 60)
    with item_embeddings(model, tokenizer, tmp_path) as embeddings:
        assert list(tmp_path.iterdir()) == []
        assert (embeddings == encode_items(model, tokenizer)).all()


def test_what_was_made_is_not_made_again_unless_by_another_encoder(model, make_model, tokenizer, tmp_path, encoded):
    with pytest.raises(OSError, match="full"), item_embeddings(model, tokenizer, tmp_path):
        raise OSError("the disk is full")
    with item_embeddings(model, tokenizer, tmp_path):
        assert encoded == [0, 16, 32, 48]
        other = make_model(item_id_dropout=0.0, initializer_range=0.1)
        with item_embeddings(other, tokenizer, tmp_path) as embeddings:
            assert encoded == [0, 16, 32, 48] * 2
            np.testing.assert_allclose(embeddings, encode_items(other, tokenizer), atol=1e-5)


def test_each_process_makes_its_parts_and_the_first_goes_on(folder, model, tokenizer, encoded, monkeypatch):
    (folder / "index.json").unlink()
    be(monkeypatch, 1, 3)
    assert build_index(folder) is None
    assert encoded == [16]
    be(monkeypatch, 2, 3)
    assert build_index(folder) is None
    assert encoded == [16, 32]
    assert not (folder / "index.json").exists()
    be(monkeypatch, 0, 3)
    assert len(build_index(folder)) == 60
    assert encoded == [16, 32, 0, 48]
    np.testing.assert_allclose(
        index_of(folder, model, tokenizer).catalogue_embeddings(), encode_items(model, tokenizer), atol=1e-5
    )
    assert not list(folder.glob("index.parts-*"))


def test_two_runs_do_not_mix(model, tokenizer, tmp_path):
    with (
        item_embeddings(model, tokenizer, tmp_path),
        pytest.raises(FileExistsError, match="another run"),
        item_embeddings(model, tokenizer, tmp_path),
    ):
        pass


def killed(script: str, folder: Path, pattern: str) -> None:
    """SIGKILL a process when a file appears."""
    command = [sys.executable, "-c", PATIENT + script + INDEX, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(folder.glob(pattern)) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL


SLOW_ENCODING = """
import time
encode = item_parts.encode_items
item_parts.encode_items = lambda *args: (time.sleep(0.2), encode(*args))[1]
"""
HALF_AN_INDEX = """
import time
from pinrec_hf.retrieval.faiss_index import FaissIndex
def write(self, path):
    open(path, "wb").write(b"half")
    time.sleep(600)
FaissIndex.write = write
"""


def test_killed_while_encoding(folder, model, tokenizer, encoded):
    before = index_of(folder, model, tokenizer)
    killed(SLOW_ENCODING, folder, "index.parts-*/part-00001.npy")
    assert len(index_of(folder, model, tokenizer)) == len(before) == 60  # the old one is served meanwhile
    assert main(["index", "--model", str(folder)]) == 0
    assert encoded in ([32, 48], [48])
    assert len(index_of(folder, model, tokenizer)) == 60
    assert not list(folder.glob("index.*part*"))


def test_killed_while_the_index_is_built(folder, model, tokenizer, encoded):
    before = index_of(folder, model, tokenizer).catalogue_embeddings().copy()
    killed(HALF_AN_INDEX, folder, "index.faiss.partial-*")
    assert (index_of(folder, model, tokenizer).catalogue_embeddings() == before).all()
    assert main(["index", "--model", str(folder)]) == 0
    assert encoded == []  # the parts were whole
    assert len(index_of(folder, model, tokenizer)) == 60
    assert not list(folder.glob("index.*part*"))


@pytest.mark.scale
def test_two_processes_of_a_launcher(folder, model, tokenizer):
    (folder / "index.json").unlink()
    script = folder.parent / "index.py"
    script.write_text(PATIENT + INDEX)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(folder)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("indexed 60 items") == 1
    assert len(index_of(folder, model, tokenizer)) == 60
    assert not list(folder.glob("index.parts-*"))
