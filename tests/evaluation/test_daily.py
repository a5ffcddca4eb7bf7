"""The daily report of a small model on the test day of its own log."""

import json

from pinrec_hf.cli import main


def test_figures_of_a_day(saved_model, tiny_data, tmp_path, capsys):
    words = ["monitor", "--model", str(saved_model), "--data", str(tiny_data), "-k", "5"]
    assert main([*words, "--json"]) == 0
    text = capsys.readouterr().out
    figures = json.loads(text)
    slots = figures["requests"] * 5
    assert sum(figures["slots_asked"].values()) == slots
    assert figures["slots_delivered"] == figures["slots_asked"]
    assert figures["slots_asked"].keys() == {"save", "click"}
    assert 0 < figures["unknown_item_rate"] < 0.1  # tiny_log has 3 %
    assert 0 < figures["distinct_items"] <= figures["catalogue_items"] == 60
    assert figures["history_age_seconds"] > 0
    assert figures["index_age_seconds"] >= 0
    assert figures["embedding_norm"] > 0
    value, low, high = figures["recall"]
    assert low <= value <= high
    before = tmp_path / "before.json"
    before.write_text(json.dumps({**figures, "embedding_norm": 1234.5}))
    assert main([*words, "--before", str(before)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding_norm")]
    assert line.split()[1:] == [f"{figures['embedding_norm']:,.4g}", f"{1234.5:,.4g}"]


def test_no_dataset_is_told(saved_model, tmp_path, capsys):
    assert main(["monitor", "--model", str(saved_model), "--data", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
