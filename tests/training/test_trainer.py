"""The clock that ends training, old checkpoints that go, and what the Trainer may not be told."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.training.arguments import DataArguments, FinetuningTrainingArguments, PinRecTrainingArguments
from pinrec_hf.training.record import spelled_out
from pinrec_hf.training.trainer import COMPLETE, Deadline, EarlyStopping, PinRecTrainer, newest_checkpoint, one_a_group


def test_the_clock_ends_training_at_a_learning_rate_of_nothing():
    now = [100.0]
    deadline = Deadline(minutes=2, warmup=0.05, clock=lambda: now[0])
    now[0] = 500.0  # what came before training does not count
    deadline.on_train_begin(None, None, None)
    seen, stopped = [], []
    for seconds in (0, 3, 6, 60, 119, 121):
        now[0] = 500.0 + seconds
        control = SimpleNamespace(should_training_stop=False)
        deadline.on_step_end(None, None, control)
        seen.append(deadline.learning_rate(step=1))
        stopped.append(control.should_training_stop)
    assert stopped == [False] * 5 + [True]
    assert seen[0] == 0
    assert seen[1] == pytest.approx(0.5, abs=0.01)  # half of the warm-up
    assert seen[2] == pytest.approx(1, abs=0.01)
    assert seen[3] == pytest.approx(0.5)
    assert seen[2] > seen[3] > seen[4] > seen[5] == 0


def test_workers_that_would_never_learn_the_epoch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--dataloader_persistent_workers"):
        PinRecTrainingArguments(output_dir=str(tmp_path), dataloader_persistent_workers=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "Window"}, "--target 'Window' is none of"),
        ({"target_window": 0}, "--target_window 0"),
        ({"recency_half_life_days": 0}, "--recency_half_life_days 0 must be above 0"),
        ({"recency_half_life_days": -1.0}, "--recency_half_life_days"),
        ({"condition_dropout": 15}, "--condition_dropout 15 is a share"),
        ({"time_dropout": -0.1}, "--time_dropout -0.1 is a share"),
        ({"uniform_negatives": -1}, "--uniform_negatives -1"),
        ({"validation_users": 0}, "--validation_users 0"),
    ],
)
def test_arguments_that_would_train_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(data="data", **given)


def test_a_clock_needs_minutes_and_takes_what_epochs_they_allow(tmp_path):
    with pytest.raises(ValueError, match="--max_minutes 0 must be above 0"):
        PinRecTrainingArguments(output_dir=str(tmp_path), max_minutes=0)
    arguments = {"output_dir": str(tmp_path), "use_cpu": True}
    for given, epochs in (({}, 3), ({"num_train_epochs": 7}, 7), ({"num_train_epochs": 7, "max_minutes": 1}, 7)):
        finetuning = FinetuningTrainingArguments(**arguments, **given)
        finetuning.fill_epochs(3)
        assert finetuning.num_train_epochs == epochs
    finetuning = FinetuningTrainingArguments(**arguments, max_minutes=1)
    finetuning.fill_epochs(3)
    assert finetuning.num_train_epochs > 1_000


def test_of_labels_that_compete_one_counts(tmp_path):
    labels = torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100]])
    groups = torch.tensor([[0, 0, 1, 0], [3, 3, 0, 0]])
    assert one_a_group(labels, groups).tolist() == [[5, -100, 7, -100], [8, -100, -100, -100]]
    model = PinRecModel(PinRecConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, num_items=9))
    none = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "per_device_train_batch_size": 2,
    }
    trainer = PinRecTrainer(model, PinRecTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **none))
    batch = {"labels": labels}
    assert int(trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))) == 10
    batch["label_groups"] = groups
    assert int(trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))) == 6


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_a_kill_while_old_checkpoints_go_leaves_whole_ones(tmp_path, monkeypatch, limit):
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    trainer = object.__new__(PinRecTrainer)
    trainer.args = SimpleNamespace(save_total_limit=limit)
    trainer.state = SimpleNamespace(best_model_checkpoint="elsewhere/checkpoint-3")

    def killed(path):
        raise KeyboardInterrupt

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed)
    victims = {1: [6, 9], 2: [6, 9], 3: [6], None: []}[limit]
    if victims:
        with pytest.raises(KeyboardInterrupt):
            trainer._rotate(tmp_path / "checkpoint-12")
        assert not (tmp_path / "checkpoint-6" / COMPLETE).exists()
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    monkeypatch.setattr(shutil, "rmtree", remove)
    trainer._rotate(tmp_path / "checkpoint-12")
    left = sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())
    assert left == [step for step in (3, 6, 9, 12) if step not in victims]


def test_a_run_that_had_stopped_early_stops_again_after_a_kill():
    """Its weights are the best checkpoint's either way."""
    args = SimpleNamespace(metric_for_best_model="eval_recall@10", greater_is_better=True)
    state, stopping = SimpleNamespace(best_metric=0.5), EarlyStopping(2)
    for recall, stops in ((0.4, False), (0.3, True)):
        control = SimpleNamespace(should_training_stop=False)
        stopping.on_evaluate(args, state, control, {"eval_recall@10": recall})
        assert control.should_training_stop is stops
    saved = stopping.state()
    restored = EarlyStopping(**saved["args"])
    for name, value in saved["attributes"].items():
        setattr(restored, name, value)
    for callback, stops in ((restored, True), (EarlyStopping(2), False)):
        control = SimpleNamespace(should_training_stop=False)
        callback.on_step_end(args, state, control)
        assert control.should_training_stop is stops


def test_the_record_leaves_resuming_out():
    assert spelled_out(["--data", "d", "--resume", "True", "--seed", "1"]) == ["--data", "d", "--seed", "1"]
    assert spelled_out(["--data", "d", "--resume", "--seed", "1"]) == ["--data", "d", "--seed", "1"]
    assert spelled_out(["--data", "d", "--resume=True"]) == ["--data", "d"]
