"""What pretraining does where nothing is said follows from the data, and a clock can end it."""

import math
from pathlib import Path

import pyarrow as pa
import pytest

from pinrec_hf.data.prepare import prepare
from pinrec_hf.training.arguments import DataArguments, ModelArguments, PinRecTrainingArguments
from pinrec_hf.training.pretrain import Pretraining, prepare_pretraining
from pinrec_hf.training.trainer import Deadline

DAY = 86_400


def pretraining(data: Path, overrides: str = "{}", **arguments: int) -> tuple[Pretraining, PinRecTrainingArguments]:
    training_args = PinRecTrainingArguments(output_dir="unused", use_cpu=True, **arguments)
    model_args = ModelArguments(preset="tiny", config_overrides=overrides)
    run = prepare_pretraining(DataArguments(data=str(data)), model_args, training_args)
    return run, training_args


@pytest.fixture
def daily(tmp_path: Path) -> Path:
    """100 users with 30 events, known to the day; 40 items with 3 features among 5."""
    log = [
        {"user_id": user, "item_id": (user + 7 * event) % 40, "timestamp": (15_000 + event) * DAY}
        for user in range(100) for event in range(30)
    ]  # fmt: skip
    items = [{"item_id": i, "features": [f"tag={(i + j) % 5}" for j in range(3)]} for i in range(40)]
    prepare(
        pa.Table.from_pylist(log),
        items=pa.Table.from_pylist(items),
        time_unit="s",
        leave_one_out=True,
        output_dir=tmp_path / "data",
    )
    return tmp_path / "data"


def test_defaults_of_a_log_known_to_the_day(daily: Path) -> None:
    run, training_args = pretraining(daily)
    assert run.config.signals == ["surface", "outcome", "context"]
    assert run.config.dropout == 0.2
    assert run.config.softmax == "full"
    assert run.config.feature_buckets == 16
    assert run.config.hash_table_size == 1
    assert training_args.per_device_train_batch_size == 16  # of 28 events each
    assert run.collator.uniform_negatives == 64
    assert training_args.num_train_epochs == 20


def test_what_is_said_is_done(daily: Path) -> None:
    run, training_args = pretraining(daily, per_device_train_batch_size=4, num_train_epochs=2)
    assert (training_args.per_device_train_batch_size, training_args.num_train_epochs) == (4, 2)
    assert run.collator.uniform_negatives == 256


def test_hashed_ids_keep_their_tables(daily: Path) -> None:
    assert pretraining(daily, '{"item_id_embedding": "hashed"}')[0].config.hash_table_size > 1


def test_a_log_with_times_and_queries_keeps_both(tiny_data: Path) -> None:
    run = pretraining(tiny_data)[0]
    assert "time" in run.config.signals
    assert run.config.hash_table_size > 1


def test_a_deadline_decays_the_learning_rate_by_the_clock() -> None:
    now = 100.0
    deadline = Deadline(minutes=10, warmup=0.1, clock=lambda: now)
    rates = []
    for now in (100.0, 130.0, 160.0, 400.0, 700.0):  # noqa: B007  # the clock reads it
        rates.append(deadline.learning_rate(step=0))
    cosine = [(1 + math.cos(math.pi * share)) / 2 for share in (0, 0.05, 0.1, 0.5, 1)]
    assert rates == pytest.approx([0, 0.5 * cosine[1], cosine[2], cosine[3], 0])
    assert deadline.share == 1
