"""Cards say what was measured, "not measured" of the rest, and nothing of another model or machine."""

import json
import shutil
import struct

import pytest
from huggingface_hub import DatasetCard, ModelCard

from pinrec_hf.cli import main
from pinrec_hf.evaluation.saved import read_evaluation
from pinrec_hf.hub.card import license_fields, write_card
from pinrec_hf.hub.facts import shown
from pinrec_hf.modeling.modeling_pinrec import PinRecModel

STATE = {
    "global_step": 81,
    "epoch": 3.0,
    "best_global_step": 54,
    "best_model_checkpoint": "/home/me/secret/checkpoint-54",
    "log_history": [
        {"step": 27, "eval_recall@10": 0.1},
        {"step": 50, "loss": 5.5},
        {"step": 54, "eval_recall@10": 0.1501},
        {"step": 81, "train_runtime": 300.0},
    ],
}
RECORD = {
    "command": "accelerate launch training/pretrain.py --data /home/me/secret/data --preset tiny",
    "hardware": "1 x NVIDIA H100",
    "versions": {"torch": "2.13.0"},
    "resumed": False,
}


@pytest.fixture
def folder(saved_model, tiny_data, tmp_path):
    """A trained model's folder, named pinrec-tiny."""
    path = shutil.copytree(saved_model, tmp_path / "home" / "pinrec-tiny")
    metadata = json.loads((tiny_data / "metadata.json").read_text())
    (path / "data.json").write_text(json.dumps({**metadata, "license": "CC BY-SA 4.0"}))
    (path / "trainer_state.json").write_text(json.dumps(STATE))
    (path / "training.json").write_text(json.dumps(RECORD))
    return path


@pytest.fixture(scope="module")
def report(saved_model, tiny_data, tmp_path_factory):
    """What `pinrec evaluate` wrote of that model."""
    out = tmp_path_factory.mktemp("evaluation") / "report"
    words = [
        "evaluate",
        "--model",
        str(saved_model),
        "--data",
        str(tiny_data),
        "--split",
        "test",
        "-k",
        "5",
        "-k",
        "20",
    ]
    assert main([*words, "--output-dir", str(out)]) == 0
    return out


