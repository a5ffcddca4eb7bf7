"""Training that goes on from a finished model, whose names and items grow by those that are new in the data."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinrec_hf.data.dataset_folder import build_query_catalogue, default_budgets, grow_catalogue, read_metadata
from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.pretrained import find_folder, load_pretrained


@dataclass
class WarmStart:
    """A finished model, grown, with the folder that it came from."""

    model: PinRecModel
    tokenizer: PinRecTokenizer
    folder: Path


def warm_start(
    name: str | Path, data: str | Path, model_class: type[PinRecModel] = PinRecModel, revision: str | None = None
) -> WarmStart:
    """The model `name` with the surfaces, outcomes and items that are new in `data`; what it answered before keeps
    its bits.

    Old names, items and queries keep their place, content and budget, also those that vanished from the data.

    Args:
        name: folder or Hub repo that training/pretrain.py filled.
        data: folder that `pinrec prepare` wrote.

    Raises:
        FileNotFoundError: there is no such model or data.
        ValueError: the data's ids are of another type, its vectors of another width, an outcome changed its polarity,
            or the model is damaged or of another class.
    """
    metadata = read_metadata(data)
    folder = find_folder(name, revision)
    model, old = load_pretrained(folder, model_class=model_class)
    if not (folder / "items.parquet").is_file():
        raise FileNotFoundError(errno.ENOENT, f"{folder} holds no items.parquet; copy the model's folder whole")
    check_polarity(old, metadata, name)
    negative = metadata["negative_outcomes"]
    tokenizer = PinRecTokenizer(
        catalogue=grow_catalogue(old.catalogue, data),
        queries=_grown_queries(old.query_catalogue, data),
        surfaces=old.surfaces,
        outcomes=old.outcomes,
        negative_outcomes=old.negative_outcomes,
        keep_ignored=old.keep_ignored,
        contexts=old.contexts,
        request_features=old.request_features,
        model_max_length=old.model_max_length,
    )
    new = [o for o in metadata["outcomes"] if o not in old.outcomes]
    for grown in (model, tokenizer):
        grown.add_surfaces([s for s in metadata["surfaces"] if s not in old.surfaces])
        grown.add_outcomes([o for o in new if o not in negative])
        grown.add_outcomes([o for o in new if o in negative], negative=True)
    model.add_items(tokenizer.catalogue)
    model.config.outcome_budgets = {**default_budgets(metadata), **(model.config.outcome_budgets or {})}
    return WarmStart(model, tokenizer, folder)


def check_polarity(tokenizer: PinRecTokenizer, metadata: dict[str, Any], name: str | Path) -> None:
    """
    Raises:
        ValueError: an outcome that was positive when the model `name` was trained is negative in the data, or the
            other way round.
    """
    negative, known = metadata["negative_outcomes"], [o for o in metadata["outcomes"] if o in tokenizer.outcomes]
    if turned := [o for o in known if (o in negative) != (o in tokenizer.negative_outcomes)]:
        raise ValueError(
            f"{turned} changed between positive and negative since {name} was trained: give `prepare "
            f"--negative-outcome` as then ({tokenizer.negative_outcomes})"
        )


def _grown_queries(old: Catalogue | None, data: str | Path) -> Catalogue | None:
    new = build_query_catalogue(data)
    if new is None:
        return old
    width = 0 if old is None else old.content_size
    if old is None or new.content_size != width:
        raise ValueError(
            f"{data}: query vectors have width {new.content_size}, the model's {width} (0 = none): embed the queries "
            "as then, or prepare without --queries"
        )
    rows = np.flatnonzero(old.rows(new.ids(np.arange(len(new)))) < 0)
    return old.append(new.ids(rows), vectors=new.vectors(rows))
