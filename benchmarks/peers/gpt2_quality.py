"""A GPT-2 of transformers with full softmax over the items, trained by the clock; the lists that it recommends.

Called by benchmarks/public_peers.py, in the project's own environment. As large as PinRec's preset `small` (width 128,
2 layers, 4 heads), tied embeddings; AdamW with PinRec's schedule: warm-up, then a cosine that ends with the time.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

K = 50
WARMUP = 0.05


def batches(histories: list[np.ndarray], rows: int, rng: np.random.Generator):
    """Endless batches of similar lengths: ids from 1, 0 where a row is shorter, and the epochs so far."""
    epoch = 0
    while True:
        order = rng.permutation(len(histories))
        groups = [sorted(order[i : i + 50 * rows], key=lambda n: len(histories[n]))
                  for i in range(0, len(order), 50 * rows)]  # fmt: skip
        parts = [group[i : i + rows] for group in groups for i in range(0, len(group), rows)]
        for done, part in enumerate(rng.permutation(len(parts)), start=1):
            yield padded([histories[n] for n in parts[part]]), epoch + done / len(parts)
        epoch += 1


def padded(rows: list[np.ndarray]) -> torch.Tensor:
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values + 1
    return torch.from_numpy(ids)


def train(model: GPT2LMHeadModel, histories: list[np.ndarray], rows: int, minutes: float, rate: float, seed: int):
    """Trains for so many minutes of CPU time; returns the epochs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    start, share, epochs = time.process_time(), 0.0, 0.0
    for ids, epochs in batches(histories, rows, np.random.default_rng(seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, share / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        hidden = model.transformer(ids[:, :-1], attention_mask=(ids[:, :-1] > 0).long()).last_hidden_state
        wanted = ids[:, 1:]
        logits = model.lm_head(hidden[wanted > 0])
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted > 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = (time.process_time() - start) / (60 * minutes)
        if share >= 1:
            return epochs


@torch.inference_mode()
def recommend(model: GPT2LMHeadModel, histories: list[np.ndarray], length: int) -> np.ndarray:
    """`(requests, K)` catalogue rows, best first, seen ones removed."""
    model.eval()
    found = []
    for start in range(0, len(histories), 256):
        part = histories[start : start + 256]
        kept = [history[-length:] for history in part]
        ids = padded(kept)
        hidden = model.transformer(ids, attention_mask=(ids > 0).long()).last_hidden_state
        last = hidden[torch.arange(len(part)), torch.tensor([len(history) - 1 for history in kept])]
        scores = model.lm_head(last)
        scores[:, 0] = -torch.inf
        for score, history in zip(scores, part, strict=True):
            score[torch.from_numpy(history + 1)] = -torch.inf
        found.append(scores.topk(K).indices.numpy() - 1)
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="npz of user, item: in the order of each user")
    parser.add_argument("--requests", type=Path, nargs="+", required=True, help="npzs of offsets, items")
    parser.add_argument("--output", type=Path, required=True, help="folder for <requests>-<minutes>.npz")
    parser.add_argument("--minutes", type=float, nargs="+", required=True, help="CPU minutes; a run each")
    parser.add_argument("--items", type=int, required=True, help="of the catalogue")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--rows", type=int, required=True, help="a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    events = np.load(args.train)
    user, item = events["user"], events["item"]
    whole = np.split(item, np.flatnonzero(np.diff(user)) + 1)
    # a history longer than the model reads gives several rows, counted from its newest event
    histories = [h[max(0, end - args.length) : end] for h in whole for end in range(len(h), 1, -args.length)]
    histories = [history for history in histories if len(history) > 1]
    args.output.mkdir(parents=True, exist_ok=True)
    for minutes in args.minutes:
        set_seed(args.seed)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=args.items + 1, n_positions=args.length, n_embd=128, n_layer=2, n_head=4,
            resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout,
            bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
        epochs = train(model, histories, args.rows, minutes, args.rate, args.seed)
        for requests in args.requests:
            given = np.load(requests)
            rows = recommend(model, np.split(given["items"], given["offsets"][1:-1]), args.length)
            np.savez(args.output / f"{requests.stem}-{minutes:g}.npz", rows=rows, epochs=epochs)


if __name__ == "__main__":
    main()
