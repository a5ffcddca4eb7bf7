"""Folders pushed to a Hub, spoken to over HTTP, and loaded from it by other processes with empty caches."""

import json
import shutil

import numpy as np
import pytest

from pinrec_hf import PinRecRetriever
from pinrec_hf.cli import main
from pinrec_hf.hub.files import list_files
from pinrec_hf.modeling.modeling_pinrec import PinRecModel
from pinrec_hf.retrieval.build import build_index

CODE = {
    "configuration_pinrec.py",
    "modeling_pinrec.py",
    "tokenization_pinrec.py",
    "catalogue_pinrec.py",
    "layers_pinrec.py",
}
SECRET = ("checkpoint-9", "partial", "notes.txt", ".env", "log.parquet", "trainer_state.json", "report.json")
REQUESTS = [
    {"history": {"item_id": ["p1", "p7"], "outcomes": [["save"], ["click"]]}, "surface": "homefeed"},
    {"history": {}, "surface": "search", "query": "blue sofa"},
]

PUSH = """
import json, sys
from huggingface_hub import HfApi
from pinrec_hf import PinRecModel
from pinrec_hf.cli import main
first, second, data = sys.argv[1:]
def push(*words):
    assert main(["push", *words]) == 0
push("--model", first, "--repo", "org/pinrec-tiny", "--private")
HfApi().create_tag("org/pinrec-tiny", tag="v1")
push("--model", second, "--repo", "org/pinrec-tiny")
push("--model", first, "--repo", "org/pinrec-tiny", "--revision", "candidate")
push("--model", data, "--repo", "org/tiny-data")
PinRecModel.from_pretrained(first).push_to_hub("org/weights-only")
metadata = HfApi().get_safetensors_metadata("org/pinrec-tiny")  # reads the header alone, by a range
print(json.dumps([HfApi().repo_info("org/pinrec-tiny").sha, sum(metadata.parameter_count.values())]))
"""
SHORTER = """
import json, os, sys
from huggingface_hub import HfApi
from pinrec_hf.cli import main
api, words = HfApi(), ["push", "--model", sys.argv[1], "--repo", "org/shrinking"]
assert main(words) == 0
api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.md", repo_id="org/shrinking", repo_type="dataset")
longer = api.list_repo_files("org/shrinking", repo_type="dataset")
os.remove(f"{sys.argv[1]}/train/part-00099.parquet")
assert main(words) == 0
print(json.dumps([longer, api.list_repo_files("org/shrinking", repo_type="dataset")]))
"""
READ = """
import json, sys
from pinrec_hf import PinRecRetriever
requests = json.loads(sys.argv[1])
answers = {}
for revision in sys.argv[2:]:
    retriever = PinRecRetriever.from_pretrained("org/pinrec-tiny", revision=revision)
    answers[revision] = retriever.rank(requests, 20).tolist()
print(json.dumps(answers))
"""
STRANGER = """
import json, sys
sys.modules["pinrec_hf"] = None  # importing it raises ImportError
import torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("org/pinrec-tiny", trust_remote_code=True, revision="v1")
tokenizer = AutoTokenizer.from_pretrained("org/pinrec-tiny", trust_remote_code=True, revision="v1")
assert type(model).__module__.startswith("transformers_modules.")
(request,) = json.loads(sys.argv[1])[:1]
with torch.no_grad():
    embeddings = model(**tokenizer([request["history"]], surface=request["surface"])).embeddings
print(json.dumps(embeddings.tolist()))
"""
TWICE = """
import contextlib, io, json, sys, urllib.request
from huggingface_hub import HfApi
from pinrec_hf.cli import main
folder, accident = sys.argv[1:]
words = ["push", "--model", folder, "--repo", "org/pinrec-tiny"]
with contextlib.redirect_stderr(io.StringIO()) as errors:
    refused = main(words)
info = HfApi().repo_info("org/pinrec-tiny", files_metadata=True)
sizes = {entry.path: entry.size for entry in HfApi().list_repo_tree("org/pinrec-tiny") if entry.path[0] != "."}
urllib.request.urlopen(accident, b"{}").close()  # the accident is over
assert main(words) == 0
print(json.dumps([refused, errors.getvalue(), [info.sha, sizes]]))
"""


