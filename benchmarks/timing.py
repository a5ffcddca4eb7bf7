"""What benchmarks/speed.py times: training loops of this library, GPT-2 and RecTools; random catalogues of any size."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import ENVIRONMENT, ROOT, prepared, read_plan

from pinrec_hf.data.collator import PretrainingCollator
from pinrec_hf.data.windows import LengthGroupedSampler
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.configuration_pinrec import FIRST_ITEM, ITEM_EVENT, PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import EVENT_COLUMNS, EncodedRow, PinRecTokenizer
from pinrec_hf.training.arguments import DataArguments, ModelArguments, PinRecTrainingArguments
from pinrec_hf.training.pretrain import Pretraining, prepare_pretraining
from pinrec_hf.training.table_adam import TableAdamW, clip_gradients, make_large_tables_sparse

PLAN = read_plan("speed")
BATCH, LENGTH = PLAN["batch_size"], PLAN["length"]
NOW = 1_735_689_600
SURFACES, OUTCOMES = ["homefeed", "search"], ["save", "click"]
PEERS = os.environ.get("PINREC_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def take_turns(**runs: Callable[[], float]) -> dict[str, float]:
    """Each one's median over the repeats, after one run to warm up."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(PLAN["repeats"]):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def p50(work: Callable[[], object], times: int = 20) -> Callable[[], float]:
    return lambda: statistics.median(seconds(work) for _ in range(times))


# -- training ------------------------------------------------------------------------------------------------------


class Steps:
    """A training loop's inside: loader, forward, backward, clipping, optimizer."""

    def __init__(self, loader: Any, model: torch.nn.Module, loss: Callable[[Any], torch.Tensor]) -> None:
        self.loader, self.model, self.loss = loader, model.train(), loss
        make_large_tables_sparse(model)
        self.optimizer = TableAdamW(model.parameters(), lr=1e-3, fused=True)  # as the Trainer makes it
        self.batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def step(self, batch: Any) -> None:
        self.loss(batch).backward()
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> float:
        """Seconds a sequence."""
        taken = seconds(lambda: [self.step(next(self.batches)) for _ in range(PLAN["batches"])])
        return taken / (PLAN["batches"] * BATCH)


