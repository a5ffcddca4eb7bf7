"""Prequential evaluation (Dawid 1984): day by day, models are trained on all days before and tested on that day.

Cold models begin from nothing every day; warm ones go on from their own of the day before. Both are made as a team
makes them daily: the log is prepared with the day's split, and training/pretrain.py is run.

    OUTPUT/plan.json                  what was asked for
    OUTPUT/DAY/data, OUTPUT/DAY/NAME  the dataset whose test is that day, and models of it, whole or absent
    OUTPUT/prequential.json           a row a day, written as soon as the day is done
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pinrec_hf.data.contract import parse_time
from pinrec_hf.data.output import only_run, replaced
from pinrec_hf.data.prepare import prepare
from pinrec_hf.data.splits import DAY
from pinrec_hf.evaluation.evaluate import Evaluation, compare, evaluate
from pinrec_hf.evaluation.protocol import load_requests, only_targets
from pinrec_hf.evaluation.ranker import load_retriever
from pinrec_hf.modeling.catalogue_pinrec import Catalogue

ROWS = "prequential.json"
KS = (10, 50)
OURS = {
    "prepare": {"output_dir", "validation_start", "test_start", "test_end", "leave_one_out", "num_targets"},
    "pretrain": {"data", "output_dir", "model", "revision", "resume", "architecture"},
}
"""Arguments that are not the plan's to give."""


@dataclass(frozen=True)
class Plan:
    """What is trained and tested; a YAML file holds these fields.

    Attributes:
        prepare: arguments of `prepare`, without those of the split: `log`, `items`, `negative_outcomes`, ...
        start: of the first day that is tested, in seconds or ISO 8601, UTC unless it says otherwise. days: how many.
        cold, warm: arguments of training/pretrain.py by the model's name. The first cold model is what the others are
            compared with; that of the day before `start` is what every warm one goes on from on the first day.
        validation_hours: before each tested day, which choose the checkpoint and are not trained on.

    Raises:
        ValueError: no day or cold model, names that are no folder's or not distinct, or arguments that are not the
            plan's to give.
    """

    prepare: dict[str, Any]
    start: int | float | str
    days: int
    cold: dict[str, dict[str, Any]]
    warm: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation_hours: float = 1

    def __post_init__(self) -> None:
        names = [*self.cold, *self.warm]
        if self.days < 1 or not self.cold or self.validation_hours <= 0:
            raise ValueError("a plan needs days >= 1, a cold model and validation_hours above 0")
        if len(set(names)) < len(names):
            raise ValueError(f"models of one name: {names}; give each its own")
        for name in names:
            if not re.fullmatch(r"[\w][\w .-]*", name) or name == "data":
                raise ValueError(f"model {name!r} is to be a folder's name: letters, digits, spaces, dots and dashes")
        if unknown := sorted(self.prepare.keys() - inspect.signature(prepare).parameters.keys()):
            raise ValueError(f"prepare has no argument {unknown[0]!r}")
        given = {"prepare": [self.prepare], "pretrain": [*self.cold.values(), *self.warm.values()]}
        for script, arguments in given.items():
            if theirs := sorted({name for one in arguments for name in one} & OURS[script]):
                raise ValueError(f"{', '.join(theirs)}: set for each day by the evaluation itself; leave it out")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """From YAML.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is none, or its fields are not a plan's.
        """
        try:
            fields = yaml.safe_load(Path(path).read_text("utf-8"))
            return cls(**{**fields, "start": str(fields["start"])})  # YAML makes dates of dates
        except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no plan ({error}); docs/daily.md has one") from error