def line_of(text, start):
    """The first table row or line that begins so, with single spaces."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(start))


def test_every_figure_is_the_measured_one(folder, report):
    text = write_card(folder, evaluation=report).read_text()
    evaluation = json.loads((report / "evaluation.json").read_text())
    system = evaluation["evaluations"][0]
    recall = system["metrics"]["recall@5"]
    written = f"{recall['value']:.3f} [{recall['low']:.3f},\u00a0{recall['high']:.3f}]"
    row = line_of(text, "| **PinRec** ")
    assert written.replace("\u00a0", " ") in row
    assert f"| {system['coverage']['coverage@5']} |" in row
    for name, figures in system["groups"]["surface"].items():
        assert f"| {name} | any | {figures['recall@5']['users']} | {figures['recall@5']['value']:.3f} [" in line_of(
            text, f"| {name} "
        )
    assert f"{recall['value']:.1%}" in text.split("## Use")[0]
    data = json.loads((folder / "data.json").read_text())
    assert f"| train | {data['num_events']['train']:,} | {data['num_users']['train']} |" in line_of(text, "| train ")
    assert line_of(text, "| length ") == "| length | 81 steps, 3 epochs |"
    assert line_of(text, "| runtime ") == "| runtime | 5 min |"
    assert line_of(text, "| hardware ") == "| hardware | 1 x NVIDIA H100 |"
    assert line_of(text, "| kept ") == "| kept | step 54, best on validation (recall@10 0.150) |"
    parameters = PinRecModel.from_pretrained(folder).num_parameters()
    assert line_of(text, "| parameters ").startswith(f"| parameters | {parameters:,},")
    assert "pinrec evaluate --model pinrec-tiny" in text
    assert "training/pretrain.py --data data --preset tiny" in text
    assert "/home/me" not in text
    assert str(folder.parent) not in text


def test_its_metadata_are_read_back_by_huggingface_hub(folder, report):
    write_card(folder, evaluation=report)
    data = ModelCard.load(folder / "README.md").data  # checks model-index, too
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "cc-by-sa-4.0",
        "transformers",
        "feature-extraction",
    )
    measured = read_evaluation(report).systems[0]
    found = {(result.dataset_config, result.metric_name): result for result in data.eval_results}
    assert found[None, "recall@20"].metric_value == pytest.approx(measured.metrics["recall@20"].value, abs=1e-6)
    for kind in ("surface", "outcome"):
        for group, figures in measured.groups[kind].items():
            assert found[group, "recall@5"].metric_value == pytest.approx(figures["recall@5"].value, abs=1e-6)
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_pictures_are_drawn_linked_and_removed_with_their_figures(folder, report):
    text = write_card(folder, evaluation=report).read_text()
    for name in ("recall-by-surface.png", "learning-curve.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20])[0] > 800  # pixels wide
        assert f"]({name})" in text
    (folder / "trainer_state.json").unlink()
    assert ".png" not in write_card(folder).read_text()
    assert not list(folder.glob("*.png"))


def test_what_is_missing_is_not_measured(folder):
    for name in ("trainer_state.json", "training.json", "data.json"):
        (folder / name).unlink()
    text = write_card(folder).read_text()
    assert "recall is not measured yet" in text
    for row in ("length", "runtime", "hardware", "kept", "versions"):
        assert line_of(text, f"| {row} ") == f"| {row} | not measured |"
    assert "Counts, split and licence: not measured" in text
    assert text.count("not measured") > 12
    data = ModelCard.load(folder / "README.md").data
    assert data.eval_results is None
    assert data.license is None
    assert "None" not in text
    assert "nan" not in text.split("---")[2].split()


def test_the_runtime_of_a_resumed_training_is_not_known(folder):
    (folder / "training.json").write_text(json.dumps({**RECORD, "resumed": True}))
    assert line_of(write_card(folder).read_text(), "| runtime ") == "| runtime | not measured |"


def test_the_evaluation_of_another_model_is_refused(folder, report, capsys):
    model = PinRecModel.from_pretrained(folder)
    model.outcome_head.down_proj.weight.data.mul_(2)
    model.save_pretrained(folder)
    words = ["card", "--model", str(folder), "--evaluation", str(report / "evaluation.json")]
    assert main(words) == 2
    assert "measured other weights" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_the_figures_of_adapters_are_not_the_bases(folder, report, tmp_path):
    about = json.loads((report / "evaluation.json").read_text())
    about["source"]["weights"].append("of an adapter")
    (tmp_path / "evaluation.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="measured other weights"):
        write_card(folder, evaluation=tmp_path / "evaluation.json")


def test_a_foreign_file_is_no_evaluation(folder):
    with pytest.raises(ValueError, match=r"config\.json is no evaluation\.json"):
        write_card(folder, evaluation=folder / "config.json")
    with pytest.raises(FileNotFoundError):
        write_card(folder, evaluation=folder / "none.json")


def test_the_command_writes_it_and_says_where(folder, report, capsys):
    words = ["card", "--model", str(folder), "--evaluation", str(report), "--repo", "org/pinrec-tiny"]
    assert main(words) == 0
    assert f"wrote {folder / 'README.md'}" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    assert 'PinRecRetriever.from_pretrained("org/pinrec-tiny")' in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"card": str(folder / "README.md")}


def test_the_example_of_a_card_runs(folder, monkeypatch):
    text = write_card(folder).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    found = {}
    exec(code.replace("k=100", "k=7"), found)
    assert len(found["candidates"][0]) == 7


def test_a_dataset_says_how_it_is_loaded(tiny_data, tmp_path, monkeypatch):
    from datasets import load_dataset

    folder = shutil.copytree(tiny_data, tmp_path / "data")
    write_card(folder, repo="org/tiny")
    card = DatasetCard.load(folder / "README.md")
    metadata = json.loads((folder / "metadata.json").read_text())
    for split, users in metadata["num_users"].items():
        assert load_dataset(str(folder), split=split).num_rows == users
    assert load_dataset(str(folder), "items", split="train").num_rows == 60
    assert load_dataset(str(folder), "queries", split="train").num_rows == 3
    assert card.data.pretty_name == "tiny"
    assert 'load_dataset("org/tiny", "items"' in card.text
    with pytest.raises(ValueError, match="is no evaluation"):
        write_card(folder, evaluation=folder / "metadata.json")


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        (None, {}),
        ("CC BY-SA 4.0", {"license": "cc-by-sa-4.0"}),
        ("GroupLens: research only", {"license": "other", "license_name": "grouplens-research-only"}),
    ],
)
def test_licences(said, fields):
    assert license_fields(said) == fields


def test_commands_lose_the_folders_of_the_machine_and_break_at_options():
    command = "pinrec evaluate --model /a/b/model/ --baseline 'two tower=/c d/tower' --data rel/data " + "--x 1 " * 20
    text = shown(command)
    assert "--model model/" in text
    assert "'two tower=tower'" in text
    assert "rel/data" in text
    assert max(map(len, text.splitlines())) < 90
