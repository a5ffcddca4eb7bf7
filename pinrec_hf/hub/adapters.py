"""Surface adapters: LoRA weights of backbone and outcome head, with what says whose they are.

    adapters/search/adapter_config.json, adapter_model.safetensors    PEFT's own
                    surface_config.json                               surface, base and default outcome budget

PEFT would load an adapter on any base that has modules of the same names, and drop what it does not know: the surface
config is checked before anything is loaded. An adapter holds LoRA weights alone, no rows of the tables of surfaces and
outcomes: the adapted head does without, and `modules_to_save` in any adapter would forbid batches of mixed surfaces.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from pinrec_hf.modeling.configuration_pinrec import check_budget
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.retrieval.encode import base_fingerprint
from pinrec_hf.retrieval.pretrained import find_folder

ADAPTED = r"(layers\.\d+|outcome_head)\.(.+\.)?\w*proj"
"""Full names of the linear layers that are adapted: all of the backbone and the head, none of the encoders."""

SURFACE_CONFIG, WEIGHTS = "surface_config.json", "adapter_model.safetensors"
FORMAT = 1


def save_surface_adapter(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    surface: str | None,
    outcome_budget: Mapping[str, float] | None,
    base_model: str,
    revision: str | None,
    fingerprint: str,
) -> None:
    """Write the active adapter of `model`.

    Args:
        surface: whose it is, None = trained on all. outcome_budget: the surface's default.
        base_model, revision: where the base came from. fingerprint: `base_fingerprint` of it.
    """
    config = model.active_peft_config
    config.base_model_name_or_path, config.revision = base_model, revision
    model.save_pretrained(os.fspath(folder), save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's template of a card says nothing
    about = {
        "format": FORMAT,
        "surface": surface,
        "outcome_budget": outcome_budget,
        "base_model": base_model,
        "base_revision": revision,
        "base_fingerprint": fingerprint,
        "peft_version": peft.__version__,
    }
    (Path(folder) / SURFACE_CONFIG).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")


def load_surface_adapters(
    model: PinRecModel, adapters: Mapping[str, str | os.PathLike[str]], *, revision: str | None = None
) -> PeftModel:
    """Put surfaces' adapters on their base, each under its surface's name.

    In a batch of mixed surfaces, say for each row which adapter answers it, `"__base__"` for none:

        model = load_surface_adapters(model, {"search": "pinrec-base/adapters/search"})
        model(**batch, adapter_names=["search", "__base__"])

    Without `adapter_names` the first adapter answers every row. The adapters' default outcome budgets go into
    `model.config.outcome_budgets`. Every adapter is checked before one is loaded; the base itself is changed in place,
    as PEFT does.

    Args:
        model: the base. adapters: a folder or Hub repo for each surface. revision: of the repos.

    Returns:
        the `PeftModel`, in eval mode.

    Raises:
        FileNotFoundError: no such folder or repo.
        ValueError: no adapter of this base or surface, or one that is truncated, foreign or of a newer PEFT; a surface
            that the base does not know; a model that carries adapters already.
    """
    if not adapters:
        raise ValueError("no adapters: give a dict such as {'search': 'pinrec-base/adapters/search'}")
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"the model carries the adapters {sorted(model.peft_config)} already; load the base again and give all "
            "adapters in one call"
        )
    folders = {surface: find_folder(path, revision) for surface, path in adapters.items()}
    fingerprint, budgets = base_fingerprint(model), {}
    for surface, folder in folders.items():
        budgets[surface] = _checked_config(folder, surface, model, fingerprint)["outcome_budget"]
        _check_weights(folder, model)
    first, *others = folders
    adapted: Any = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    for surface in others:
        adapted.load_adapter(folders[surface], adapter_name=surface)
    model.config.outcome_budgets = {
        **(model.config.outcome_budgets or {}),
        **{surface: budget for surface, budget in budgets.items() if budget},
    }
    return adapted.eval()


def check_adapter_name(surface: str) -> None:
    """
    Raises:
        ValueError: an adapter cannot have this surface's name.
    """
    if "." in surface or hasattr(nn.ModuleDict(), surface):
        raise ValueError(f"PEFT cannot name an adapter {surface!r}: no dots, and no name of a torch module's method")


def _checked_config(folder: Path, surface: str, model: PinRecModel, fingerprint: str) -> dict[str, Any]:
    known = model.config.surfaces or []
    if surface not in known:
        raise ValueError(
            f"surface {surface!r} is not among the base's surfaces {known}; model.add_surfaces and "
            "tokenizer.add_surfaces make it known"
        )
    check_adapter_name(surface)
    path = folder / SURFACE_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SURFACE_CONFIG}: it is no adapter that training/finetune.py wrote")
    try:
        about = json.loads(path.read_text("utf-8"))
        newer = Version(about["peft_version"]).release[:2] > Version(peft.__version__).release[:2]
        form, own, base = about["format"], about["surface"], about["base_model"]
        same_base, budget = about["base_fingerprint"] == fingerprint, about["outcome_budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or foreign ({error}); copy it again") from error
    if form != FORMAT:
        raise ValueError(f"{path} has format {form!r}, this version reads {FORMAT}; finetune again")
    if own != surface:
        whose = "of all surfaces (merge it into its base instead)" if own is None else f"of surface {own!r}"
        raise ValueError(f"{folder} is the adapter {whose}, not of {surface!r}")
    if not same_base:
        raise ValueError(
            f"{folder} was trained on another base ({base}) than this model; load that base, or finetune this one"
        )
    if newer:
        raise ValueError(
            f"{folder} was written by PEFT {about['peft_version']}, this is {peft.__version__}, which may leave out "
            "what it does not know: install the newer one"
        )
    if budget is not None:
        check_budget(budget, model.config)
    return about


def _check_weights(folder: Path, model: PinRecModel) -> None:
    """Refuse an adapter whose config or weights are not LoRA of this model's adapted layers."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{folder}/adapter_config.json is missing, truncated or foreign; copy it again") from error
    if not isinstance(config, LoraConfig) or config.target_modules != ADAPTED:
        raise ValueError(f"{folder} is no LoRA of a PinRec model's layers, but {config.peft_type} of other modules")
    expected = {}
    for name, module in model.named_modules():
        if re.fullmatch(ADAPTED, name) and isinstance(module, nn.Linear):
            expected[f"base_model.model.{name}.lora_A.weight"] = [config.r, module.in_features]
            expected[f"base_model.model.{name}.lora_B.weight"] = [module.out_features, config.r]
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            finite = all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in found)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, truncated or damaged ({error}); copy it again") from error
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"{path} does not fit adapter_config.json and this base: {name} has the shape {found.get(name)}, not "
            f"{expected.get(name)}"
        )
    if not finite:
        raise ValueError(f"{path} holds NaN or infinity: its training diverged; finetune again with a lower rate")
