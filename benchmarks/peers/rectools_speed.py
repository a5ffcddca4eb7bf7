"""RecTools' SASRec, timed in an environment of its own (`make .venv-peers`): benchmarks/speed.py asks, this answers.

    python rectools_speed.py INTERACTIONS.npz '{"n_factors": 64, ...}'

A line of JSON in, a line of JSON out: {"do": "train", "batches": 2}, {"do": "encode", "times": 20} or
{"do": "recommend", "times": 3} give {"seconds": [...], "sequences": n, "events": n}. Seconds are the processor's.
Its own loader, model, loss and optimizer take the step, without Lightning around them.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from rectools.dataset import Dataset
from rectools.models import SASRecModel

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def seconds(work: Callable[[], object], times: int = 1) -> list[float]:
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return found


class Timed:
    def __init__(self, file: str, settings: dict) -> None:
        rows = pd.DataFrame(dict(np.load(file)))
        self.dataset = Dataset.construct(rows.assign(datetime=pd.to_datetime(rows["datetime"], unit="s"), weight=1.0))
        self.model = SASRecModel(deterministic=False, recommend_torch_device="cpu", **settings)
        self.model._build_model_from_dataset(self.dataset)
        self.model.is_fitted = True  # speed does not depend on it
        self.lightning = self.model.lightning_model
        self.lightning._xavier_normal_init()
        self.lightning.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Lightning trainer
        self.optimizer = self.lightning.configure_optimizers()
        self.loader = self.model.data_preparator.get_dataloader_train()
        self.batches = self._forever()
        self.user = rows["user_id"].mode()[0]  # with the longest history

    def _forever(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.loader

    def train(self, batches: int) -> dict[str, object]:
        sizes = []

        def steps() -> None:
            for _ in range(batches):
                batch = next(self.batches)
                self.lightning.training_step(batch, 0).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                sizes.append((len(batch["x"]), int((batch["y"] != 0).sum())))

        self.lightning.train()
        taken = seconds(steps)
        return {"seconds": taken, "sequences": sum(n for n, _ in sizes), "events": sum(n for _, n in sizes)}

    def encode(self, times: int) -> dict[str, object]:
        """One user's items, as internal ids in a list, to the embedding; items' embeddings are there already."""
        torch_model, length = self.lightning.torch_model.eval(), self.model.session_max_len
        with torch.inference_mode():
            items = torch_model.item_model.get_all_embeddings()
            history = (np.arange(length) + 1).tolist()
            return {
                "seconds": seconds(
                    lambda: torch_model.encode_sessions({"x": torch.tensor([history])}, items)[:, -1].numpy(), times
                )
            }

    def recommend(self, times: int) -> dict[str, object]:
        """What its users call."""
        return {
            "seconds": seconds(
                lambda: self.model.recommend(users=[self.user], dataset=self.dataset, k=10, filter_viewed=True), times
            )
        }


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    timed = Timed(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(timed, asked.pop("do"))(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    main()
