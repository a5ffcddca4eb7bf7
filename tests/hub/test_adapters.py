"""Adapters of surfaces on one base: a mixed batch equals its rows, and what does not belong is refused."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pinrec_hf
from pinrec_hf.cli import main
from pinrec_hf.hub.adapters import ADAPTED, load_surface_adapters, save_surface_adapter
from pinrec_hf.hub.release import publish
from pinrec_hf.retrieval.build import build_index
from pinrec_hf.retrieval.encode import base_fingerprint, encode_requests, generate_requests
from pinrec_hf.retrieval.history_cache import HistoryCache
from pinrec_hf.retrieval.item_table import write_item_table
from pinrec_hf.retrieval.pretrained import load_pretrained
from pinrec_hf.retrieval.retriever import PinRecRetriever

SURFACES = ("homefeed", "search", "related", "shop")
BUDGET = {"save": 0.8, "click": 0.2}


def write_adapter(model, folder: Path, surface: str | None, seed: int = 0, rank: int = 4) -> Path:
    """An adapter that changes a lot, as if it had been trained."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=8, target_modules=ADAPTED, task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(copy.deepcopy(model), lora)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    save_surface_adapter(
        adapted, folder, surface=surface, outcome_budget=BUDGET, base_model="pinrec-tiny", revision=None,
        fingerprint=base_fingerprint(model),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model, tokenizer, tiny_data) -> Path:
    """An indexed base with pooled history that has learned a fourth surface's name."""
    folder = tmp_path_factory.mktemp("base") / "pinrec-tiny"
    model, names = make_model(pooled_history=True), copy.deepcopy(tokenizer)
    for each in (model, names):
        each.add_surfaces(["shop", "email"])
    model.save_pretrained(folder)
    names.save_pretrained(folder)
    write_item_table(tiny_data / "items.parquet", folder / "items.parquet", names.catalogue)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    model, _ = load_pretrained(base)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(model, folder / name, name, i, rank=2 + i) for i, name in enumerate(SURFACES)}


@pytest.fixture
def requests(requests_example) -> list[dict]:
    """Nine requests: every surface, one without an adapter, none at all; histories of different lengths."""
    surfaces = (*SURFACES, "email", None, "search", "shop", "email")
    made = [{**requests_example[i % len(requests_example)], "surface": surface} for i, surface in enumerate(surfaces)]
    return [{name: v for name, v in r.items() if name not in ("query", "context_item_id")} for r in made]


# -- mixed batches -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mixed_batch_equals_its_rows(base, adapters, requests):
    plain, tokenizer = load_pretrained(base)
    model = load_surface_adapters(copy.deepcopy(plain), adapters)
    assert isinstance(model, PeftModel)
    assert not model.training
    names = [r["surface"] if r["surface"] in adapters else "__base__" for r in requests]
    fields = {name: [r.get(name) for r in requests] for name in ("surface", "timestamp")}
    batch = tokenizer([r["history"] for r in requests], **fields)
    mixed = model(**batch, adapter_names=names).embeddings
    for i, request in enumerate(requests):
        row = tokenizer([request["history"]], surface=request["surface"], timestamp=request["timestamp"])
        alone = model(**row, adapter_names=[names[i]]).embeddings[0]
        assert torch.allclose(mixed[i], alone, atol=1e-5, rtol=1e-6), i
        unadapted = plain(**row).embeddings[0]
        assert torch.allclose(mixed[i], unadapted, atol=1e-5, rtol=1e-6) == (names[i] == "__base__"), i
        if names[i] != "__base__":  # and an adapter alone, on a base of its own
            single = load_surface_adapters(copy.deepcopy(plain), {names[i]: adapters[names[i]]})
            assert torch.allclose(single(**row).embeddings[0], alone, atol=1e-5, rtol=1e-6), i
    assert torch.equal(model.get_item_features(**_items(tokenizer)), plain.get_item_features(**_items(tokenizer)))


def _items(tokenizer) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tokenizer.item_table(np.arange(20)).items()}


def test_a_users_history_is_kept_by_adapter(base, adapters, requests):
    cache = HistoryCache(1 << 24)
    plain, cached = (PinRecRetriever.from_pretrained(base, adapters=adapters, histories=c) for c in (None, cache))
    requests = [{**request, "user_id": "one"} for request in requests]
    for request in [*requests, *requests]:
        (found,), (whole,) = cached.generate([request]), plain.generate([request])
        assert np.allclose(found.embeddings, whole.embeddings, atol=1e-5, rtol=0)
    assert len(cache) == len(adapters) + 1  # surfaces without one share the base's


