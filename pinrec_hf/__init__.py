"""pinrec_hf: PinRec, Pinterest's unified generative retrieval model, at home in Hugging Face.

Importing it registers PinRec with the Auto classes, so that `AutoModel.from_pretrained("pinrec-base")` works.
"""

import importlib
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer

from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel, PinRecModelOutput
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

__version__ = "0.1.0"

AutoConfig.register("pinrec", PinRecConfig, exist_ok=True)
AutoModel.register(PinRecConfig, PinRecModel, exist_ok=True)
AutoTokenizer.register(PinRecConfig, PinRecTokenizer, exist_ok=True)

_LAZY = {
    "ItemIndex": "pinrec_hf.retrieval.index",
    "PinRecRetriever": "pinrec_hf.retrieval.retriever",
    "evaluate": "pinrec_hf.evaluation.evaluate",
    "load_surface_adapters": "pinrec_hf.hub.adapters",
}

__all__ = ["PinRecConfig", "PinRecModel", "PinRecModelOutput", "PinRecTokenizer", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pinrec_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
