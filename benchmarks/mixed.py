"""What surface adapters weigh and what they cost: rows of benchmarks/results/surfaces.json. Random weights."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from timing import SURFACES, p50, random_model, random_requests, random_tokenizer, take_turns
from world_rows import row

from pinrec_hf.hub.adapters import load_surface_adapters, save_surface_adapter
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.retrieval.encode import base_fingerprint, encode_requests
from pinrec_hf.training.arguments import FinetuningArguments
from pinrec_hf.training.finetune import adapt


def with_adapters(model: PinRecModel, surfaces: list[str]) -> PeftModel:
    """A LoRA adapter for each surface, as finetuning makes them, that changes something."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {surface: Path(folder) / surface for surface in surfaces}
        for surface, path in folders.items():
            adapted: Any = adapt(copy.deepcopy(model), FinetuningArguments(lora=True))
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.02)
            save_surface_adapter(
                adapted, path, surface=surface, outcome_budget=None, base_model="small", revision=None,
                fingerprint=base_fingerprint(model),
            )  # fmt: skip
        return load_surface_adapters(model, folders)


def mixed_rows(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapter's share of the base's parameters; a batch of mixed surfaces against a call for each request."""
    torch.set_num_threads(1)
    tokenizer = random_tokenizer(plan["items"], 256)
    model, surfaces = random_model(tokenizer).eval(), [*SURFACES, "related", "shop"]
    for grown in (model, tokenizer):
        grown.add_surfaces(surfaces[len(SURFACES) :])
    base = sum(weight.numel() for weight in model.parameters())
    adapted = with_adapters(model, surfaces)
    adapter = sum(w.numel() for name, w in adapted.named_parameters() if "lora_" in name) / len(surfaces)
    requests = random_requests(plan["items"], plan["events"], plan["batch"])
    requests = [{**request, "surface": surfaces[i % len(surfaces)]} for i, request in enumerate(requests)]

    def mixed() -> np.ndarray:
        return encode_requests(adapted, tokenizer, requests)

    def singly() -> np.ndarray:
        return np.concatenate([encode_requests(adapted, tokenizer, [request]) for request in requests])

    taken = take_turns(mixed=p50(mixed, 1), singly=p50(singly, 1))
    times, difference = taken["singly"] / taken["mixed"], float(np.abs(mixed() - singly()).max())
    share = {"percent": 100 * adapter / base, "adapter": adapter, "base": base, "items": plan["items"]}
    batch = {"times": times, **{f"{name}: ms": 1e3 * s for name, s in taken.items()}, "largest difference": difference}
    return [
        row("adapters: parameters of one against those of `small`", "<= 5 %", share, share["percent"] <= 5),
        row(
            f"adapters: a batch of {plan['batch']} of four surfaces against {plan['batch']} single calls",
            ">= 8 x the throughput, equal answers",
            {**batch, "events a history": plan["events"]},
            times >= 8 and difference < 1e-4,
        ),
    ]