def prequential(plan: Plan, output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Trains and tests, day by day; what an interrupted run has done is not done again.

    Args:
        output_dir: a new folder, that of an interrupted run, or of one that is to go on for more `days`. Datasets and
            models of days that lie there are taken as they are.

    Returns:
        A row a day: `day`, `test_start` (seconds), `targets`, `users`; by the name of a model `models`, with `recall@k`
        (`[value, low, high]`, 95 % over users), `steps`, and of the (first) process, since its last start if it was
        `resumed`, `train_seconds` by the clock and `train_cpu_seconds`, both within the trainer, and `cpu_seconds` of
        the whole script; and `minus_first`, `recall@k` minus the first cold model's, paired by user.

    Raises:
        FileExistsError: the folder holds another plan's run, or a run that is under way.
        ValueError, FileNotFoundError: what `prepare` or the evaluation refuses, or a training that failed.
    """
    root = Path(output_dir)
    first = parse_time(str(plan.start), "start")
    root.mkdir(parents=True, exist_ok=True)
    with only_run(root):
        _keep_plan({**asdict(plan), "start": first}, root)
        rows: list[dict[str, Any]] = json.loads((root / ROWS).read_text()) if (root / ROWS).exists() else []
        for number in range(len(rows), plan.days):
            rows.append(_run_day(plan, root, first + number * DAY))
            _write(root / ROWS, rows)
    return rows


def _keep_plan(plan: dict[str, Any], root: Path) -> None:
    said = json.loads(json.dumps(plan, default=str))
    path = root / "plan.json"
    before = json.loads(path.read_text()) if path.exists() else said
    if changed := [name for name in said if name != "days" and before.get(name) != said[name]]:
        raise FileExistsError(f"{root} holds a run with another {', '.join(changed)}: choose another --output-dir")
    days = [p.parents[1] for p in root.glob("*/data/metadata.json")]
    if not path.exists() and (left := [p.name for p in root.iterdir() if p not in days]):
        raise FileExistsError(f"{root} exists and holds {left[0]}: choose another --output-dir, or remove it first")
    _write(path, said)


def _run_day(plan: Plan, root: Path, start: int) -> dict[str, Any]:
    folder, before = root / _day(start), root / _day(start - DAY)
    cold, names = next(iter(plan.cold)), [*plan.cold, *plan.warm]
    data = _prepare(plan, folder, start)
    for name, arguments in plan.cold.items():
        _train(folder / name, data, arguments)
    for name, arguments in plan.warm.items():
        yesterday = before / name
        if not yesterday.exists():  # the first day
            yesterday = before / cold
            _train(yesterday, _prepare(plan, before, start - DAY), plan.cold[cold])
        _train(folder / name, data, {**arguments, "model": yesterday})
    reference, catalogue = _measure(folder / cold, data, None)
    found = {cold: reference, **{name: _measure(folder / name, data, catalogue)[0] for name in names[1:]}}
    minus_first = {
        # a warm catalogue has other rows for the same items
        name: compare(replace(found[name], requests=reference.requests), reference).metrics
        for name in names[1:]
    }
    return {
        "day": folder.name,
        "test_start": start,
        "targets": len(reference.rank_of_target),
        "users": len(np.unique(reference.requests.user)),
        "models": {name: {**_recalls(found[name].metrics, "value"), **_effort(folder / name)} for name in names},
        "minus_first": {name: _recalls(metrics, "difference") for name, metrics in minus_first.items()},
    }


def _prepare(plan: Plan, folder: Path, start: int) -> Path:
    """The dataset in which the day from `start` on is test, made unless it is there."""
    data = folder / "data"
    if not data.exists():
        validation_start = start - int(plan.validation_hours * 3_600)
        split: dict[str, Any] = {"validation_start": validation_start, "test_start": start, "test_end": start + DAY}
        prepare(**plan.prepare, output_dir=data, **split)
    return data


def _train(output: Path, data: Path, arguments: Mapping[str, Any]) -> None:
    """`output`, as training/pretrain.py makes it, unless it is there."""
    if output.exists():
        return
    given = {"data": data, "output_dir": output, **arguments}
    given["resume"] = output.with_name(f"{output.name}.training").exists()
    texts = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in given.items()}
    if _launch([word for name, text in texts.items() for word in (f"--{name}", text)]):
        raise ValueError(f"training {output} failed, and said above why; the same command again goes on from here")


def _launch(words: list[str]) -> int:
    """The exit status of training/pretrain.py, whose standard output goes where the errors go."""
    script = [sys.executable, "-m", "accelerate.commands.launch", "-m", "pinrec_hf.training.pretrain"]
    return subprocess.run([*script, *words], stdout=2).returncode


def _measure(folder: Path, data: Path, catalogue: Catalogue | None) -> tuple[Evaluation, Catalogue]:
    """A model on the day's targets, those that `catalogue` knows; and the catalogue of its own."""
    retriever = load_retriever(folder)
    own = retriever.tokenizer.catalogue
    requests = load_requests(data, "test", own)
    known = own if catalogue is None else catalogue
    kept = known.rows(own.ids(requests.item_row)) >= 0
    requests = requests if kept.all() else only_targets(requests, kept)
    return evaluate(retriever, requests, own, ks=KS, name=folder.name), own


def _recalls(metrics: Mapping[str, Any], value: str) -> dict[str, list[float]]:
    return {name: [getattr(m, value), m.low, m.high] for name, m in metrics.items() if name.startswith("recall@")}


def _effort(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "trainer_state.json").read_text())
    record, end = json.loads((folder / "training.json").read_text()), state["log_history"][-1]
    return {
        "steps": state["global_step"],
        "train_seconds": end["train_runtime"],
        "train_cpu_seconds": end.get("train_cpu_seconds"),
        "cpu_seconds": record["cpu_seconds"],
        "resumed": record["resumed"],
    }


def _day(start: int) -> str:
    moment = datetime.fromtimestamp(start, UTC)
    return f"{moment:%Y-%m-%d}" if start % DAY == 0 else f"{moment:%Y-%m-%dT%H%M}Z"


def _write(path: Path, value: Any) -> None:
    with replaced(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
