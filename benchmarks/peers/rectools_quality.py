"""RecTools' SASRec, or its eSASRec recipe (LiGR layers), trained by the clock; the lists that it recommends.

Runs in an environment of its own (`make .venv-peers`: RecTools wants numpy < 2), called by benchmarks/public_peers.py.
Settings are the published ones (github.com/blondered/transformer_benchmark, "Hyperparameters for all datasets"):
sampled softmax with 256 negatives, learning rate .001, batches of 128. Training is stopped by CPU time on one thread.
At each mark the weights are kept, so that one run gives the whole curve: its learning rate is constant.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers

K = 50


class Marks(Callback):
    """Keeps the weights at each mark of CPU time, and stops training at the last one."""

    def __init__(self, minutes: list[float]) -> None:
        self.left, self.weights, self.epochs = sorted(minutes), {}, {}

    def on_train_start(self, trainer, module):
        self.start, self.batches = time.process_time(), trainer.num_training_batches

    def on_train_batch_end(self, trainer, module, *args):
        while self.left and time.process_time() - self.start >= 60 * self.left[0]:
            mark = self.left.pop(0)
            self.weights[mark] = {name: value.clone() for name, value in module.torch_model.state_dict().items()}
            self.epochs[mark] = (trainer.global_step + 1) / self.batches
        trainer.should_stop = not self.left


def dataset(users: np.ndarray, items: np.ndarray) -> Dataset:
    """Interactions in the order given: users and catalogue rows."""
    return Dataset.construct(pd.DataFrame({
        Columns.User: users, Columns.Item: items, Columns.Weight: 1.0,
        Columns.Datetime: pd.to_datetime(np.arange(len(users)), unit="s"),
    }))  # fmt: skip


def recommend(model: SASRecModel, offsets: np.ndarray, items: np.ndarray) -> np.ndarray:
    """`(requests, K)` catalogue rows, best first, seen ones removed; -1 where RecTools has none."""
    count = len(offsets) - 1
    found = model.recommend(
        users=np.arange(count), dataset=dataset(np.repeat(np.arange(count), np.diff(offsets)), items), k=K,
        filter_viewed=True, on_unsupported_targets="ignore",
    )  # fmt: skip
    rows = np.full((count, K), -1)
    rows[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="npz of user, item: in the order of each user")
    parser.add_argument("--requests", type=Path, nargs="+", required=True, help="npzs of offsets, items")
    parser.add_argument("--output", type=Path, required=True, help="folder for <requests>-<minutes>.npz")
    parser.add_argument("--minutes", type=float, nargs="+", required=True, help="CPU minutes of the marks")
    parser.add_argument("--ligr", action="store_true", help="eSASRec: LiGR layers")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--feed-forward", type=int, default=4, help="its width over the model's, with --ligr")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed_everything(args.seed)
    train = np.load(args.train)
    marks = Marks(args.minutes)
    ligr = {
        "transformer_layers_type": LiGRLayers,
        "transformer_layers_kwargs": {"ff_factors_multiplier": args.feed_forward},
        "use_key_padding_mask": True,
    }
    model = SASRecModel(
        n_factors=args.factors, n_blocks=args.blocks, n_heads=1, session_max_len=args.length, dropout_rate=args.dropout,
        loss="sampled_softmax", n_negatives=256, lr=1e-3, batch_size=128, **(ligr if args.ligr else {}),
        get_trainer_func=lambda: Trainer(
            max_epochs=10_000, accelerator="cpu", callbacks=[marks], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ),
    )  # fmt: skip
    model.fit(dataset(train["user"], train["item"]))
    # the trainer works on a copy of the callback
    marks = next(c for c in model.fit_trainer.callbacks if isinstance(c, Marks))
    args.output.mkdir(parents=True, exist_ok=True)
    for mark, weights in marks.weights.items():
        model.lightning_model.torch_model.load_state_dict(weights)
        for requests in args.requests:
            rows = recommend(model, **np.load(requests))
            np.savez(args.output / f"{requests.stem}-{mark:g}.npz", rows=rows, epochs=marks.epochs[mark])


if __name__ == "__main__":
    main()
