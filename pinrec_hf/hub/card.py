"""Cards: README.md of a model, an adapter or a dataset, filled from measured results and from nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from pinrec_hf.data.output import replaced
from pinrec_hf.evaluation.report import read_log_history
from pinrec_hf.evaluation.saved import SavedReport, read_evaluation
from pinrec_hf.hub import results
from pinrec_hf.hub.facts import (
    adapter_facts,
    commands,
    data_facts,
    example_history,
    model_facts,
    read_json,
    time_limit,
    training_facts,
)
from pinrec_hf.hub.files import CARD, PICTURES, SURFACE_CONFIG, list_files
from pinrec_hf.hub.results import MISSING, slug
from pinrec_hf.retrieval.pretrained import saved_class, weights_hash

LICENSE = re.compile(r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|odbl|pddl|gpl-3\.0")
"""Names that the Hub knows and that data are commonly under; any other is `other`, with the text as its name."""


def write_card(
    folder: str | os.PathLike[str],
    *,
    evaluation: str | os.PathLike[str] | None = None,
    repo: str | None = None,
    base: str | None = None,
) -> Path:
    """Write README.md, and the pictures that it shows, into a folder, instead of those that are there.

    Args:
        folder: of a model, an adapter or a prepared dataset.
        evaluation: evaluation.json of this very model (or its folder); without it, results are "not measured".
        repo: name on the Hub that the examples load; the folder's own name by default.
        base: of an adapter: the base's name on the Hub, written into the adapter's configs instead of a local folder.

    Raises:
        FileNotFoundError: no such folder or evaluation.
        ValueError: the folder is none of the three, a Space's, or the evaluation is of other weights.
        ModuleNotFoundError: there are pictures to draw, and matplotlib is not installed.
    """
    listing = list_files(folder)
    root = listing.folder
    if listing.kind == "space":
        raise ValueError(f"{folder} is a Space's folder: `pinrec space` writes its README.md")
    report = None
    if evaluation is not None:
        report = read_evaluation(evaluation)
        measured = report.source.get("weights", [])  # of the base, then of the adapters that answered for surfaces
        own = {"adapter": measured[1:], "model": measured if len(measured) == 1 else []}.get(listing.kind, [])
        if not own or weights_hash(root) not in own:
            raise ValueError(f"{evaluation} measured other weights than those in {root}: evaluate this model again")
    name = root.resolve().name
    facts: dict[str, Any] = {"name": name, "repo": repo or name, "missing": MISSING}
    card: ModelCard | DatasetCard
    if listing.kind == "dataset":
        card = _dataset_card(root, facts)
    else:
        facts["pictures"] = _draw(root, report)
        if listing.kind == "adapter" and base is not None:
            _name_base(root, base)
        card = (_adapter_card if listing.kind == "adapter" else _model_card)(root, report, facts)
    with replaced(root / CARD) as path:
        path.write_text(_tidy(str(card)), encoding="utf-8")
    return root / CARD


def _model_card(root: Path, report: SavedReport | None, facts: dict[str, Any]) -> ModelCard:
    saved_class(root)
    config, data = read_json(root / "config.json"), read_json(root / "data.json")
    name = data.get("name") or "its training data"
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["pinrec", "recommender-system", "generative-retrieval", "custom_code"],
        model_name=facts["name"],
        eval_results=results.eval_results(report, name) or None,
        **license_fields(data.get("license")),
    )
    surfaces, outcomes = config["surfaces"] or [], config["outcomes"] or []
    positive = [outcome for outcome in outcomes if outcome not in config["negative_outcomes"]]
    budgets = config.get("outcome_budgets") or {}
    surface = surfaces[0] if surfaces else None
    example = budgets.get(surface) or dict.fromkeys(positive[:1], 1.0)
    return ModelCard.from_template(
        card_data,
        template_str=template("base"),
        **facts,
        items=f"{config['num_items']:,}",
        surfaces=_names(surfaces),
        outcomes=_names(positive) + _negatives(config["negative_outcomes"]),
        headline=results.headline(report),
        history=example_history(root, surfaces, positive),
        surface=json.dumps(surface, ensure_ascii=False) if surface else "None",
        budget=json.dumps({outcome: round(share, 2) for outcome, share in example.items()}, ensure_ascii=False),
        budgets="; ".join(f"{name}: {_shares(budget)}" for name, budget in budgets.items()) or "equal shares",
        about=results.about(report),
        overall=results.overall_table(report),
        groups=results.group_table(report),
        data=data_facts(data),
        training=training_facts(root, model_facts(root, config)),
        limits="\n".join(f"- {line}" for line in [*results.limits(report), time_limit(data)]),
        commands=commands(root, report, f"pinrec index --model {facts['name']}"),
    )


def _adapter_card(root: Path, report: SavedReport | None, facts: dict[str, Any]) -> ModelCard:
    about, data = read_json(root / SURFACE_CONFIG), read_json(root / "data.json")
    base = about.get("base_model")
    if base is None:
        raise ValueError(f"{root} holds no {SURFACE_CONFIG} that names its base: copy the adapter again")
    surface, budget = about.get("surface"), about.get("outcome_budget") or {}
    card_data = ModelCardData(
        library_name="peft",
        base_model=None if is_local(base) else base,
        base_model_relation=None if is_local(base) else "adapter",
        pipeline_tag="feature-extraction",
        tags=["pinrec", "recommender-system", "generative-retrieval", "lora"],
        model_name=facts["name"],
        eval_results=results.eval_results(report, data.get("name") or "its training data") or None,
        **license_fields(data.get("license")),
    )
    shown_base = Path(base).name if is_local(base) else base
    revision = about.get("base_revision")
    return ModelCard.from_template(
        card_data,
        template_str=template("adapter"),
        **facts,
        base=shown_base,
        revision=f', revision="{revision}"' if revision else "",
        surface="all surfaces" if surface is None else f"the surface `{surface}`",
        adapters=json.dumps({surface or "SURFACE": facts["repo"]}, ensure_ascii=False),
        budget=_shares(budget) or "the base's",
        headline=results.headline(report),
        about=results.about(report),
        overall=results.overall_table(report),
        groups=results.group_table(report),
        data=data_facts(data),
        training=training_facts(root, adapter_facts(root, {**about, "base_model": shown_base})),
        limits="\n".join(f"- {line}" for line in [*results.limits(report), time_limit(data)]),
        commands=commands(root, report),
    )


def is_local(base: str) -> bool:
    """Whether an adapter's base is a folder of this machine, not a name on the Hub."""
    return os.path.isdir(base) or base.count("/") != 1 or base[0] in "./~"


