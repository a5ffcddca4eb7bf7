"""A trained model's folder, to push."""

import shutil
from pathlib import Path

import pytest

from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer


@pytest.fixture(scope="session")
def trained(saved_model, tiny_data, make_model, tokenizer, tmp_path_factory) -> Path:
    """An indexed model's folder with its code, as pretraining leaves it, and with what must never be pushed."""
    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("trained") / "pinrec-tiny")
    with pytest.MonkeyPatch.context() as patch:  # registering writes into the classes
        for cls, auto in ((PinRecConfig, "AutoConfig"), (PinRecModel, "AutoModel"), (PinRecTokenizer, "AutoTokenizer")):
            patch.setattr(cls, "_auto_class", auto)
        PinRecModel.from_pretrained(saved_model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copyfile(tiny_data / "metadata.json", folder / "data.json")
    (folder / "checkpoint-9").mkdir()
    for name in ("checkpoint-9/model.safetensors", "model.safetensors.partial-1", "notes.txt", ".env", "log.parquet"):
        (folder / name).write_text("secret")
    return folder
