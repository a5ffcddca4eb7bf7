"""What a card says about data, training and use, from the files in a model's folder."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pinrec_hf.evaluation.report import Table
from pinrec_hf.evaluation.saved import SavedReport
from pinrec_hf.hub.results import MISSING
from pinrec_hf.modeling.catalogue_pinrec import Catalogue


def data_facts(data: Mapping[str, Any]) -> str:
    """What `metadata.json` of a prepared folder says, as sentences and a table of targets."""
    if not data:
        return f"Counts, split and licence: {MISSING} (the model's folder has no data.json)."
    events, users = data["num_events"], data["num_users"]
    name, license = data.get("name") or "Unnamed", data.get("license") or "not stated"
    rows = [
        [split, f"{events[split]:,}", f"{users[split]:,}", _end(data["split"], split)]
        for split in events
        if events[split]
    ]
    lines = [
        f"**{name}**: {data['num_items']:,} items. Licence of the data: {license}.",
        Table("", ["split", "events", "users", "until (UTC)"], rows).grid(),
    ]
    if outcomes := list(dict.fromkeys(name for row in data["outcome_counts"].values() for name in row)):
        header = ["events in train, by surface", *outcomes]
        rows = [
            [surface, *(f"{row.get(outcome, 0):,}" for outcome in outcomes)]
            for surface, row in data["outcome_counts"].items()
        ]
        lines += ["What users did:", Table("", header, rows).grid()]
    return "\n\n".join(lines)


def _end(split: Mapping[str, Any], name: str) -> str:
    if split["kind"] == "leave_one_out":
        return {"test": "each user's last event", "validation": "the one before"}.get(name, "all before")
    return _date(split[f"{name}_end"])


def time_limit(data: Mapping[str, Any]) -> str:
    end = data.get("split", {}).get("train_end")
    until = "the end of its log" if end is None else _date(end)
    return f"It knows tastes and items until {until}. How fast it ages: {MISSING}."


def model_facts(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What was trained, of a whole model."""
    whole, ids = _parameters(root, "model*.safetensors")
    return {
        "model": f"preset `{config.get('preset')}`: {config['num_hidden_layers']} layers, width "
        f"{config['hidden_size']}, {config['max_position_embeddings']:,} positions",
        "parameters": f"{whole:,}, of which {ids:,} in tables of item ids and query texts",
        "similarity, loss": f"{config['similarity']}, {config['softmax']} softmax",
    }


def adapter_facts(root: Path, surface_config: Mapping[str, Any]) -> dict[str, str]:
    """What was trained, of an adapter."""
    lora = read_json(root / "adapter_config.json")
    return {
        "adapter": f"LoRA of rank {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora.get('lora_dropout', 0)}",
        "parameters": f"{_parameters(root, 'adapter_model.safetensors')[0]:,}",
        "base": f"`{surface_config['base_model']}`, fingerprint `{surface_config['base_fingerprint']}`",
    }


def training_facts(root: Path, rows: Mapping[str, str]) -> str:
    """A table of how it was trained, beneath the rows of what was."""
    state, record = read_json(root / "trainer_state.json"), read_json(root / "training.json")
    history = state.get("log_history", [])
    runtime = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    if record.get("resumed", True):
        runtime = None  # of the last start alone
    best = next((e for e in history if e.get("step") == state.get("best_global_step") and "eval_recall@10" in e), None)
    kept = best and f"step {best['step']:,}, best on validation (recall@10 {best['eval_recall@10']:.3f})"
    how = {
        "length": f"{state['global_step']:,} steps, {state['epoch']:.3g} epochs" if state else MISSING,
        "runtime": MISSING if runtime is None else _duration(runtime),
        "hardware": record.get("hardware", MISSING),
        "kept": kept or MISSING,
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()) or MISSING,
    }
    return Table("", ["", "this model"], [[name, text] for name, text in {**rows, **how}.items()]).grid()


def _parameters(root: Path, pattern: str) -> tuple[int, int]:
    """Numbers of weights in all, and in tables of ids."""
    whole = ids = 0
    for path in root.glob(pattern):
        try:
            with safe_open(path, "np") as weights:
                for name in weights.keys():  # noqa: SIM118  not a dict
                    size = math.prod(weights.get_slice(name).get_shape())
                    whole += size
                    ids += size if "_ids." in name else 0
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); copy it again") from error
    return whole, ids


def commands(root: Path, report: SavedReport | None, *between: str) -> str:
    """The commands that trained and evaluated it, and those between."""
    command = read_json(root / "training.json").get("command")
    lines = [command or f"# the command that trained it: {MISSING}", *between]
    lines.append((report and report.source.get("command")) or f"# the command that evaluated it: {MISSING}")
    return "```bash\n" + "\n".join(map(shown, lines)) + "\n```"


def shown(command: str) -> str:
    """A command with the last part of every absolute path (the folders of one machine are nobody else's), in lines.

    >>> shown("train --data /home/me/data --baseline tower=/tmp/tower --model a/b")
    'train --data data --baseline tower=tower --model a/b'
    """
    if command.startswith("#"):
        return command
    lines = [""]
    for word in shlex.split(command):
        word = shlex.quote(re.sub(r"(^|=)/(.*/)?(?=.)", r"\1", word))
        if word.startswith("--") and len(lines[-1]) > 60:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines).strip()


def example_history(root: Path, surfaces: list[str], outcomes: list[str]) -> str:
    """One or two events of items that the model knows, as Python."""
    catalogue = Catalogue.open(root / "catalogue.safetensors")
    count = min(2, len(catalogue))
    columns: dict[str, list[Any]] = {"item_id": catalogue.ids(list(range(count)))}
    if surfaces:
        columns["surface"] = [*surfaces, *surfaces][:count]
    if outcomes:
        columns["outcomes"] = [[name] for name in [*outcomes, *outcomes][:count]]
    columns["timestamp"] = [1735689600, 1735689660][:count]
    lines = [f'    "{name}": {json.dumps(value, ensure_ascii=False)},' for name, value in columns.items()]
    return "\n".join(["{", *lines, "}"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where it is missing.

    Raises:
        ValueError: it is cut off or foreign.
    """
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except ValueError:
        raise ValueError(f"{path} is truncated or foreign; copy it again") from None


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