@torch.no_grad()
def test_double_precision_shows_that_nothing_but_rounding_differs(base, adapters, requests):
    model, tokenizer = load_pretrained(base)
    model = load_surface_adapters(model, adapters).double()
    names = [r["surface"] if r["surface"] in adapters else "__base__" for r in requests]
    batch = tokenizer([r["history"] for r in requests], surface=[r["surface"] for r in requests])
    mixed = model(**batch, adapter_names=names).embeddings
    for i, request in enumerate(requests):
        row = tokenizer([request["history"]], surface=request["surface"])
        assert torch.allclose(mixed[i], model(**row, adapter_names=[names[i]]).embeddings[0], atol=1e-6), i


@torch.no_grad()
def test_merged_for_one_surface_answers_stay_equal(base, adapters, requests, tmp_path):
    model, tokenizer = load_pretrained(base)
    adapted = load_surface_adapters(model, {"search": adapters["search"]})
    batch = tokenizer([r["history"] for r in requests], surface="search")
    expected = adapted(**batch).embeddings
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(**batch).embeddings, expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = pinrec_hf.PinRecModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(**batch).embeddings, expected, rtol=1e-5, atol=1e-5)
    assert again.config.outcome_budgets["search"] == BUDGET


@torch.no_grad()
def test_peft_finds_base_and_adapter_by_itself(base, adapters, requests, tmp_path):
    model, tokenizer = load_pretrained(base)
    folder = write_adapter(model, tmp_path / "search", "search", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    automatic = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    batch = tokenizer([r["history"] for r in requests], surface="search")
    expected = load_surface_adapters(model, {"search": folder})(**batch).embeddings
    assert torch.allclose(automatic(**batch).embeddings, expected, atol=1e-6)


@torch.no_grad()
def test_a_plain_model_refuses_adapter_names(base, adapters, requests):
    """PEFT's hooks are PeftModel's own: on the model inside, the names would be ignored and rows come out wrong."""
    model, tokenizer = load_pretrained(base)
    batch = tokenizer([requests[0]["history"]], surface="search")
    with pytest.raises(ValueError, match="for the PeftModel"):
        model(**batch, adapter_names=["search"])
    adapted = load_surface_adapters(model, adapters)
    with pytest.raises(ValueError, match="for the PeftModel"):
        adapted.get_user_features(**batch, adapter_names=["search"])


# -- retrieval ---------------------------------------------------------------------------------------------------


def test_a_retriever_answers_each_surface_by_its_adapter(base, adapters, requests):
    two = {name: adapters[name] for name in ("search", "shop")}
    mixed = PinRecRetriever.from_pretrained(base, adapters=two)
    plain = PinRecRetriever.from_pretrained(base)
    together, unadapted = mixed.search(requests, 10), plain.search(requests, 10)
    assert mixed.model.resolve_budget("shop") == BUDGET
    for i, request in enumerate(requests):
        surface = request["surface"]
        if surface in two:
            single = PinRecRetriever.from_pretrained(base, adapters={surface: two[surface]})
            assert single.search([request], 10).rows.tolist() == [together.rows[i].tolist()]
            assert not np.allclose(together.scores[i], unadapted.scores[i])
        else:
            assert together.rows[i].tolist() == unadapted.rows[i].tolist()
            assert mixed.model.resolve_budget(surface) == plain.model.resolve_budget(surface)


def test_several_steps_are_generated_by_each_surfaces_adapter(base, adapters, requests):
    model, tokenizer = load_pretrained(base)
    before = generate_requests(model, tokenizer, requests, num_steps=3)
    together = generate_requests(load_surface_adapters(model, adapters), tokenizer, requests, num_steps=3)
    for i, request in enumerate(requests):
        alone, tokenizer = load_pretrained(base)
        if request["surface"] in adapters:
            alone = load_surface_adapters(alone, {request["surface"]: adapters[request["surface"]]})
        (expected,) = generate_requests(alone, tokenizer, [request], num_steps=3)
        assert together[i].steps.tolist() == expected.steps.tolist()
        np.testing.assert_allclose(together[i].embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)
        same = together[i].embeddings.shape == before[i].embeddings.shape
        close = same and np.allclose(together[i].embeddings, before[i].embeddings, rtol=1e-4, atol=1e-4)
        assert close == (request["surface"] not in adapters)


def test_an_adapter_in_training_answers_every_request(base, requests):
    model, tokenizer = load_pretrained(base)
    before = encode_requests(model, tokenizer, requests)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=ADAPTED))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert not np.isclose(encode_requests(adapted, tokenizer, requests), before, atol=1e-3).all(-1).any()


