"""From nothing to recommendations: simulate, pretrain, compare, finetune a surface, recommend. Run by `make demo`.

Every step is a command that works on your own logs too; it is printed before it runs.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from pinrec_hf.data.simulator.oracle import best_reachable_recall

WORK, MODEL = Path("demo"), Path("pinrec-base")
BIN = Path(sys.executable).parent
# large allocations from the heap instead of fresh pages: a third less training time on a CPU
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32), "HF_HUB_OFFLINE": "1"}
# chosen on validation, the same for all three: two weeks are too short a log to learn times of day and week from
CONFIG = '{"signals": ["surface", "outcome", "context"], "max_position_embeddings": 128}'


def run(command: str) -> None:
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    subprocess.run([BIN / program, *arguments], check=True, env={**os.environ, **ENVIRONMENT})


LAUNCH = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu"


def pretrain(architecture: str, output_dir: Path) -> None:
    run(
        f"{LAUNCH} training/pretrain.py --data {WORK}/data --architecture {architecture} --output_dir {output_dir} "
        f"--num_train_epochs 4 --per_device_train_batch_size 8 --logging_steps 100 --config_overrides '{CONFIG}'"
    )


def main() -> None:
    adapter = MODEL / "adapters" / "search"
    if left := [str(folder) for folder in (WORK, MODEL) if folder.exists()]:
        sys.exit(f"{', '.join(left)} left from another run: remove them first (rm -rf {' '.join(left)})")
    start = time.time()
    run(f"pinrec simulate --size 100000 --output-dir {WORK}/simulated")
    run(
        f"pinrec prepare --log {WORK}/simulated/log --items {WORK}/simulated/items.parquet "
        f"--queries {WORK}/simulated/queries.parquet --negative-outcome hide --output-dir {WORK}/data"
    )
    pretrain("pinrec", MODEL)
    pretrain("two_tower", WORK / "two-tower")
    pretrain("sasrec", WORK / "sasrec")
    run(f"pinrec index --model {MODEL}")
    run(
        f"pinrec evaluate --model {MODEL} --data {WORK}/data --split test --output-dir {WORK}/report "
        f"--baseline two-tower={WORK}/two-tower --baseline SASRec={WORK}/sasrec"
    )
    systems = json.loads((WORK / "report" / "evaluation.json").read_text())["evaluations"]
    best = best_reachable_recall(WORK / "simulated")
    for k in (10, 50):
        reachable = best[f"expected_recall@{k}"]
        shares = [f"{s['name']} {s['metrics'][f'recall@{k}']['value'] / reachable:.0%}" for s in systems]
        print(f"recall@{k}: best reachable {reachable:.3f}; share of it: {', '.join(shares)}")

    user = pq.read_table(WORK / "data" / "test", columns=["user_id"])["user_id"][0].as_py()
    query = pq.read_table(WORK / "data" / "queries.parquet", columns=["query"])["query"][0].as_py()
    run(
        f"{LAUNCH} training/finetune.py --data {WORK}/data --model {MODEL} --surface search --lora "
        f"--output_dir {adapter} --num_train_epochs 2 --per_device_train_batch_size 8"
    )
    whose = f"--model {MODEL} --data {WORK}/data --user {user}"
    run(f"pinrec recommend {whose} --surface homefeed")
    search = f"pinrec recommend {whose} --adapter search={adapter} --surface search --query '{query}'"
    run(f"{search} --outcome save=0.7 --outcome click=0.3")
    run(f"{search} --outcome click")
    run(f"pinrec trace {whose} --surface homefeed --num-steps 4 --picture {WORK}/trace.png")
    print(f"\n{time.time() - start:.0f} s in all. The report: {WORK}/report/report.html; the model: {MODEL}/")
    print("In a browser, after `pip install '.[demo]'`:")
    print(f"pinrec demo --model {MODEL} --data {WORK}/data --compare {WORK}/two-tower")
    print(f"Before you train on your own log: rm -rf {WORK} {MODEL}")


if __name__ == "__main__":
    main()
