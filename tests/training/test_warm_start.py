"""Yesterday's model goes on today: old answers keep their bits, what is new is there, what does not fit is refused."""

import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_pretrain import ROOT, SCRIPT, arguments, run, same_bits
from tiny_world import DAY, FIRST_TIME, NUM_DAYS, NUM_ITEMS, tiny_items, tiny_log, tiny_queries

from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.windows import SequenceDataset, encode_split
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.vocabulary_pinrec import NEIGHBOURS
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.encode import encode_items, encode_requests
from pinrec_hf.retrieval.item_table import ItemTable
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.training.arguments import DataArguments, ModelArguments, PinRecTrainingArguments
from pinrec_hf.training.pretrain import prepare_pretraining, save_model
from pinrec_hf.training.trainer import newest_checkpoint
from pinrec_hf.training.warm_start import warm_start

NEW = ["fresh", "fresher"]


def today(folder: Path, **changes) -> Path:
    """The log a day later: two new items among which is a target, a new surface and outcomes; three items vanished."""
    items = tiny_items()
    new = items.slice(0, 2).set_column(0, "item_id", pa.array(NEW))
    items = pa.concat_tables([new, items.slice(3)])  # new ones first: rows are the catalogue's, not the file's
    lives = items["available_until"].to_pylist()
    lives[items["item_id"].to_pylist().index("p9")] = datetime(2030, 1, 1)
    items = items.set_column(4, "available_until", pa.array(lives, pa.timestamp("s")))
    end = FIRST_TIME + NUM_DAYS * DAY
    more = [{"user_id": f"u{n}", "surface": "shop", "timestamp": end + n, "item_id": NEW[n % 2]} for n in range(20)]
    more = [{**row, "outcomes": [["buy", "report"][n % 2]]} for n, row in enumerate(more)]
    late = [{**more[0], "timestamp": end + d * DAY, "item_id": "p9"} for d in (1, 2)]
    tables = {"items": items, "queries": tiny_queries(), "negative_outcomes": ["hide", "report"], **changes}
    prepare(pa.Table.from_pylist(tiny_log() + more + late), time_unit="s", output_dir=folder, **tables)
    return folder


@pytest.fixture(scope="module")
def grown_data(tmp_path_factory) -> Path:
    return today(tmp_path_factory.mktemp("today") / "data")


@pytest.fixture(scope="module")
def warm(saved_model, grown_data):
    return warm_start(saved_model, grown_data)


def test_old_answers_keep_their_bits(saved_model, warm, requests_example):
    model, tokenizer = load_pretrained(saved_model)
    assert tokenizer.catalogue.ids(np.arange(NUM_ITEMS)) == warm.tokenizer.catalogue.ids(np.arange(NUM_ITEMS))
    warm.model.eval()
    old = np.arange(NUM_ITEMS)
    assert (encode_items(model, tokenizer) == encode_items(warm.model, warm.tokenizer, old)).all()
    answers = [encode_requests(m, t, requests_example) for m, t in ((model, tokenizer), (warm.model, warm.tokenizer))]
    assert (answers[0] == answers[1]).all()
    assert warm.model.config.outcome_budgets["homefeed"] == model.config.outcome_budgets["homefeed"]


def test_what_is_new_is_there(warm, saved_model):
    model, tokenizer = warm.model, warm.tokenizer
    assert tokenizer.catalogue.rows(NEW).tolist() == [NUM_ITEMS, NUM_ITEMS + 1]
    assert (tokenizer.catalogue.vectors(tokenizer.catalogue.rows(NEW)) == tiny_vectors()[:2]).all()
    table = model.item_encoder.full_ids.weight
    assert len(table) == NUM_ITEMS + 2 + FIRST_ITEM == model.config.num_items + FIRST_ITEM
    assert torch.equal(table[:-2], saved_table(saved_model))
    for row, vector in zip(table[-2:], tiny_vectors()[:2], strict=True):
        cosine = [np.dot(v, vector) / np.linalg.norm(v) for v in tokenizer.catalogue.vectors(np.arange(NUM_ITEMS))]
        nearest = np.argsort(cosine)[-NEIGHBOURS:] + FIRST_ITEM
        torch.testing.assert_close(row, table[nearest].mean(0))
    assert model.config.surfaces[-1] == "shop"
    assert model.config.outcomes[-2:] == ["buy", "report"]
    assert model.config.negative_outcomes == tokenizer.negative_outcomes == ["hide", "report"]
    assert model.config.outcome_budgets["shop"] == {"buy": 1.0}


