"""The clock that ends training, and what the Trainer may not be told."""

from types import SimpleNamespace

import pytest

from pinrec_hf.training.arguments import PinRecTrainingArguments
from pinrec_hf.training.trainer import Deadline


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