def _name_base(root: Path, base: str) -> None:
    """Write the base's name into both configs."""
    for name, field in ((SURFACE_CONFIG, "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        text = json.dumps({**read_json(root / name), field: base}, indent=2, ensure_ascii=False) + "\n"
        with replaced(root / name) as path:
            path.write_text(text, encoding="utf-8")


def _dataset_card(root: Path, facts: dict[str, Any]) -> DatasetCard:
    data = read_json(root / "metadata.json")
    splits = [split for split in ("train", "validation", "test") if any((root / split).glob("*.parquet"))]
    configs: list[dict[str, Any]] = [
        {
            "config_name": "sequences",
            "default": True,
            "data_files": [{"split": split, "path": f"{split}/*.parquet"} for split in splits],
        }
    ]
    for table in ("items", "queries"):
        if (root / f"{table}.parquet").exists():
            configs.append({"config_name": table, "data_files": f"{table}.parquet"})
    card_data = DatasetCardData(
        pretty_name=data.get("name") or facts["name"],
        tags=["recommender-system", "pinrec"],
        configs=configs,
        **license_fields(data.get("license")),
    )
    return DatasetCard.from_template(card_data, template_str=template("dataset"), **facts, data=data_facts(data))


def template(name: str) -> str:
    """A card's Jinja template, as the package carries it."""
    return files("pinrec_hf").joinpath("model_cards", f"{name}.md").read_text(encoding="utf-8")


def license_fields(license: str | None) -> dict[str, Any]:
    """A licence as the Hub's metadata spell it; nothing where it is not known.

    >>> license_fields("CC BY 4.0")
    {'license': 'cc-by-4.0'}
    >>> license_fields("Research only")
    {'license': 'other', 'license_name': 'research-only'}
    """
    if license is None:
        return {}
    name = slug(license)
    return {"license": name} if LICENSE.fullmatch(name) else {"license": "other", "license_name": name}


def _draw(root: Path, report: SavedReport | None) -> list[str]:
    """Draw the pictures for which there are figures, and remove those that were drawn of older ones."""
    figures: dict[str, Any] = {}
    try:
        history = read_log_history(root / "trainer_state.json")
    except ValueError:  # none, or too short a training to log a loss
        history = None
    if report is not None or history is not None:
        from pinrec_hf.evaluation.plots import plot_groups, plot_learning_curve

        if report is not None and report.systems[0].groups.get("surface"):
            figures["recall-by-surface.png"] = plot_groups(report.systems, "surface")
        if history is not None:
            figures["learning-curve.png"] = plot_learning_curve(history)
    for name in PICTURES:
        if name in figures:
            with replaced(root / name) as path:
                figures[name].savefig(path, format="png", dpi=110)
        else:
            (root / name).unlink(missing_ok=True)
    return list(figures)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _negatives(names: list[str]) -> str:
    return f" (and {_names(names)}, which it avoids)" if names else ""


def _shares(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{outcome} {share:.0%}" for outcome, share in budget.items())


def _tidy(text: str) -> str:
    """No more than one empty line in a row."""
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
