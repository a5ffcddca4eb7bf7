"""Items come and go without a training: the new are found by content, the old keep their bits, nothing is half."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_world import DAY, FIRST_TIME, NUM_ITEMS, tiny_items, tiny_log, tiny_queries

from pinrec_hf import PinRecRetriever
from pinrec_hf.cli import main
from pinrec_hf.data.prepare import prepare
from pinrec_hf.hub.release import publish
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM
from pinrec_hf.modeling.vocabulary_pinrec import NEIGHBOURS, content_neighbours
from pinrec_hf.retrieval.batch import index_fingerprint
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.encode import base_fingerprint, encode_items, encode_requests, encoder_fingerprint
from pinrec_hf.retrieval.export import export_parquet
from pinrec_hf.retrieval.grow import grow_index
from pinrec_hf.retrieval.item_table import write_item_table
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.release import Releases
from pinrec_hf.training.arguments import DataArguments, FinetuningArguments, FinetuningTrainingArguments
from pinrec_hf.training.finetune import prepare_finetuning
from pinrec_hf.training.warm_start import warm_start

NEW = ["twin of p5", "other"]
NOW = FIRST_TIME + 6 * DAY


def new_items(**columns: pa.Array) -> pa.Table:
    """Two: one with the content and features of p5; both of a market of their own."""
    items = tiny_items().take([5, 3])
    changes = {"item_id": pa.array(NEW), "market": pa.array(["fresh", "fresh"]), **columns}
    for name, values in changes.items():
        place = items.schema.get_field_index(name)
        items = items.append_column(name, values) if place < 0 else items.set_column(place, name, values)
    return items


def ends(ids: list, at: int = NOW) -> pa.Table:
    return pa.table({"item_id": ids, "available_until": pa.array([at] * len(ids), pa.timestamp("s"))})


@pytest.fixture(scope="module")
def grown(saved_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown") / "model"
    index = grow_index(saved_model, folder, add=new_items())
    assert len(index) == NUM_ITEMS + 2
    return folder


def test_old_items_keep_their_bits(saved_model, grown, requests_example):
    old, new = PinRecRetriever.from_pretrained(saved_model), PinRecRetriever.from_pretrained(grown)
    rows = np.arange(NUM_ITEMS)
    assert old.tokenizer.catalogue.ids(rows) == new.tokenizer.catalogue.ids(rows)
    assert new.tokenizer.catalogue.ids([NUM_ITEMS, NUM_ITEMS + 1]) == NEW
    assert (old.index.vectors.whole() == new.index.vectors.whole()[:NUM_ITEMS]).all()
    a, b = (encode_requests(r.model, r.tokenizer, requests_example) for r in (old, new))
    assert (a == b).all()
    before = old.search(requests_example, 20)
    after = new.search([{**request, "exclude": NEW} for request in requests_example], 20)
    assert (before.rows == after.rows).all()
    assert (before.scores == after.scores).all()
    # what adapters and other indexes are held against
    for fingerprint in (encoder_fingerprint, base_fingerprint):
        assert fingerprint(old.model) == fingerprint(new.model)


def test_a_new_item_is_known_by_content_and_by_the_rows_of_what_it_looks_like(saved_model, grown, tmp_path):
    model, tokenizer = load_pretrained(grown)
    rows = tokenizer.catalogue.rows(NEW)
    found = PinRecRetriever.from_pretrained(grown).index.vectors[rows]
    table = model.item_encoder.full_ids
    assert table.num_embeddings == NUM_ITEMS + FIRST_ITEM  # no weight changed
    p5 = tokenizer.catalogue.rows(["p5"])
    nearest = content_neighbours(tokenizer.catalogue, NUM_ITEMS, NEIGHBOURS)[0] + FIRST_ITEM
    with torch.no_grad():
        table.weight[p5 + FIRST_ITEM] = table.weight[nearest].mean(0)
    assert np.allclose(encode_items(model, tokenizer, p5), found[:1], atol=1e-6)
    boosted = tmp_path / "boosted"
    grow_index(saved_model, boosted, add=new_items(), boost=1.5)
    more = PinRecRetriever.from_pretrained(boosted).index.vectors[rows] - found
    assert np.allclose(more[:, model.config.hidden_size], 1.5, atol=1e-6)  # what every request asks for with 1
    assert np.allclose(np.delete(more, model.config.hidden_size, 1), 0)


@pytest.mark.parametrize(("what", "boost"), [({"remove": ends(["p1"])}, 1.0), ({"add": new_items()}, float("nan"))])
def test_a_boost_is_a_number_for_items_to_add(saved_model, tmp_path, what, boost):
    with pytest.raises(ValueError, match="is for the scores of items to add"):
        grow_index(saved_model, tmp_path / "grown", boost=boost, **what)


def test_what_is_in_training_is_not_copied(saved_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(saved_model, base)
    (base / "adapters" / "search.training" / "checkpoint-5").mkdir(parents=True)
    grow_index(base, tmp_path / "grown", add=new_items())
    assert not (tmp_path / "grown" / "adapters" / "search.training").exists()
    assert not (publish(base, tmp_path / "releases") / "adapters").exists()


def test_exported_vectors_and_the_fingerprint_of_a_search_are_those_of_the_grown_index(saved_model, tmp_path):
    retrievers = []
    for boost in (0.0, 5.0):
        grow_index(saved_model, tmp_path / f"boost-{boost}", add=new_items(), boost=boost)
        retrievers.append(PinRecRetriever.from_pretrained(tmp_path / f"boost-{boost}"))
    assert index_fingerprint(retrievers[0]) != index_fingerprint(retrievers[1])
    export_parquet(retrievers[1], tmp_path / "out", progress=False)
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    assert items["item_id"].to_pylist()[-2:] == NEW
    assert (np.stack(items["embedding"].to_pylist()) == retrievers[1].index.vectors.whole()).all()


def test_a_boost_wants_id_rows(make_model, tokenizer, tiny_data, tmp_path):
    base = tmp_path / "base"
    make_model(item_id_embedding=None).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_item_table(tiny_data / "items.parquet", base / "items.parquet", tokenizer.catalogue)
    build_index(base)
    with pytest.raises(ValueError, match="a boost is a bias of new id rows"):
        grow_index(base, tmp_path / "grown", add=new_items(), boost=1)
    assert not (tmp_path / "grown").exists()


def test_pinrec_recommends_a_new_item_by_its_content(make_model, tokenizer, tiny_data, tmp_path, capsys):
    """A model without item ids knows p5 by content alone: its twin stands beside it, with the same score."""
    base, grown = tmp_path / "base", tmp_path / "grown"
    make_model(item_id_embedding=None).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_item_table(tiny_data / "items.parquet", base / "items.parquet", tokenizer.catalogue)
    build_index(base, kind="hnsw")
    pq.write_table(new_items(), tmp_path / "new.parquet")
    words = ["index", "--model", str(base), "--add", str(tmp_path / "new.parquet"), "--output-dir", str(grown)]
    assert main(words) == 0
    assert f"62 items; next: pinrec release --model {grown} --to releases" in capsys.readouterr().out
    ask = ["recommend", "--model", str(grown), "--surface", "homefeed", "--outcome", "save=1", "--json"]
    assert main([*ask, "-k", "62"]) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    place = {candidate["item_id"]: rank for rank, candidate in enumerate(candidates)}
    assert abs(place["twin of p5"] - place["p5"]) == 1
    assert candidates[place["twin of p5"]]["score"] == pytest.approx(candidates[place["p5"]]["score"], abs=1e-5)
    assert main([*ask, "--filter", "market=fresh"]) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    assert {candidate["item_id"] for candidate in candidates} == set(NEW)
    assert {candidate["columns"]["title"] for candidate in candidates} == {"Title of p5", "Title of p3"}


def test_life_times_of_new_items_and_ends_of_old_ones(grown, tmp_path):
    later = pa.array([NOW + DAY, None], pa.timestamp("s"))
    more = new_items(item_id=pa.array(["later", "third"]), available_from=later)
    again = tmp_path / "again"
    grow_index(grown, again, add=more, remove=ends(["p0", "twin of p5"]))
    assert (again / "index.json").exists()

    def found(folder, timestamp):
        retriever = PinRecRetriever.from_pretrained(folder)
        (candidates,) = retriever.recommend([{}], k=70, timestamp=timestamp, surface="homefeed")
        return {candidate.item_id for candidate in candidates}

    before, after = found(again, NOW - 1), found(again, NOW)
    assert before - after == {"p0", "twin of p5"}
    assert "third" in after
    assert found(again, NOW + DAY) - after == {"later"}
    assert found(grown, NOW) - after == {"p0", "twin of p5"}  # the folder that it came from is as it was
    removed = tmp_path / "removed"
    grow_index(again, removed, remove=ends(["p1"]))
    assert after - found(removed, NOW) == {"p1"}
    for name in ("index.faiss", "index.safetensors", "items.parquet", "model.safetensors"):
        assert (removed / name).read_bytes() == (again / name).read_bytes()


def test_released_and_swapped_into_a_running_server(saved_model, grown, tmp_path):
    root = tmp_path / "releases"
    publish(saved_model, root)
    releases = Releases(root / "current", Metrics())
    request = {"history": {}, "filters": {"market": "fresh"}, "surface": "homefeed", "timestamp": NOW, "k": 5}
    assert releases.answer([request])[1] == [[]]
    publish(grown, root)
    releases.reload()
    assert {candidate.item_id for candidate in releases.answer([request])[1][0]} == set(NEW)


def test_the_next_warm_start_gives_them_rows(grown, tiny_data):
    warm = warm_start(grown, tiny_data)
    table = warm.model.item_encoder.full_ids.weight
    assert len(table) == NUM_ITEMS + 2 + FIRST_ITEM == warm.model.config.num_items + FIRST_ITEM
    near = content_neighbours(warm.tokenizer.catalogue, NUM_ITEMS, NEIGHBOURS) + FIRST_ITEM
    assert torch.allclose(table[-2:], table[near].mean(1))
    assert warm.tokenizer.catalogue.ids([NUM_ITEMS, NUM_ITEMS + 1]) == NEW


def test_it_is_finetuned_with_them(grown, tmp_path):
    liked = [{**row, "item_id": "other", "outcomes": ["save"]} for row in tiny_log() if row["surface"] == "related"][:9]
    tables = {"items": pa.concat_tables([tiny_items(), new_items()]), "queries": tiny_queries()}
    log = pa.Table.from_pylist([*tiny_log(), *liked])
    prepare(log, **tables, time_unit="s", negative_outcomes=["hide"], output_dir=tmp_path / "data")
    arguments = DataArguments(data=str(tmp_path / "data")), FinetuningArguments(model=str(grown), surface="related")
    run = prepare_finetuning(*arguments, FinetuningTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True))
    place = run.tokenizer.catalogue.rows(["other"])[0] + FIRST_ITEM
    assert len(run.collator.frequencies) == NUM_ITEMS + 2 + FIRST_ITEM
    assert run.collator.frequencies[place] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"add": new_items(item_id=pa.array(["fresh", "p7"]))}, r"'p7' is in the catalogue already \(1 such"),
        ({"add": new_items(item_id=pa.array(["same", "same"]))}, "item_id repeats an earlier row's"),
        ({"add": new_items(item_id=pa.array(["fresh", None]))}, "item_id is null"),
        ({"add": new_items(item_id=pa.array([1, 2]))}, "the catalogue has string ids"),
        ({"add": new_items(embedding=pa.array([[1.0] * 4] * 2))}, "width 4, the model's catalogue 8"),
        ({"add": new_items(embedding=pa.array([[1.0] * 8, [0.0] * 8]))}, "embedding is zero"),
        ({"add": new_items().drop_columns("embedding")}, "width 0, the model's catalogue 8"),
        ({"add": new_items(available_from=pa.array([NOW, NOW]))}, "say their unit with time_unit"),
        ({"add": new_items(market=pa.array([1, 2]))}, "a column of another type"),
        ({"add": "nowhere.parquet"}, "no file matches"),
        ({"remove": ends(["p1", "p99"])}, r"'p99' is not in the catalogue \(1 such"),
        ({"remove": ends(["p1"]).drop_columns("available_until")}, "need available_until"),
        ({}, "neither items to add"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(saved_model, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        grow_index(saved_model, tmp_path / "grown", **given)
    assert list(tmp_path.iterdir()) == []


def test_integer_ids_take_integers(saved_model, make_model, tokenizer, tiny_data, tmp_path):
    base = shutil.copytree(saved_model, tmp_path / "base")
    model, tokenizer = load_pretrained(base)
    catalogue = type(tokenizer.catalogue).build(
        np.arange(NUM_ITEMS), vectors=tokenizer.catalogue.vectors(np.arange(NUM_ITEMS))
    )
    tokenizer.catalogue, model.config.catalogue_fingerprint = catalogue, catalogue.fingerprint
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    numbered = tiny_items().set_column(0, "item_id", pa.array(range(NUM_ITEMS)))
    pq.write_table(numbered, tmp_path / "items.parquet")
    write_item_table(tmp_path / "items.parquet", base / "items.parquet", catalogue)
    build_index(base)
    with pytest.raises(ValueError, match="the catalogue has integer ids"):
        grow_index(base, tmp_path / "grown", add=new_items())
    grow_index(base, tmp_path / "grown", add=new_items(item_id=pa.array([7_000, 6_000])))
    assert load_pretrained(tmp_path / "grown")[1].catalogue.ids([60, 61]) == [7_000, 6_000]


def test_a_model_of_ids_alone_has_nothing_to_know_a_new_item_by(tokenizer, make_model, tmp_path, saved_model):
    base = shutil.copytree(saved_model, tmp_path / "base")
    catalogue = type(tokenizer.catalogue).build(tokenizer.catalogue.ids(np.arange(NUM_ITEMS)))
    model, loaded = make_model(content_size=0, feature_buckets=0), load_pretrained(base)[1]
    loaded.catalogue, model.config.catalogue_fingerprint = catalogue, catalogue.fingerprint
    model.save_pretrained(base)
    loaded.save_pretrained(base)
    write_item_table(saved_model / "items.parquet", base / "items.parquet", catalogue)
    build_index(base)
    with pytest.raises(ValueError, match="knows items by id alone"):
        grow_index(base, tmp_path / "grown", add=new_items())


def test_the_command_says_what_goes_with_what(saved_model, tmp_path, capsys):
    index = ["index", "--model", str(saved_model)]
    for words, message in (
        (["--add", "x.parquet"], "--output-dir goes with --add or --remove"),
        (["--output-dir", str(tmp_path / "x")], "--output-dir goes with --add or --remove"),
        (["--remove", "x.parquet", "--output-dir", "y", "--kind", "hnsw"], "leave out --kind"),
        (["--add", "x.parquet", "--output-dir", str(tmp_path)], f"{tmp_path} exists"),
    ):
        assert main([*index, *words]) == 2
        assert message in capsys.readouterr().err


def test_killed_at_any_moment_it_leaves_the_old_and_nothing_half(saved_model, tmp_path):
    base = shutil.copytree(saved_model, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    pq.write_table(new_items(), tmp_path / "new.parquet")
    grown = tmp_path / "grown"
    command = [sys.executable, "-m", "pinrec_hf", "index", "--model", str(base), "--add", str(tmp_path / "new.parquet")]
    command += ["--output-dir", str(grown)]
    for written in ("", "config.json", "index.safetensors.partial-*"):  # how far it has come
        with subprocess.Popen(command) as process:
            partial = tmp_path / f"grown.partial-{process.pid}"
            while not (list(partial.glob(written)) if written else partial.exists()) and process.poll() is None:
                time.sleep(0.0005)
            process.kill()
        if process.returncode == 0:  # it was faster: then it is whole
            assert len(PinRecRetriever.from_pretrained(grown).index) == NUM_ITEMS + 2
            shutil.rmtree(grown)
        assert not grown.exists()
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    grow_index(base, grown, add=tmp_path / "new.parquet")
    assert len(PinRecRetriever.from_pretrained(grown).index) == NUM_ITEMS + 2
