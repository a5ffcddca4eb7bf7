"""The page as Gradio has it, without a browser."""

import sys

import gradio as gr
import pytest

from pinrec_hf.cli import main
from pinrec_hf.demo.page import create_page


def test_every_control_has_a_label_and_all_events_stay_private(demo):
    page = create_page(demo)
    kinds = gr.Slider | gr.Radio | gr.Dropdown | gr.Textbox | gr.Button
    controls = [block for block in page.blocks.values() if isinstance(block, kinds)]
    labels = [block.value if isinstance(block, gr.Button) else block.label for block in controls]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    assert {"User", "Surface", "Search query", "Look beside", "Steps ahead", "Candidates"} <= set(labels)
    assert {f"{outcome}, % of the slots" for outcome in demo.dials} <= set(labels)
    assert {f"Add as {outcome}" for outcome in demo.config.outcomes} <= set(labels)
    assert not page.analytics_enabled
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}


def test_without_gradio_the_extra_is_named(saved_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pinrec_hf.demo.page", None)
    assert main(["demo", "--model", str(saved_model)]) == 2
    assert 'pip install ".[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--data", "--compare"])
def test_a_missing_folder_is_said(saved_model, tmp_path, capsys, missing):
    assert main(["demo", "--model", str(saved_model), missing, str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
