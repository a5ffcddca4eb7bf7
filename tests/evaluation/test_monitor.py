"""The daily report of a small model on the test day of its own log."""

import json
import shutil

import numpy as np
import pytest

from pinrec_hf.cli import main
from pinrec_hf.evaluation.protocol import load_requests
from pinrec_hf.retrieval.retriever import PinRecRetriever
from pinrec_hf.training.record import record_embedding_norm


def test_figures_of_a_day(saved_model, tiny_data, tmp_path, capsys, monkeypatch):
    generated, generate = [], PinRecRetriever.generate

    def count(self, requests):
        generated.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(PinRecRetriever, "generate", count)
    words = ["monitor", "--model", str(saved_model), "--data", str(tiny_data), "-k", "5"]
    assert main([*words, "--json"]) == 0
    text = capsys.readouterr().out
    figures = json.loads(text)
    slots = figures["requests"] * 5
    assert len(generated) == figures["requests"]  # each was ranked once
    assert sum(figures["slots_asked"].values()) == slots
    assert figures["slots_delivered"] == figures["slots_asked"]
    assert figures["slots_asked"].keys() == {"save", "click"}
    assert 0 < figures["unknown_item_rate"] < 0.1  # tiny_log has 3 %
    assert 0 < figures["distinct_items"] <= figures["catalogue_items"] == 60
    assert figures["history_age_seconds"] > 0
    assert figures["index_age_seconds"] >= 0
    assert figures["embedding_norm"] > 0
    assert figures["embedding_norm_drift"] is None  # of a model that was never trained
    value, low, high = figures["recall"]
    assert low <= value <= high
    before = tmp_path / "before.json"
    before.write_text(json.dumps({**figures, "embedding_norm": 1234.5}))
    assert main([*words, "--before", str(before)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding_norm ")]
    assert line.split()[1:] == [f"{figures['embedding_norm']:,.4g}", f"{1234.5:,.4g}"]


def test_norms_are_held_against_the_models_own_record(saved_model, tiny_data, tmp_path, capsys):
    folder = shutil.copytree(saved_model, tmp_path / "recorded")
    retriever = PinRecRetriever.from_pretrained(folder)
    model, tokenizer = retriever.model, retriever.tokenizer
    requests = load_requests(tiny_data, "test", tokenizer.catalogue).requests
    record_embedding_norm(model, tokenizer, requests)
    own = retriever.generate([{**request, "request_features": None} for request in requests])
    norms = [np.linalg.norm(by.embeddings[:, : model.config.hidden_size], axis=1).mean() for by in own]
    assert model.config.embedding_norm == pytest.approx(np.mean(norms))

    def drift():
        model.config.save_pretrained(folder)
        assert main(["monitor", "--model", str(folder), "--data", str(tiny_data), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["embedding_norm_drift"]

    assert drift() == pytest.approx(0, abs=1e-6)
    model.config.embedding_norm *= 2
    assert drift() == pytest.approx(-0.5)


def test_no_dataset_is_told(saved_model, tmp_path, capsys):
    assert main(["monitor", "--model", str(saved_model), "--data", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
