"""Releases and apps to be served."""

import shutil

import pytest
import torch
from loopback import served

from pinrec_hf import PinRecRetriever
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.serving.app import create_app
from pinrec_hf.serving.histories import SQLiteHistories
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.release import Releases


@pytest.fixture(scope="session")
def retriever(saved_model):
    """The same folder offline."""
    return PinRecRetriever.from_pretrained(saved_model)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory, saved_model, make_model):
    """Another release of the same catalogue, with other answers."""
    folder = tmp_path_factory.mktemp("other") / "pinrec-other"
    shutil.copytree(saved_model, folder)
    model = make_model()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    build_index(folder)
    return folder


@pytest.fixture
def make_app(saved_model, tmp_path):
    """`make_app(**options)`: an app of its own, with histories in `tmp_path/events.sqlite`."""

    def make(model=saved_model, computed=None, **options):
        metrics = Metrics()
        histories = SQLiteHistories(str(tmp_path / "events.sqlite"))
        return create_app(Releases(model, metrics, computed=computed), metrics, histories, **options)

    return make


@pytest.fixture(scope="module")
def client(saved_model, tmp_path_factory):
    metrics = Metrics()
    histories = SQLiteHistories(str(tmp_path_factory.mktemp("histories") / "events.sqlite"))
    with served(create_app(Releases(saved_model, metrics), metrics, histories)) as client:
        yield client
