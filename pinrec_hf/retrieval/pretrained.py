"""A saved model: its folder (here or on the Hub), loaded whole and checked, or refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

FILES = ("*.json", "*.safetensors", "index.faiss", "items.parquet")


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A model's folder: `name` itself if it is one, else the repo of that name, downloaded into the cache.

    Args:
        name: a folder, `org/name`, or `org/name@revision`.
        revision: of a repo that names none.

    Raises:
        FileNotFoundError: it is neither.
    """
    if os.path.isdir(name):
        return Path(name)
    repo, revision = named_revision(name, revision)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            errno.ENOENT, f"{name!s} is neither a folder here nor a repo that can be fetched from the Hub: {reason}"
        ) from error


def named_revision(name: str | os.PathLike[str], revision: str | None = None) -> tuple[str, str | None]:
    """Repo and revision of `org/name@revision`; of a folder, or a repo that names none, itself and `revision`."""
    if os.path.isdir(name):
        return os.fspath(name), revision
    repo, _, pinned = os.fspath(name).partition("@")
    return repo, pinned or revision


def saved_class(folder: str | os.PathLike[str]) -> str:
    """Name of the model class that was saved in `folder`.

    Raises:
        ValueError: the folder holds no PinRec model, or a `config.json` that is cut off.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json: it is no model; give a folder that training/pretrain.py wrote"
        )
    try:
        config = json.loads(path.read_text())
        model_type, architectures = config.get("model_type"), config.get("architectures")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is truncated or foreign; copy it again") from None
    if not str(model_type).startswith("pinrec") or not architectures:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not a PinRec model")
    return str(architectures[0])


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    model_class: type[PinRecModel] = PinRecModel,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
) -> tuple[PinRecModel, PinRecTokenizer]:
    """Model, in eval mode, and tokenizer of a local folder, checked against each other.

    With surfaces' `adapters` the model is the `PeftModel` of `load_surface_adapters`.

    Raises:
        ValueError: no PinRec model, another class of model, truncated or missing weights, a damaged catalogue, or
            a tokenizer of another model.
    """
    name = saved_class(folder)
    if name != model_class.__name__:
        raise ValueError(f"{folder} holds a {name}, not a {model_class.__name__}")
    try:
        loaded: Any = model_class.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the weights in {folder} are missing or foreign ({reason}); copy them again") from error
    model, info = loaded
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])[:3]
        raise ValueError(f"the weights in {folder} do not fit its config.json, which has no {', '.join(names)}")
    try:
        tokenizer = PinRecTokenizer.from_pretrained(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"the tokenizer in {folder} is missing or truncated ({error}); copy it again") from error
    check_belongs(model, tokenizer)
    if adapters:
        from pinrec_hf.hub.adapters import load_surface_adapters  # PEFT is slow to import, and few need it

        model = load_surface_adapters(model, adapters)
    return model.to(device).eval() if device else model.eval(), tokenizer


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of a folder's weights, a model's or an adapter's, by which a measurement knows what was measured.

    Raises:
        FileNotFoundError: it holds none.
    """
    names = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
    files = [path for name in names for path in sorted(Path(folder).glob(name))]
    if not files:
        raise FileNotFoundError(errno.ENOENT, f"{folder!s} holds no weights")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def best_device() -> str:
    """`"cuda:0"`, `"mps"` or `"cpu"`: the best that is there; of processes launched together each has its own GPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_belongs(model: PinRecModel, tokenizer: PinRecTokenizer) -> None:
    """Refuse a tokenizer whose names or catalogue are not those that the model was trained with.

    Raises:
        ValueError: naming what differs.
    """
    config, catalogue = model.config, tokenizer.catalogue
    differing = {
        name: (getattr(config, name), getattr(tokenizer, name))
        for name in ("surfaces", "outcomes", "negative_outcomes", "query_size")
        if getattr(config, name) != getattr(tokenizer, name)
    }
    if (config.request_feature_buckets > 0) != tokenizer.request_features:
        differing["request_features"] = config.request_feature_buckets > 0, tokenizer.request_features
    if config.content_size != catalogue.content_size:
        differing["content_size"] = config.content_size, catalogue.content_size
    if config.catalogue_fingerprint not in (None, catalogue.fingerprint):
        differing["catalogue"] = config.catalogue_fingerprint, catalogue.fingerprint
    if differing:
        said = "; ".join(f"{name} {a!r} against {b!r}" for name, (a, b) in differing.items())
        raise ValueError(
            f"model and tokenizer do not belong together: {said}; load both from one folder, or index and evaluate "
            "the model with the data that it was trained on"
        )