def saved_table(folder: Path) -> torch.Tensor:
    return load_pretrained(folder)[0].item_encoder.full_ids.weight


def test_a_boost_is_added_to_the_scores_of_new_items_alone(saved_model, warm, requests_example):
    scores = []
    for boost in (0.0, 1.5):
        model, tokenizer = load_pretrained(saved_model)
        users = encode_requests(model, tokenizer, requests_example)
        tokenizer.catalogue = warm.tokenizer.catalogue
        model.add_items(tokenizer.catalogue, boost)
        scores.append(users @ encode_items(model, tokenizer).T)
    assert (scores[1][..., :NUM_ITEMS] == scores[0][..., :NUM_ITEMS]).all()
    np.testing.assert_allclose(scores[1][..., NUM_ITEMS:] - scores[0][..., NUM_ITEMS:], 1.5, rtol=1e-4)


def test_a_boost_needs_the_bias_of_an_id_row(warm):
    model = PinRecModel(PinRecConfig(num_items=1, content_size=4, item_id_embedding=None))
    with pytest.raises(ValueError, match="needs item_id_embedding"):
        model.add_items(warm.tokenizer.catalogue, boost=1.0)


def test_a_shorter_catalogue_is_refused(warm):
    with pytest.raises(ValueError, match="append-only"):
        warm.model.add_items(Catalogue.build(["p1"]))


def test_life_times_are_todays(warm, saved_model):
    old, new = load_pretrained(saved_model)[1].catalogue, warm.tokenizer.catalogue
    p9, others = old.rows(["p9"]), [row for row in range(NUM_ITEMS) if row != old.rows(["p9"])[0]]
    assert old.availability(p9)[0, 1] > new.availability(p9)[0, 1] == datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    assert (old.availability(others) == new.availability(others)).all()  # of those that vanished too


def tiny_vectors() -> np.ndarray:
    return np.array(tiny_items()["embedding"].to_pylist(), np.float32)


def daily(model: Path, data: Path, output: Path) -> list[str]:
    args = arguments(data, output, model=model, recent_days=1, replay=0.2)
    preset = args.index("--preset")
    return args[:preset] + args[preset + 2 :]


