"""Every command does its work, speaks JSON when asked, and explains an error in one line with exit code 2."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf import PinRecRetriever
from pinrec_hf.cli import build_parser, explain, main
from pinrec_hf.commands import retrieval
from pinrec_hf.commands.console import table
from pinrec_hf.data.dataset_folder import build_tokenizer
from pinrec_hf.evaluation.baselines import TwoTowerConfig, TwoTowerModel
from pinrec_hf.modeling.modeling_pinrec import PinRecModel

COMMANDS = list(build_parser()._subparsers._group_actions[0].choices)


@pytest.fixture
def run(capsys):
    """`run("index", "--model", ...)`: what it printed, after checking its exit code."""

    def call(*argv, code=0):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return call


@pytest.fixture
def run_json(run):
    return lambda *argv: json.loads(run(*argv, "--json"))


# -- help and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].replace("\\\n", " ")
    parts = [part for line in example.splitlines() if line.strip() for part in line.split("&&")]
    commands = [shlex.split(part.split(" > ")[0]) for part in parts]
    own = [words[1:] for words in commands if words[0] == "pinrec"]
    assert command in [words[0] for words in own]
    for words in own:
        build_parser().parse_args(words)


def test_an_error_is_one_line_and_a_traceback_only_when_asked(run, tmp_path):
    message = run("index", "--model", tmp_path / "none", code=2)
    assert message == f"pinrec index: {tmp_path}/none is no folder; download the model first to index it\n"
    with pytest.raises(FileNotFoundError):
        main(["index", "--model", str(tmp_path / "none"), "--debug"])


@pytest.mark.parametrize("port", ["-1", "65536", "web"])
def test_a_port_out_of_range_is_refused(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["serve", "--model", "m", "--port", port])
    assert "--port" in capsys.readouterr().err


def test_errors_of_the_system_are_readable():
    assert (
        explain(FileNotFoundError(2, "No such file or directory", "x.parquet"))
        == "No such file or directory: x.parquet"
    )
    assert explain(FileExistsError(17, "data exists: choose another")) == "data exists: choose another"
    assert explain(ValueError()) == "ValueError"


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    def broken(args):
        raise KeyError("bug")

    monkeypatch.setattr(retrieval, "index", broken)
    with pytest.raises(KeyError):
        main(["index", "--model", "x"])


def test_ctrl_c_exits_130(monkeypatch, run):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieval, "index", interrupted)
    assert run("index", "--model", "x", code=130) == "pinrec index: interrupted\n"


def test_tables_align_whatever_the_cells_hold():
    text = table(["id", "n"], [["new\nline", 1], ["沙发", 22], ["x" * 99, None]], right=["n"])
    lines = text.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("new\\nline ")
    assert lines[2].endswith(" 1")
    assert lines[3].startswith("沙发 ")
    assert "…" in lines[4]


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "world"
    assert main(["simulate", "--size", "2000", "--output-dir", str(folder)]) == 0
    return folder


def test_simulate_and_prepare(simulated, run, run_json, tmp_path):
    out = tmp_path / "data"
    arguments = ["--log", simulated / "log", "--items", simulated / "items.parquet", "--output-dir", out]
    report = run_json("prepare", *arguments, "--negative-outcome", "hide")
    assert report["rows_read"]["log"] == 2000
    assert json.loads((out / "metadata.json").read_text())["negative_outcomes"] == ["hide"]
    assert "exists" in run("prepare", *arguments, code=2)
    assert "exists" in run("simulate", "--size", 2000, "--output-dir", simulated, code=2)
    assert "1,000 to 100,000,000" in run("simulate", "--size", 10, "--output-dir", tmp_path / "x", code=2)


def test_simulate_prints_the_best_reachable_recall(run, tmp_path):
    text = run("simulate", "--size", 1000, "--world", "no_drift", "--output-dir", tmp_path / "world")
    assert "best reachable recall" in text
    assert "R@10" in text
    assert "pinrec prepare --log" in text


def test_simulate_ab(simulated, run, run_json, tmp_path):
    world, data = simulated, tmp_path / "data"
    tables = ["--items", world / "items.parquet", "--queries", world / "queries.parquet"]
    run("prepare", "--log", world / "log", *tables, "--negative-outcome", "hide", "--output-dir", data)
    tokenizer = build_tokenizer(data, model_max_length=64)
    names = {name: getattr(tokenizer, name) for name in ("surfaces", "outcomes", "negative_outcomes", "query_size")}
    sizes = {"num_items": len(tokenizer.catalogue), "content_size": tokenizer.catalogue.content_size}
    for folder, kind in (("pinrec", PinRecModel), ("tower", TwoTowerModel)):
        kind(kind.config_class.from_preset("tiny", **names, **sizes)).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    words = ["simulate", "--ab", "--world", world, "--data", data]
    models = ["--a", tmp_path / "pinrec", "--b", tmp_path / "tower"]
    result = run_json(*words, *models, "-k", 20, "--design", "split", "--output-dir", tmp_path / "split")
    assert (result["k"], result["design"], result["splits"]) == (20, "split", 2000)
    assert result["totals"]["a"]["requests"] == result["totals"]["b"]["requests"]
    text = run(*words, "--a", "popularity", "--b", tmp_path / "tower", "--output-dir", tmp_path / "ab")
    assert "A = popularity" in text
    assert text.count("| hide") == 4
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"online_test.json", "online_test.md"}

    new = ["--output-dir", tmp_path / "new"]
    assert "--ab needs --a, --b" in run(*words, *new, code=2)
    assert "leave it out" in run(*words, *models, "--size", 5000, *new, code=2)
    assert "add --ab" in run("simulate", "--data", data, *new, code=2)
    assert "choose one of" in run(*words, *models, "--design", "both", *new, code=2)
    assert "exists" in run(*words, *models, "--output-dir", tmp_path / "ab", code=2)
    assert "no world.json" in run("simulate", "--ab", "--data", data, *models, *new, code=2)
    assert not (tmp_path / "new").exists()


def test_prepare_maps_columns_and_tells_what_it_did(run, tmp_path):
    day = np.arange(40) * 43_200 + 1_700_006_400
    log = pa.table({"who": ["a", "b"] * 20, "what": [f"i{n % 7}" for n in range(40)], "when": day})
    pq.write_table(log, tmp_path / "log.parquet")
    columns = ["user_id=who", "item_id=what", "timestamp=when"]
    arguments = ["prepare", "--log", tmp_path / "log.parquet", "--time-unit", "s", "--output-dir", tmp_path / "data"]
    assert "'user_id' is missing" in run(*arguments, code=2)
    assert "looks like 's'" in run(*arguments[:3], *arguments[5:], "--columns", *columns, code=2)
    assert "write NAME=VALUE" in run(*arguments, "--columns", "user_id", code=2)
    text = run(*arguments, "--columns", *columns)
    assert "items in the catalogue: 7" in text
    assert "training/pretrain.py --data" in text


def test_prepare_says_what_titles_are_good_for(run, tmp_path):
    log = {"user_id": ["a", "a", "a"], "item_id": ["x", "y", "x"], "timestamp": [1.7e9, 1.7001e9, 1.7002e9]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    pq.write_table(pa.table({"item_id": ["x", "y"], "title": ["Red sofa", "Lamp"]}), tmp_path / "items.parquet")
    words = ["embed", "--input", tmp_path / "items.parquet", "--text-column", "title", "--words"]
    assert "2 rows, 3 features" in run(*words, "--output", tmp_path / "words.parquet")
    common = ["--log", tmp_path / "log.parquet", "--time-unit", "s"]
    for items, told in (("items", True), ("words", False)):
        text = run("prepare", *common, "--items", tmp_path / f"{items}.parquet", "--output-dir", tmp_path / items)
        assert ("pinrec embed --words" in text) == told


def test_prepare_needs_a_log_or_a_public_set(run, tmp_path):
    out = ["--output-dir", tmp_path / "data"]
    assert "--log, or --public" in run("prepare", *out, code=2)
    assert "--public needs --folder" in run("prepare", "--public", "kuairand", *out, code=2)
    assert "no public set 'netflix'" in run("prepare", "--public", "netflix", "--folder", tmp_path, *out, code=2)
    assert "events.parquet" in run("prepare", "--public", "kuairand", "--folder", tmp_path, *out, code=2)
    words = ["prepare", "--public", "kuairand", "--folder", tmp_path, *out]
    said = run(*words, "--strict", "--negative-outcome", "x", code=2)
    assert "--public says --negative-outcome, --strict itself" in said
    assert "--log, or --public" in run("prepare", "--log", tmp_path, "--folder", tmp_path, *out, code=2)
    assert list(tmp_path.iterdir()) == []


def test_embed_needs_a_text_column(run, tmp_path):
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "items.parquet")
    arguments = ["--input", tmp_path / "items.parquet", "--model", tmp_path, "--output", tmp_path / "out.parquet"]
    assert "it has title" in run("embed", *arguments, "--text-column", "name", code=2)


# -- retrieval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def user(tiny_data):
    return pq.read_table(tiny_data / "test")["user_id"][0].as_py()


def test_index(saved_model, tiny_data, run_json, run, tmp_path):
    folder = shutil.copytree(saved_model, tmp_path / "model")
    (folder / "index.json").unlink()
    assert "pinrec index --model" in run("recommend", "--model", folder, code=2)
    assert run_json("index", "--model", folder)["num_items"] == 60
    assert "60 items" in run("index", "--model", folder, "--kind", "hnsw")
    assert "--tune and --data go together" in run("index", "--model", folder, "--tune", code=2)
    for words, message in (
        (["--recall", "0.9"], "--recall goes with --tune"),
        (["--time-unit", "s"], "--time-unit goes with --add"),
        (["--kind", "hnsw", "--milvus", "file.db"], "--kind is of an index by faiss"),
    ):
        assert message in run("index", "--model", folder, *words, code=2)
    text = run("index", "--model", folder, "--kind", "ivf", "--tune", "--data", tiny_data, "--recall", 0.9)
    chosen = json.loads((folder / "index.json").read_text())["setting"]
    assert f"search setting {chosen};" in text
    pq.write_table(pq.read_table(folder / "items.parquet").slice(1), folder / "items.parquet")
    assert "copy the file of the same model" in run("index", "--model", folder, code=2)


def test_an_index_that_says_too_little(saved_model, run, tmp_path):
    folder = shutil.copytree(saved_model, tmp_path / "model")
    about = json.loads((folder / "index.json").read_text())
    for name, message in (("encoder_fingerprint", "truncated, foreign"), ("dimension", "lacks 'dimension'")):
        (folder / "index.json").write_text(json.dumps({n: value for n, value in about.items() if n != name}))
        assert message in run("recommend", "--model", folder, code=2)


def test_an_index_on_a_strangers_server_is_not_called(saved_model, run, tmp_path, monkeypatch):
    folder = shutil.copytree(saved_model, tmp_path / "model")
    about = json.loads((folder / "index.json").read_text())
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    for uri in (
        "https://stranger.example",
        "https://stranger.example/a.db",
        "http:\t//stranger.example",
        "stranger.example",
    ):
        (folder / "index.json").write_text(json.dumps({**about, "kind": "milvus", "uri": uri, "collection": "c"}))
        assert "set MILVUS_URI to that address" in run("recommend", "--model", folder, code=2)


def test_what_is_damaged_or_foreign_is_told_in_a_line(saved_model, tiny_data, run, tmp_path):
    folder = shutil.copytree(saved_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-20])
    assert "truncated" in run("card", "--model", folder, code=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert "of type 'bert', not a PinRec model" in run("card", "--model", folder, code=2)
    (tmp_path / "before.json").write_text("[1]")
    words = ["monitor", "--model", saved_model, "--data", tiny_data, "--before", tmp_path / "before.json"]
    assert "holds no figures" in run(*words, code=2)


def test_a_history_may_hold_outcomes_that_train_lacks(saved_model):
    retriever = PinRecRetriever.from_pretrained(saved_model)
    history = {"item_id": ["p1"], "outcomes": [["save", None]], "surface": ["homefeed"], "timestamp": [1_700_006_400]}
    assert "save, unknown" in retrieval.history_table(retriever, history)


def test_recommend_shows_history_and_titles(saved_model, tiny_data, user, run):
    text = run(
        "recommend", "--model", saved_model, "--data", tiny_data, "--user", user, "--surface", "homefeed", "-k", 7
    )
    history, candidates = text.split("recommended on homefeed")
    assert "Title of" in history
    assert "up to the end of test" in history
    assert candidates.count("Title of") == 7


def test_trace_shows_the_path_as_text_picture_and_json(saved_model, tiny_data, user, run, run_json, tmp_path):
    words = ["trace", "--model", saved_model, "--data", tiny_data, "--user", user, "--surface", "homefeed"]
    text = run(*words, "--num-steps", 3, "--outcome", "save", "--picture", tmp_path / "path.png")
    assert "up to the end of test" in text
    # fed after steps 1 and 2, unless it was an item that is not live and so not shown; and the line that says so
    assert text.count("*") in (1 + 1, 2 + 1)
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["path.png"]
    steps = run_json(*words, "--num-steps", 3, "--outcome", "save", "--nearest", 2)["steps"]
    assert [(one["step"], len(one["nearest"])) for one in steps] == [(1, 2), (2, 2), (3, 2)]
    fed = {one["step"]: one["nearest"][0]["item_id"] for one in steps if one["is_fed"]}
    assert fed
    assert set(fed) <= {1, 2}
    assert len(set(fed.values())) == len(fed)
    assert "choose another --picture" in run(*words, "--picture", tmp_path / "path.png", code=2)
    assert "at least 1" in run(*words, "--nearest", 0, code=2)


def test_recommend_in_json_with_the_whole_request(saved_model, tiny_data, user, run_json):
    words = ["recommend", "--model", saved_model, "--data", tiny_data, "--user", user, "--surface", "search"]
    words += [
        "--query",
        "blue sofa",
        "--timestamp",
        "2023-11-20T00:00",
        "--outcome",
        "save=0.7",
        "--outcome",
        "click=0.3",
    ]
    result = run_json(*words, "--filter", "market=de", "--exclude", "p0", "--exclude", "with space", "-k", 60)
    found = result["candidates"]
    assert {row["columns"]["market"] for row in found} == {"de"}
    assert not {"p0", "with space"} & {row["item_id"] for row in found}
    assert result["request"]["timestamp"] == 1_700_438_400
    assert result["request"]["outcome_budget"] == {"save": 0.7, "click": 0.3}
    assert {"item_id", "row", "score", "outcome", "step", "columns"} == found[0].keys()


def test_recommend_to_a_user_without_history(saved_model, run):
    text = run("recommend", "--model", saved_model, "--context-item", "p3", "--surface", "related", "-k", 3)
    assert "recommended on related beside p3" in text
    assert text.count("Title of") == 3


def test_recommend_says_why_there_are_fewer_and_which_query_is_unknown(saved_model, run):
    words = ["recommend", "--model", saved_model, "--surface", "search", "-k", 5]
    assert "0 of 5: no other item passes the filters" in run(*words, "--filter", "market=nowhere")
    assert "'blue  sofa' has no vector" in run(*words, "--query", "blue  sofa")
    text = run(*words, "--query", "blue sofa")
    assert "no vector" not in text
    assert "of 5" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--user", "u1"], "--user needs --data"),
        (["--surface", "serach"], "'serach' is not among this model's surfaces"),
        (["--outcome", "save=lots"], "write save=0.7"),
        (["--outcome", "save=1", "--outcome", "save=2"], "given twice"),
        (["--outcome", "hide=1"], "'hide' is negative"),
        (["--outcome", "save=0"], "divides nothing"),
        (["--filter", "market"], "write NAME=VALUE"),
        (["--filter", "price=3"], "no column 'price'"),
        (["--timestamp", "yesterday"], "neither seconds since epoch nor an ISO 8601 time"),
        (["-k", "0"], "k is 0"),
        (["-k", "-3"], "k is -3"),
        (["-k", "10000000000000"], "at most 1,000,000"),
    ],
)
def test_recommend_refuses_in_words(saved_model, run, words, message):
    assert message in run("recommend", "--model", saved_model, *words, code=2)


def test_recommend_to_unknown_users(saved_model, tiny_data, run, tmp_path):
    words = ["recommend", "--model", saved_model, "--user", "nobody", "--data"]
    assert "'nobody' is in no split" in run(*words, tiny_data, code=2)
    assert "pinrec prepare" in run(*words, tmp_path, code=2)


def test_retrieve_and_export(saved_model, tiny_data, run_json, run, tmp_path):
    common = ["--model", saved_model, "--users", tiny_data / "test", "--surface", "homefeed"]
    result = run_json("retrieve", *common, "--output-dir", tmp_path / "candidates", "-k", 5)
    assert pq.read_table(tmp_path / "candidates").num_rows == result["num_candidates"] > 0
    assert "exists" in run("retrieve", *common, "--output-dir", tmp_path / "candidates", code=2)
    assert run_json("export", *common, "--output-dir", tmp_path / "vectors")["num_items"] == 60
    assert "exists" in run("export", *common, "--output-dir", tmp_path / "vectors", code=2)
    assert "candidates for" in run("retrieve", *common, "--output-dir", tmp_path / "again", "-k", 5)
    assert "inner product" in run("export", *common, "--output-dir", tmp_path / "again-vectors")


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_beside_baselines(saved_model, tiny_data, model, tokenizer, run_json, run, tmp_path):
    tower = TwoTowerModel(TwoTowerConfig(**{**model.config.to_dict(), "model_type": "pinrec_two_tower"}))
    tower.save_pretrained(tmp_path / "tower")
    tokenizer.save_pretrained(tmp_path / "tower")
    words = ["evaluate", "--model", saved_model, "--data", tiny_data, "--max-users", 20]
    baseline = ["--baseline", f"two-tower={tmp_path / 'tower'}"]
    options = [*baseline, "-k", 5, "-k", 20, "--category-column", "topic"]
    result = run_json(*words, "--output-dir", tmp_path / "report", *options)
    names = [system["name"] for system in result["evaluations"]]
    assert names[:3] == ["PinRec", "PinRec, any outcome", "two-tower"]
    assert names[3].startswith("popularity")
    pairs = [(comparison["a"], comparison["b"]) for comparison in result["comparisons"]]
    assert pairs == [(names[0], name) for name in names[1:]] + [(names[1], name) for name in names[2:]]
    assert result["evaluations"][0]["ks"] == [5, 20]
    assert all(system["metrics"]["category_entropy@5"]["value"] > 0 for system in result["evaluations"])
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "report.html",
    ]
    assert "exists" in run(*words, "--output-dir", tmp_path / "report", code=2)
    text = run(*words, "--split", "test", "--output-dir", tmp_path / "test")
    assert "PinRec minus popularity" in text
    assert "PinRec, any outcome minus popularity" in text
    assert "recall@50" in text


def test_evaluate_refuses_foreign_baselines(saved_model, tiny_data, run, tmp_path):
    words = ["evaluate", "--model", saved_model, "--data", tiny_data, "--max-users", 5, "--output-dir", tmp_path / "r"]
    assert "write NAME=VALUE" in run(*words, "--baseline", "two-tower", code=2)
    assert "no feature 'genre=...'" in run(*words, "--category-column", "genre", code=2)
    folder = shutil.copytree(saved_model, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["PinRecGiant"]}))
    assert "holds a PinRecGiant" in run(*words, "--baseline", f"x={folder}", code=2)
    assert not (tmp_path / "r").exists()


# -- as a process ----------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    words = ["simulate", "--size", "20000000", "--output-dir", str(tmp_path / "world")]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in a shell's background
    command = [sys.executable, "-m", "pinrec_hf", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    for _ in range(600):
        if list(tmp_path.glob("world.partial-*")):
            break
        time.sleep(0.1)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("pinrec simulate: interrupted\n")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error(saved_model):
    command = f"{sys.executable} -m pinrec_hf recommend --model {saved_model} -k 60 --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