def movielens(softmax: str) -> Pretraining:
    data = prepared("ml1m", "ml1m")
    config = {**PLAN["model"], "softmax": softmax}
    return prepare_pretraining(
        DataArguments(data=str(data), uniform_negatives=PLAN["negatives"] // BATCH),
        ModelArguments(config_overrides=json.dumps(config)),
        PinRecTrainingArguments(output_dir="unused", use_cpu=True, per_device_train_batch_size=BATCH),
    )


def loader_of(run: Pretraining, collate: Callable[[list[EncodedRow]], Any] | None = None) -> Any:
    return torch.utils.data.DataLoader(
        run.dataset, BATCH, sampler=LengthGroupedSampler(run.dataset.lengths, BATCH, 0),
        collate_fn=collate or run.collator, drop_last=True,
    )  # fmt: skip


def pinrec_steps(run: Pretraining) -> Steps:
    torch.manual_seed(0)
    model = run.model_class(run.config)
    return Steps(loader_of(run), model, lambda batch: model(**batch).loss)


def gpt2(items: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = PLAN["model"]
    config = GPT2Config(
        vocab_size=items + FIRST_ITEM, n_positions=LENGTH + 1, n_embd=size["hidden_size"],
        n_layer=size["num_hidden_layers"], n_head=size["num_attention_heads"], resid_pdrop=size["dropout"],
        embd_pdrop=size["dropout"], attn_pdrop=size["dropout"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def token_ids(windows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    """The same windows for GPT-2, padded on the right."""
    ids = np.zeros((len(windows), max(len(window["items"]) for window in windows) + 1), np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[1 : 1 + len(window["items"])] = window["items"]
    mask = np.arange(ids.shape[1]) <= np.array([[len(window["items"])] for window in windows])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(np.where(mask, ids, -100)),
    }


class Peer:
    """RecTools in its own process."""

    def __init__(self, run: Pretraining, folder: str, **settings: Any) -> None:
        rows = np.repeat(np.arange(len(run.dataset.row_lengths)), run.dataset.row_lengths)
        columns = {name: np.concatenate(list(run.dataset.column(name))) for name in ("items", "timestamps")}
        path = Path(folder) / "interactions.npz"
        np.savez(path, user_id=rows, item_id=columns["items"], datetime=columns["timestamps"])
        size = PLAN["model"]
        given = {
            "n_factors": size["hidden_size"], "n_blocks": size["num_hidden_layers"],
            "n_heads": size["num_attention_heads"], "dropout_rate": size["dropout"], "session_max_len": LENGTH,
            "batch_size": BATCH, **settings,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [PEERS, str(ROOT / "benchmarks" / "peers" / "rectools_speed.py"), str(path), json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer died; see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def seconds_a_sequence(self) -> float:
        answer = self.ask(do="train", batches=PLAN["batches"])
        return answer["seconds"][0] / answer["sequences"]

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def peer(run: Pretraining, **settings: Any) -> Iterator[Peer]:
    with tempfile.TemporaryDirectory() as folder:
        asked = Peer(run, folder, **settings)
        try:
            yield asked
        finally:
            asked.close()


# -- catalogues of any size ----------------------------------------------------------------------------------------


def random_tokenizer(items: int | Catalogue, length: int, outcomes: Sequence[str] = OUTCOMES) -> PinRecTokenizer:
    catalogue = Catalogue.build(np.arange(items)) if isinstance(items, int) else items
    names = {"surfaces": SURFACES, "outcomes": list(outcomes)}
    return PinRecTokenizer(catalogue=catalogue, model_max_length=length, **names)


def random_model(tokenizer: PinRecTokenizer, preset: str = "small", **config: Any) -> PinRecModel:
    """Of random weights: speed does not depend on training."""
    torch.manual_seed(0)
    return PinRecModel(
        PinRecConfig.from_preset(
            preset, surfaces=tokenizer.surfaces, outcomes=tokenizer.outcomes, num_items=len(tokenizer.catalogue),
            catalogue_fingerprint=tokenizer.catalogue.fingerprint,
            **{"max_position_embeddings": tokenizer.model_max_length, "hash_table_size": 1, **config},
        )
    )  # fmt: skip


def hashed(items: int) -> dict[str, Any]:
    """Config of hashed ids: ten items a row, two functions, 65,536 rows at least."""
    return {"item_id_embedding": "hashed", "hash_table_size": max(65_536, items // 10)}


def random_batches(tokenizer: PinRecTokenizer, count: int) -> Iterator[Any]:
    """Training batches of users whose items are drawn uniformly: the worst that a large table can meet."""
    rng, items = np.random.default_rng(0), len(tokenizer.catalogue)
    collator = PretrainingCollator(
        tokenizer, np.full(items + FIRST_ITEM, 1 / items, np.float32), uniform_negatives=PLAN["negatives"] // BATCH
    )
    for number in range(count):
        windows = []
        for user in range(BATCH):
            window: EncodedRow = {name: np.ones(LENGTH, kind) for name, kind in EVENT_COLUMNS.items()}
            window["types"] = np.full(LENGTH, ITEM_EVENT, np.int8)
            window["items"] = rng.integers(items, size=LENGTH) + FIRST_ITEM
            window["outcomes"] = np.full(LENGTH, 2)
            window["timestamps"] = np.sort(rng.integers(NOW - 10**6, NOW, LENGTH))
            window["queries"], window["features"] = np.zeros((2, LENGTH), np.int64)
            windows.append({**window, "key": np.array([number, user])})
        yield collator(windows)


def random_requests(items: int, events: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "user_id": f"u{user}",
            "history": {
                "item_id": rng.integers(items, size=events).tolist(),
                "surface": [SURFACES[n] for n in rng.integers(2, size=events)],
                "outcomes": [[OUTCOMES[n]] for n in rng.integers(2, size=events)],
                "timestamp": np.sort(rng.integers(NOW - 10**6, NOW, events)).tolist(),
            },
            "surface": "homefeed",
            "timestamp": NOW,
        }
        for user in range(count)
    ]
