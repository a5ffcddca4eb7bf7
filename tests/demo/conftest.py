"""A demo of the tiny model, with a two-tower of the same catalogue beside it."""

import pytest
import torch

from pinrec_hf import PinRecRetriever
from pinrec_hf.demo.visit import Demo
from pinrec_hf.evaluation.baselines import TwoTowerConfig, TwoTowerModel
from pinrec_hf.evaluation.ranker import load_model_ranker


@pytest.fixture(scope="session")
def two_tower(make_config, tokenizer, tmp_path_factory):
    """A two-tower's folder, untrained."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("two-tower")
    fields = make_config(initializer_range=0.2).to_dict()
    del fields["model_type"], fields["architectures"]
    TwoTowerModel(TwoTowerConfig(**fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo(saved_model, tiny_data, two_tower) -> Demo:
    retriever = PinRecRetriever.from_pretrained(saved_model)
    return Demo(retriever, "tiny", tiny_data, load_model_ranker(two_tower))