@pytest.fixture(scope="module")
def retrained(trained, make_model, tmp_path_factory):
    """The same model, trained further: other weights, another index."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("retrained") / "pinrec-tiny")
    model = PinRecModel.from_pretrained(trained)
    model.item_encoder.up_proj.weight.data.mul_(-1)
    model.save_pretrained(folder)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    return shutil.copytree(tiny_data, tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def pushed(loopback, trained, retrained, data):
    """The commit of the main branch after: first model (tag v1), second model, first on a branch, data, weights."""
    commit, parameters = loopback.client(PUSH, trained, retrained, data, home="author")
    assert parameters == PinRecModel.from_pretrained(retrained).num_parameters()
    assert [line for line in loopback.get("/test/requests") if "model.safetensors bytes=0-" in line]
    return commit


def test_what_an_earlier_push_left_goes(loopback, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "tiny")
    main(["card", "--model", str(folder)])
    shutil.copyfile(folder / "train" / "part-00000.parquet", folder / "train" / "part-00099.parquet")
    longer, shorter = loopback.client(SHORTER, folder, home="author")
    assert set(longer) - set(shorter) == {"train/part-00099.parquet"}
    assert {"train/part-00000.parquet", "notes.md"} < set(shorter)


def test_what_may_be_removed_lies_where_such_a_folder_has_it(trained):
    listing = list_files(trained)
    assert listing.may_hold("modeling_pinrec.py")
    assert listing.may_hold("model-00001-of-00002.safetensors")
    assert not listing.may_hold("examples/my_pinrec.py")
    assert not listing.may_hold("model-old/a-of-b.safetensors")


def answers(folder):
    return PinRecRetriever.from_pretrained(folder).rank(REQUESTS, 20).tolist()


def test_a_dry_run_lists_and_writes_nothing(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "model")
    (folder / "README.md").unlink(missing_ok=True)
    before = sorted(folder.rglob("*"))
    assert main(["push", "--model", str(folder), "--repo", "org/x", "--dry-run"]) == 0
    text = capsys.readouterr().out
    size = f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert any(line.split() == ["model.safetensors", size] for line in text.splitlines())
    assert "README.md" in text
    assert "nothing was pushed" in text
    assert not [word for word in SECRET if word in text]
    assert sorted(folder.rglob("*")) == before


def test_the_repo_holds_what_was_listed_and_no_more(pushed, loopback, trained, data):
    sizes = list_files(trained).sizes
    assert loopback.files("org/pinrec-tiny", "v1") == sizes
    assert sizes.keys() > CODE
    assert {"README.md", "catalogue.safetensors", "queries.safetensors", "index.faiss", "items.parquet"} < sizes.keys()
    rows = list_files(data).sizes
    assert loopback.files("datasets/org/tiny-data") == rows
    assert {"train/part-00000.parquet", "test/part-00000.parquet", "metadata.json", "README.md"} < rows.keys()
    assert not [path for path in (*sizes, *rows) for word in SECRET if word in path]
    assert loopback.get("/api/models/org/pinrec-tiny")["private"]
    assert not loopback.get("/api/datasets/org/tiny-data")["private"]
    assert {"config.json", "model.safetensors"} <= loopback.files("org/weights-only").keys()


def test_another_process_gets_the_same_answers_then_offline(pushed, loopback, trained, retrained):
    loopback.accident(cut_downloads_of=["model.safetensors"])
    read = loopback.client(READ, json.dumps(REQUESTS), "main", "v1", "candidate", pushed, home="reader")
    asked = loopback.get("/test/requests")
    whole = f"GET /org/pinrec-tiny/resolve/{pushed}/model.safetensors"
    assert asked.count(whole) == 2  # once broken off
    assert read["main"] == read[pushed] == answers(retrained)
    assert read["v1"] == read["candidate"] == answers(trained)
    assert read["v1"] != read["main"]
    loopback.accident()
    assert loopback.client(READ, json.dumps(REQUESTS), "v1", pushed, home="reader", offline=True) == {
        "v1": answers(trained),
        pushed: answers(retrained),
    }
    assert loopback.get("/test/requests") == []


def test_the_code_in_the_repo_serves_who_has_no_package(pushed, loopback, trained, model, tokenizer):
    expected = model(**tokenizer([REQUESTS[0]["history"]], surface="homefeed")).embeddings.tolist()
    found = loopback.client(STRANGER, json.dumps(REQUESTS), home="stranger")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again = loopback.client(STRANGER, json.dumps(REQUESTS), home="stranger", offline=True)
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_a_push_that_fails_half_way_leaves_the_repo_as_it_was(pushed, loopback, retrained, tmp_path):
    folder = shutil.copytree(retrained, tmp_path / "model")
    model = PinRecModel.from_pretrained(folder)
    model.outcome_head.down_proj.weight.data.mul_(2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    before = loopback.files("org/pinrec-tiny")
    loopback.accident(refuse_uploads_of=[(folder / "model.safetensors").stat().st_size])
    refused, errors, again = loopback.client(TWICE, folder, f"{loopback.url}/test/accident", home="author")
    assert refused == 2
    assert "403" in errors
    assert errors.count("\n") == 1
    assert loopback.get(f"/api/models/org/pinrec-tiny/revision/{pushed}")["sha"] == pushed
    assert again == [pushed, before]
    assert loopback.files("org/pinrec-tiny")["config.json"] == before["config.json"] + 1


def test_no_hub_and_no_such_folder_are_told_in_a_line(trained, tmp_path, capsys):
    for folder, message in ((tmp_path / "none", "is no folder"), (tmp_path, "neither model, adapter, prepared")):
        assert main(["push", "--model", str(folder), "--repo", "org/x", "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert main(["push", "--model", str(trained), "--repo", "org/x"]) == 2  # offline, as all tests are
    assert "offline mode is enabled" in capsys.readouterr().err
