"""`pinrec space`: the folder of a Gradio Space that shows a pushed model on the page of `pinrec demo`."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import HTTPError

import pinrec_hf
from pinrec_hf.data.output import new_directory
from pinrec_hf.hub.card import is_local
from pinrec_hf.hub.files import CARD, SPACE_APP

APP = '''"""The page of {model}: turn an outcome's dial, see the candidates change, and read why."""

from pinrec_hf import PinRecRetriever
from pinrec_hf.demo.page import launch
from pinrec_hf.demo.visit import Demo

retriever = PinRecRetriever.from_pretrained("{model}", revision="{commit}")
launch(Demo(retriever, "{model}"))
'''
REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
torch
pinrec-hf[demo]=={version}
"""
README = """---
{metadata}
---

The page of [{model}](https://huggingface.co/{model}), a PinRec model: write a history by searching titles, choose a
surface, turn the outcomes' dials, and see candidates and the path of interests change.
"""


def write_space(model: str, output_dir: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Write app.py, requirements.txt and README.md of a Space to a new folder, for `pinrec push`.

    Args:
        model: its name on the Hub. revision: of it; the commit that this names now is the one that will be shown.

    Raises:
        FileExistsError: the folder exists. ValueError: `model` is a folder of this machine.
        OSError: no such repo or revision, or the Hub cannot be reached. ImportError: Gradio is not installed.
    """
    if is_local(model):
        raise ValueError(f"{model} is a folder of this machine: push it, and name the repo")
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        problem = 'the Space gets this machine\'s Gradio: `pip install ".[demo]"` in the clone first'
        raise ImportError(problem) from error
    metadata = SpaceCardData(
        title=f"PinRec: {model.split('/')[-1]}",
        sdk="gradio",
        sdk_version=gradio,
        python_version="3.11",
        app_file=SPACE_APP,
        models=[model],
    )
    facts = {"model": model, "version": pinrec_hf.__version__, "metadata": metadata.to_yaml()}
    try:
        facts["commit"] = str(HfApi(library_name="pinrec_hf").model_info(model, revision=revision).sha)
    except HTTPError as error:
        raise OSError(f"{model} cannot be found on the Hub: {error}") from error
    with new_directory(output_dir) as folder:
        for name, text in ((SPACE_APP, APP), ("requirements.txt", REQUIREMENTS), (CARD, README)):
            (folder / name).write_text(text.format(**facts), "utf-8")
    return Path(output_dir)
