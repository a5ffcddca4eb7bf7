"""A catalogue of 10^6 items: what building its tables takes, and how fast `small` encodes it, whole and in parts.

Content vectors of 64 dimensions and hashed ids; random weights, one thread. Seconds are the processor's (user and
system), which leave out what else runs on the core; memory is what the process grew by at its peak.
"""

import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from runs import RUNS, record

from pinrec_hf.modeling.catalogue_pinrec import Catalogue
from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer
from pinrec_hf.retrieval.encode import encode_items
from pinrec_hf.retrieval.item_parts import item_embeddings

ITEMS, CONTENT, SEED = 1_000_000, 64, 0


def main() -> None:
    torch.set_num_threads(1)
    before, start = peak_bytes(), time.process_time()
    rng = np.random.default_rng(SEED)
    vectors = rng.standard_normal((ITEMS, CONTENT), dtype=np.float32)
    ids = pa.array([f"item-{n:010d}" for n in range(ITEMS)])
    given = time.process_time() - start
    catalogue = Catalogue.build(ids, vectors=pa.FixedSizeListArray.from_arrays(vectors.ravel(), CONTENT))
    built = {"seconds": time.process_time() - start - given, "peak_bytes_an_item": (peak_bytes() - before) / ITEMS}
    folder = RUNS / "catalogue"
    folder.mkdir(parents=True, exist_ok=True)
    catalogue.save(folder / "catalogue.safetensors")
    built["file_bytes_an_item"] = (folder / "catalogue.safetensors").stat().st_size / ITEMS
    catalogue = Catalogue.open(folder / "catalogue.safetensors")
    record("scale", [row("building a catalogue of 10^6 items, content of 64", built)], [SEED])
    record("scale", [row("encoding 10^6 items by `small`, one thread", encoded(catalogue, folder))], [SEED])


def encoded(catalogue: Catalogue, folder: Path) -> dict[str, Any]:
    tokenizer = PinRecTokenizer(catalogue=catalogue, surfaces=["homefeed"], outcomes=["save"])
    config = PinRecConfig.from_preset(
        "small",
        surfaces=["homefeed"],
        outcomes=["save"],
        num_items=ITEMS,
        content_size=CONTENT,
        item_id_embedding="hashed",
        catalogue_fingerprint=catalogue.fingerprint,
    )
    torch.manual_seed(SEED)
    model = PinRecModel(config).eval()
    start = time.process_time()
    whole = encode_items(model, tokenizer)
    seconds = time.process_time() - start
    start = time.process_time()
    with item_embeddings(model, tokenizer, folder) as parts:
        in_parts = time.process_time() - start
        same = bool(np.allclose(parts, whole, atol=1e-4))
    return {"items_a_second": ITEMS / seconds, "in_parts_items_a_second": ITEMS / in_parts, "same": same}


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def row(claim: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "claim": claim,
        "target": "none: for docs/scale.md",
        "value": {**value, "load": os.getloadavg()[0]},
        "met": None,
    }


if __name__ == "__main__":
    main()