def test_a_day_is_trained_killed_or_not_to_the_same_bits(saved_model, grown_data, warm, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(*daily(saved_model, grown_data, whole))
    assert done.returncode == 0, done.stderr[-3000:]
    model, tokenizer = load_pretrained(whole)
    titles = ItemTable(whole / "items.parquet", tokenizer.catalogue)
    assert titles.values("title", tokenizer.catalogue.rows(["p2", "fresher"])) == ["Title of p2", "Title of p1"]
    table = model.item_encoder.full_ids.weight
    assert not torch.equal(table[-2], warm.model.item_encoder.full_ids.weight[-2])  # it was trained
    assert len(build_index(whole)) == NUM_ITEMS + 2

    args = daily(saved_model, grown_data, parts)
    with subprocess.Popen([sys.executable, str(SCRIPT), *args], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while newest_checkpoint(parts.with_name("parts.training")) is None and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert not parts.exists()
    assert run(*args, "--resume", "True").returncode == 0
    assert same_bits(whole, parts)


def test_recent_windows_and_a_share_of_the_others(warm, grown_data):
    encoded = encode_split(grown_data, "train", warm.tokenizer)

    def kept(days: float, replay: float, seed: int = 0) -> SequenceDataset:
        rows = SequenceDataset(encoded, window=6)
        since = rows.time_range()[1] - int(days * DAY)
        rows.keep_recent(warm.tokenizer.positive_mask, NUM_ITEMS + 2, since=since, replay=replay, seed=seed)
        return rows

    every, recent, replayed = kept(100, 0), kept(0.5, 0), kept(0.5, 0.3)
    whole = SequenceDataset(encoded, window=6)
    assert 0 < len(recent) < len(replayed) < len(whole)
    mask, since = warm.tokenizer.positive_mask, whole.time_range()[1] - DAY // 2
    windows = [recent[n] for n in range(len(recent))]
    times = [max(w["timestamps"][(w["outcomes"] & mask) != 0], default=-1) for w in windows]
    assert min(times) > since
    assert len(kept(0.5, 1)) == len(whole) >= len(every)
    assert (kept(0.5, 0.3)._rows == replayed._rows).all()
    assert len(kept(0.5, 0.3, seed=1)) != len(replayed) or (kept(0.5, 0.3, seed=1)._rows != replayed._rows).any()
    # what is counted is what is trained on
    counts = recent.target_counts(mask, NUM_ITEMS + 2)
    assert 0 < counts.sum() < whole.target_counts(mask, NUM_ITEMS + 2).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": tiny_items().drop_columns("embedding")}, "width 0, the model's catalogue 8"),
        ({"negative_outcomes": ["report"]}, "changed between positive and negative"),
    ],
)
def test_data_of_another_kind_is_refused(saved_model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        warm_start(saved_model, today(tmp_path / "data", **change))


def test_ids_of_another_type_are_refused(saved_model, grown_data, tmp_path):
    shutil.copytree(grown_data, tmp_path / "data")
    items = pq.read_table(tmp_path / "data" / "items.parquet")
    pq.write_table(items.set_column(0, "item_id", pa.array(range(len(items)))), tmp_path / "data" / "items.parquet")
    with pytest.raises(ValueError, match="string ids"):
        warm_start(saved_model, tmp_path / "data")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "yesterday", "preset": "tiny"}, "leave out --preset"),
        ({"model": "yesterday", "config_overrides": "{}"}, "leave out --preset"),
        ({"revision": "main"}, "of a --model, which is missing"),
        ({"replay": 0.2}, "give that too"),
        ({"recent_days": 0.0}, "must be above 0"),
        ({"recent_days": 1.0, "replay": 1.5}, "between 0 and 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(grown_data, tmp_path, given, message):
    training_args = PinRecTrainingArguments(output_dir=str(tmp_path / "model"), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        prepare_pretraining(DataArguments(data=str(grown_data)), ModelArguments(**given), training_args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config_overrides": '{"preset": "base"}'}, "'preset'.*--preset decide"),
        ({"config_overrides": '{"time_offsets": [0, 30]}'}, "give --target window"),
        ({"config_overrides": '{"signals": ["surface"]}', "architecture": "sasrec"}, "fixed .*signals.*gives another"),
    ],
)
def test_configs_that_would_be_ignored_are_refused(grown_data, tmp_path, given, message):
    training_args = PinRecTrainingArguments(output_dir=str(tmp_path / "model"), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        prepare_pretraining(DataArguments(data=str(grown_data)), ModelArguments(**given), training_args)


def test_a_model_goes_on_as_what_it_is(saved_model, grown_data, tmp_path):
    training_args = PinRecTrainingArguments(output_dir=str(tmp_path / "model"), use_cpu=True)
    given = ModelArguments(model=str(saved_model), architecture="sasrec")
    with pytest.raises(ValueError, match=r"fixed .*signals.* has another"):
        prepare_pretraining(DataArguments(data=str(grown_data)), given, training_args)


def test_a_model_without_queries_does_not_take_all_of_them_for_one(tmp_path):
    log, training_args = pa.Table.from_pylist(tiny_log()), PinRecTrainingArguments(output_dir="unused", use_cpu=True)
    about = {"items": tiny_items(), "negative_outcomes": ["hide"], "time_unit": "s"}
    prepare(log.filter(log["item_id"].is_valid()).drop_columns("query"), output_dir=tmp_path / "before", **about)
    prepare(log, output_dir=tmp_path / "today", **about)
    first = prepare_pretraining(
        DataArguments(data=str(tmp_path / "before")), ModelArguments(preset="tiny"), training_args
    )
    folder = tmp_path / "model"
    save_model(first.model_class(first.config), first.tokenizer, folder)
    shutil.copyfile(tmp_path / "before" / "items.parquet", folder / "items.parquet")
    with pytest.raises(ValueError, match=r"has search queries; .* without the column `query`"):
        prepare_pretraining(
            DataArguments(data=str(tmp_path / "today")), ModelArguments(model=str(folder)), training_args
        )