def test_the_command_line(base, adapters, tiny_data, capsys):
    recommend = ["recommend", "--model", str(base), "--surface", "search", "--data", str(tiny_data), "--user", "u1"]
    candidates = []
    for options in ([], ["--adapter", f"search={adapters['search']}"], ["--adapter", f"shop={adapters['shop']}"]):
        assert main([*recommend, *options, "--json"]) == 0
        candidates.append(json.loads(capsys.readouterr().out)["candidates"])
    assert candidates[0] == candidates[2] != candidates[1]
    assert main([*recommend, *["--adapter", f"search={adapters['search']}"] * 2]) != 0
    assert "names a surface twice" in capsys.readouterr().err


# -- refusals ----------------------------------------------------------------------------------------------------


def edit(name: str, **changes):
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def truncate(name: str):
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return apply


def rewrite(change):
    def apply(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights, next(iter(weights)))
        save_file(weights, folder / "adapter_model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "surface_config.json").unlink(), "no surface_config.json"),
        (truncate("surface_config.json"), "truncated or foreign"),
        (edit("surface_config.json", format=2), "format 2, this version reads 1"),
        (edit("surface_config.json", surface="shop"), "the adapter of surface 'shop', not of 'search'"),
        (edit("surface_config.json", surface=None), "of all surfaces"),
        (edit("surface_config.json", base_fingerprint="0"), r"trained on another base \(pinrec-tiny\)"),
        (edit("surface_config.json", peft_version="99.0"), "written by PEFT 99.0"),
        (edit("surface_config.json", peft_version=None), "truncated or foreign"),
        (edit("surface_config.json", outcome_budget={"hide": 1}), "'hide' is negative"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (truncate("adapter_config.json"), "adapter_config.json is missing, truncated or foreign"),
        (edit("adapter_config.json", peft_type="IA3"), "no LoRA of a PinRec"),
        (edit("adapter_config.json", target_modules=["q_proj"]), "no LoRA of a PinRec"),
        (edit("adapter_config.json", r=9), "does not fit adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing, truncated or damaged"),
        (truncate("adapter_model.safetensors"), "missing, truncated or damaged"),
        (rewrite(lambda weights, name: weights.pop(name)), "does not fit"),
        (rewrite(lambda weights, name: weights.update(more=torch.ones(1))), "more has the shape"),
        (rewrite(lambda weights, name: weights[name].fill_(torch.nan)), "NaN or infinity"),
    ],
)
def test_foreign_and_damaged_adapters_are_refused_and_leave_the_base_alone(base, adapters, tmp_path, damage, message):
    model, _ = load_pretrained(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = Path(shutil.copytree(adapters["search"], tmp_path / "search"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_surface_adapters(model, {"homefeed": adapters["homefeed"], "search": folder})
    assert model.state_dict().keys() == before.keys()
    assert "search" not in model.config.outcome_budgets
    load_surface_adapters(model, {"search": adapters["search"]})  # nothing is left over


def test_what_the_names_must_be(base, adapters, tokenizer):
    model, _ = load_pretrained(base)
    with pytest.raises(ValueError, match="no adapters"):
        load_surface_adapters(model, {})
    with pytest.raises(ValueError, match=r"surface 'serach' is not among .* tokenizer.add_surfaces"):
        load_surface_adapters(model, {"serach": adapters["search"]})
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repo"):
        load_surface_adapters(model, {"search": "nowhere"})
    model.add_surfaces(["a.b", "items"])
    for name in ("a.b", "items"):
        with pytest.raises(ValueError, match="PEFT cannot name an adapter"):
            load_surface_adapters(model, {name: adapters["search"]})
    # the base grew, its adapters still fit; but they are loaded once
    load_surface_adapters(model, {"search": adapters["search"]})
    with pytest.raises(ValueError, match=r"carries the adapters \['search'\] already"):
        load_surface_adapters(model, {"shop": adapters["shop"]})


def test_another_base_is_refused(base, adapters):
    model, _ = load_pretrained(base)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another base"):
        load_surface_adapters(model, {"search": adapters["search"]})


def test_a_release_carries_its_adapters(base, adapters, tmp_path):
    folder, root = shutil.copytree(base, tmp_path / "model"), tmp_path / "releases"
    shutil.copytree(adapters["search"], folder / "adapters" / "search")
    good = publish(folder, root)
    assert load_surface_adapters(load_pretrained(good)[0], {"search": root / "current" / "adapters" / "search"})
    shutil.copytree(adapters["related"], folder / "adapters" / "shop")
    with pytest.raises(ValueError, match="related"):  # an adapter of another surface than its folder says
        publish(folder, root)
    assert (root / "current").resolve() == good.resolve()
