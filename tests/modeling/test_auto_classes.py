"""A saved folder is a model of the Auto classes: with the plugin, and by remote code without it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

import pinrec_hf
from pinrec_hf.modeling.configuration_pinrec import PinRecConfig
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.modeling.tokenization_pinrec import PinRecTokenizer

NOW = 1_700_500_000
REQUEST = {
    "histories": [
        {"item_id": ["p1", "emoji 🛋️"], "outcomes": [["save"], ["click"]], "timestamp": [NOW - 90, NOW - 5]},
        {"item_id": ["p7"], "outcomes": [["save"]]},
        {},
    ],
    "query": ["blue sofa", None, None],
    "surface": ["search", "homefeed", None],
    "timestamp": NOW,
}

REMOTE = """
import json, sys
sys.modules["pinrec_hf"] = None  # importing it raises ImportError, wherever it may be installed
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
request = json.loads(sys.argv[1])
config = AutoConfig.from_pretrained("model", trust_remote_code=True)
model = AutoModel.from_pretrained("model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
for thing in (config, model, tokenizer):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
with torch.no_grad():
    np.save("embeddings.npy", model(**tokenizer(**request)).embeddings.numpy())
# what was loaded so can be saved and loaded again
model.save_pretrained("again")
tokenizer.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
assert len(AutoTokenizer.from_pretrained("again", trust_remote_code=True)) == len(tokenizer)
"""


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """A folder that holds `model/`, saved as `training/pretrain.py` does."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:  # registering writes into the classes
        for cls in (PinRecConfig, PinRecModel, PinRecTokenizer):
            patch.setattr(cls, "_auto_class", None)
        PinRecConfig.register_for_auto_class()
        PinRecModel.register_for_auto_class("AutoModel")
        PinRecTokenizer.register_for_auto_class("AutoTokenizer")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return folder


@torch.no_grad()
def test_with_the_plugin(saved, model, tokenizer):
    loaded = AutoModel.from_pretrained(saved / "model")
    assert type(loaded) is PinRecModel is pinrec_hf.PinRecModel
    assert type(AutoConfig.from_pretrained(saved / "model")) is PinRecConfig
    assert AutoConfig.from_pretrained(saved / "model").catalogue_fingerprint == tokenizer.catalogue.fingerprint
    tok = AutoTokenizer.from_pretrained(saved / "model")
    assert type(tok) is PinRecTokenizer
    assert torch.equal(loaded(**tok(**REQUEST)).embeddings, model(**tokenizer(**REQUEST)).embeddings)
    assert not loaded.can_generate()
    assert (
        type(AutoModel.from_config(AutoConfig.for_model("pinrec", hidden_size=8, num_attention_heads=2))) is PinRecModel
    )


@torch.no_grad()
def test_with_remote_code_and_without_the_plugin(saved, model, tokenizer):
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(saved / "modules"), "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    # -I: neither the working directory nor PYTHONPATH can bring pinrec_hf in
    code = [sys.executable, "-I", "-c", REMOTE, json.dumps(REQUEST)]
    done = subprocess.run(code, cwd=saved, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(saved / "embeddings.npy")
    expected = model(**tokenizer(**REQUEST)).embeddings.numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_the_folder_holds_the_code_and_nothing_pickled(saved):
    files = sorted(path.name for path in (saved / "model").iterdir())
    assert files == [
        "catalogue.safetensors", "catalogue_columns_pinrec.py", "catalogue_pinrec.py", "config.json",
        "configuration_pinrec.py", "embedding_pinrec.py", "events_pinrec.py", "generation_pinrec.py",
        "layers_pinrec.py", "loss_pinrec.py", "model.safetensors", "modeling_pinrec.py", "queries.safetensors",
        "tokenization_pinrec.py", "tokenizer_config.json", "vocabulary_pinrec.py",
    ]  # fmt: skip
    auto_map = json.loads((saved / "model" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_pinrec.PinRecConfig", "AutoModel": "modeling_pinrec.PinRecModel"}


def test_the_code_needs_only_what_transformers_needs(saved):
    needed = {name for path in (saved / "model").glob("*.py") for name in get_imports(path)}
    standard = needed - sys.stdlib_module_names
    assert standard <= {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}
