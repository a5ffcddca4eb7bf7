"""Over HTTP: the offline answers, histories that are true at once, and errors that explain and give nothing away."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import offline, served, told

from pinrec_hf import PinRecRetriever
from pinrec_hf.retrieval.history_cache import HistoryCache
from pinrec_hf.serving.app import create_app
from pinrec_hf.serving.guard import read_keys
from pinrec_hf.serving.histories import HistoryUnavailable, SQLiteHistories
from pinrec_hf.serving.metrics import Metrics
from pinrec_hf.serving.release import MeasuredRetriever, Releases

NOW = 1_700_006_400 + 7 * 86_400


def events_of(user, *items, surface="homefeed", outcomes=("save",)):
    fields = {"user_id": user, "surface": surface, "outcomes": list(outcomes)}
    return [{**fields, "item_id": item, "timestamp": NOW - 600 + i} for i, item in enumerate(items)]


def post(client, route, body):
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_offline_ones(client, retriever, requests_example, saved_model):
    requests = [
        {**request, "k": k, **more}
        for request in requests_example
        for k, more in (
            (7, {}),
            (20, {"num_steps": 3}),
            (60, {"outcome_budget": {"save": 0.7, "click": 0.3}}),
            (1_000, {"exclude": ["p3", "none such"], "filters": {"market": ["de"]}}),
        )
    ]
    expected = [offline(retriever, request) for request in requests]
    for request, right in zip(requests, expected, strict=True):
        answer = post(client, "/v1/recommend", request)
        assert told(answer["candidates"]) == right
        assert answer["release"] == saved_model.name
    with ThreadPoolExecutor(16) as threads:  # at once: in batches of mixed surfaces, budgets and k
        answers = threads.map(lambda request: post(client, "/v1/recommend", request), requests * 4)
        assert [told(answer["candidates"]) for answer in answers] == expected * 4
    assert [told(found) for found in post(client, "/v1/recommend/batch", {"requests": requests})["results"]] == expected


def test_an_appended_event_is_in_the_next_answer(client, retriever):
    request = {"user_id": "anna/ü", "surface": "search", "timestamp": NOW, "query": "blue sofa", "k": 20}
    assert told(post(client, "/v1/recommend", request)["candidates"]) == offline(retriever, request)
    assert post(client, "/v1/events", {"events": events_of("anna/ü", "p1", "p2", "gone")}) == {"appended": 3}
    history = {
        "item_id": ["p1", "p2", "gone"],
        "surface": ["homefeed"] * 3,
        "outcomes": [["save"]] * 3,
        "timestamp": [NOW - 600, NOW - 599, NOW - 598],
    }
    changed = offline(retriever, {**request, "history": history})
    assert told(post(client, "/v1/recommend", request)["candidates"]) == changed
    assert changed != offline(retriever, request)


def test_a_repeated_event_is_stored_once(client):
    events = {"events": events_of("bob", "p1", "p2")}
    assert [post(client, "/v1/events", events)["appended"] for _ in range(2)] == [2, 0]


def test_a_deleted_user_leaves_no_byte(make_app, retriever, tmp_path):
    computed = HistoryCache(1 << 24)
    with served(make_app(computed=computed)) as client:
        request = {"user_id": "secret/user", "surface": "homefeed", "timestamp": NOW, "k": 20}
        post(
            client, "/v1/events", {"events": [*events_of("secret/user", "p1", "hidden-item"), *events_of("kept", "p4")]}
        )
        post(client, "/v1/recommend", request)
        assert len(computed) == 1
        assert client.delete("/v1/users/secret%2Fuser").json() == {"deleted": 2}
        assert len(computed) == 0
        assert told(post(client, "/v1/recommend", request)["candidates"]) == offline(retriever, request)
        files = b"".join(path.read_bytes() for path in tmp_path.glob("events.sqlite*"))
        assert b"kept" in files
        assert b"secret" not in files
        assert b"hidden-item" not in files
        assert client.delete("/v1/users/secret%2Fuser").json() == {"deleted": 0}


def test_stored_names_that_a_release_lacks_count_as_unknown(make_app, tmp_path, retriever):
    store = SQLiteHistories(str(tmp_path / "events.sqlite"))
    store.append(events_of("old", "p1", surface="a surface of last year", outcomes=["save", "an outcome of it"]))
    with served(make_app()) as client:
        request = {"user_id": "old", "surface": "homefeed", "k": 9}
        history = {"item_id": ["p1"], "surface": [None], "outcomes": [["save", None]], "timestamp": [NOW - 600]}
        answer = post(client, "/v1/recommend", request)
        assert told(answer["candidates"]) == offline(retriever, {**request, "history": history})


def test_the_examples_of_the_openapi_document_are_answered(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/recommend/batch", "/v1/events", "/v1/users/{user_id}"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    examples = [("/v1/events", body) for body in schemas["EventsRequest"]["examples"]]
    examples += [("/v1/recommend", body) for body in schemas["RecommendRequest"]["examples"]]
    assert len(examples) == 3
    for route, body in examples:
        post(client, route, body)


def test_null_is_absent(client):
    absent = {"history": {"item_id": None, "outcomes": None}, "surface": None, "exclude": None, "filters": None}
    assert post(client, "/v1/recommend", {**absent, "k": 9}) == post(client, "/v1/recommend", {"k": 9})


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"surface": "homefed"}, "surface 'homefed' is not among this model's surfaces"),
        ({"k": 0}, "k: Input should be greater than or equal to 1"),
        ({"k": "10"}, "k: Input should be a valid integer"),
        ({"k": 1_001}, "k: Input should be less than or equal to 1000"),
        ({"outcome_budget": {"hide": 1.0}}, "negative"),
        ({"outcome_budget": {"save": 0.0}}, "divides nothing"),
        ({"histroy": {}}, "histroy: Extra inputs"),
        ({"history": {"item_id": ["p1"], "outcomes": [["save"], []]}}, "differ in length"),
        ({"history": {"item_id": ["p1"] * 10_001}}, "at most 10000"),
        ({"history": {"item_id": [17], "outcomes": [["save"]]}}, "17"),
        ({"filters": {"colour": "red"}}, "no column 'colour'"),
        ({"num_steps": 17}, "num_steps: Input should be less than or equal to 16"),
        ({"query": "sofa", "context_item_id": "p1"}, "both"),
    ],
)
def test_an_error_names_the_field_and_the_remedy(client, body, says):
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 422
    assert says in answer.json()["error"]


def test_a_body_that_is_not_said_to_be_json(client):
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):  # as curl sends it unasked
        answer = client.post("/v1/recommend", content=b'{"k": 3}', headers=headers)
        assert answer.status_code == 422
        assert "content-type: application/json" in answer.json()["error"]


def test_a_bad_request_of_a_batch_is_named(client):
    answer = client.post("/v1/recommend/batch", json={"requests": [{}, {"k": 3}, {"surface": "homefed"}]})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("requests[2]: surface 'homefed'")


def test_a_bad_request_does_not_spoil_its_neighbours(make_app, monkeypatch):
    gate, answer = threading.Event(), Releases.answer
    monkeypatch.setattr(Releases, "answer", lambda self, requests: gate.wait(20) and answer(self, requests))
    with served(make_app()) as client, ThreadPoolExecutor(8) as threads:
        bodies = [{"surface": "homefeed" if i != 3 else "homefed", "k": 5} for i in range(8)]
        asked = [threads.submit(client.post, "/v1/recommend", json=body) for body in bodies]
        while "pinrec_pending_requests 8.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        gate.set()  # one request runs, or a few; those that came meanwhile share a batch
        answers = [future.result() for future in asked]
        metrics = client.get("/metrics").text
        assert "pinrec_batch_size_sum 8.0" in metrics
        assert float(re.search("pinrec_batch_size_count (.*)", metrics)[1]) < 8
        assert [answer.status_code for answer in answers] == [200] * 3 + [422] + [200] * 4


def test_misspelt_events_are_refused_whole(client):
    wrong = {"events": [*events_of("carl", "p1"), *events_of("carl", "p2", surface="homefed")]}
    answer = client.post("/v1/events", json=wrong)
    assert (answer.status_code, "homefed" in answer.text) == (422, True)
    assert post(client, "/v1/events", {"events": events_of("carl", "p1")})["appended"] == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["save", "homefeed", "p1", "u1", 2**63, -(2**63), 1e308, "\ud800", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["market", "title", "save"]), inner, max_size=3)
    ),
    max_leaves=8,
)
HISTORY = {"item_id": ["p1"], "surface": ["search"], "outcomes": [["save"]], "timestamp": [NOW], "query": [None]}
VALID = [
    ("/v1/recommend", {"history": HISTORY, "surface": "search", "timestamp": NOW, "query": "rug", "k": 5}),
    ("/v1/recommend", {"filters": {"market": "de"}, "exclude": ["p1"], "outcome_budget": {"save": 1.0}}),
    ("/v1/recommend", {"query_embedding": [0.1] * 6, "context_item_id": "p1", "request_features": ["a=b"]}),
    ("/v1/recommend/batch", {"requests": [{"user_id": "u1"}]}),
    ("/v1/events", {"events": events_of("u1", "p1")}),
]


@st.composite
def damaged(draw):
    """A valid call, with some places of its body put to anything."""
    route, body = draw(st.sampled_from(VALID))
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 3))):
        place = body
        while True:
            keys = list(range(len(place))) if isinstance(place, list) else list(place)
            key = draw(st.sampled_from(keys)) if keys else None
            inner = place[key] if key is not None else None
            if key is None or not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                break
            place = inner
        if key is not None:
            place[key] = draw(JSON)
    return route, json.dumps(body).encode()


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(damaged() | st.tuples(st.sampled_from([route for route, _ in VALID]), st.binary(max_size=60)))
def test_nothing_that_is_sent_is_the_servers_fault(client, call):
    route, body = call
    answer = client.post(route, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 413, 422), (answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()) == {"error"}
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"k":' + b"9" * 5_000 + b"}", b"NaN", b'{"timestamp": 1e999}', b"\xff"]
)
def test_hostile_json_is_refused(client, body):
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def test_a_body_over_the_limit_is_refused_with_and_without_a_length(client):
    large = b" " * (4 * 1024 * 1024 + 1)
    chunks = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
    for content in (large, chunks):
        answer = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "larger than" in answer.json()["error"]


def test_an_internal_error_gives_nothing_away(make_app, caplog, monkeypatch):
    app = make_app()
    monkeypatch.setattr(MeasuredRetriever, "search", lambda self, requests, k: 1 / requests[0]["k"].secret)
    with served(app) as client:
        answer = client.post("/v1/recommend", json={"user_id": "u1"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "internal error; it is in the server's log"}
    (logged,) = [record.fields for record in caplog.records if record.levelname == "ERROR"]
    assert logged["error"] == "AttributeError"
    assert "test_app.py" in logged["at"][-1]


def test_routes_and_methods_that_do_not_exist(client):
    assert client.get("/v1/none").status_code == 404
    assert client.get("/v1/recommend").status_code == 405


# -- who may ask -----------------------------------------------------------------------------------------------------


def test_keys_open_everything_and_health_needs_none(make_app, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n0123456789abcdef\n\nanother-key-of-some-length\n")
    with served(make_app(keys=read_keys(path))) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        for key in (
            None,
            "Bearer x",
            "Bearer 0123456789abcdeg",
            "Basic 0123456789abcdef",
            "0123456789abcdef",
            "# ours",
        ):
            headers = {} if key is None else {"Authorization": key}
            for method, route in (("POST", "/v1/recommend"), ("GET", "/metrics"), ("DELETE", "/v1/users/u1")):
                assert client.request(method, route, headers=headers).status_code == 401
        for key in ("0123456789abcdef", "another-key-of-some-length"):
            answer = client.post("/v1/recommend", json={}, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200


@pytest.mark.parametrize("text", ["", "# only a comment\n", "short\n"])
def test_a_key_file_without_a_good_key_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="at least 16 characters"):
        read_keys(tmp_path / "keys")


def test_a_server_without_histories_says_so(saved_model):
    metrics = Metrics()
    with served(create_app(Releases(saved_model, metrics), metrics)) as client:
        for answer in (
            client.post("/v1/recommend", json={"user_id": "u1"}),
            client.post("/v1/events", json={"events": events_of("u1", "p1")}),
            client.delete("/v1/users/u1"),
        ):
            assert (answer.status_code, "--histories" in answer.text) == (422, True)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_metrics_tell_what_was_served(make_app, retriever):
    def figures():
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    with served(make_app()) as client:
        history = {
            "item_id": ["p1", "never seen"],
            "outcomes": [["save"], ["click"]],
            "timestamp": [NOW - 90, NOW - 80],
        }
        request = {"history": history, "surface": "homefeed", "timestamp": NOW, "k": 12}
        budgets = {"save": 3, "click": 1}, {"click": 2}
        found = [post(client, "/v1/recommend", {**request, "outcome_budget": budget}) for budget in budgets]
        figure = figures()
    served_items = {c["item_id"] for answer in found for c in answer["candidates"]}
    outcomes = [c["outcome"] for answer in found for c in answer["candidates"]]
    assert figure["pinrec_history_items_total"] == 4
    assert figure["pinrec_unknown_history_items_total"] == 2
    assert figure["pinrec_history_age_seconds_sum"] == 160
    assert figure["pinrec_distinct_items_served"] == len(served_items)
    assert figure["pinrec_catalogue_items"] == 60
    assert figure['pinrec_slots_asked_total{outcome="save"}'] == 9
    assert figure['pinrec_slots_asked_total{outcome="click"}'] == 15
    for name in set(outcomes):
        assert figure[f'pinrec_slots_delivered_total{{outcome="{name}"}}'] == outcomes.count(name)
    assert figure['pinrec_http_responses_total{route="/v1/recommend",status="200"}'] == 2
    assert 0 < figure["pinrec_index_age_seconds"] < 3_600
    for stage in ("queue", "encode", "search"):
        assert figure[f'pinrec_stage_seconds_count{{stage="{stage}"}}'] >= 2
        assert figure[f'pinrec_stage_seconds_sum{{stage="{stage}"}}'] > 0
    written = retriever.generate([{**request, "outcome_budget": budget} for budget in budgets])
    hidden_size = retriever.model.config.hidden_size
    norms = [np.linalg.norm(by.embeddings[:, :hidden_size], axis=1).mean() for by in written]
    assert figure["pinrec_user_embedding_norm_count"] == 2
    assert figure["pinrec_user_embedding_norm_sum"] == pytest.approx(sum(norms), rel=1e-4)


# -- load ------------------------------------------------------------------------------------------------------------


def test_overload_is_refused_at_once_and_recovers(make_app, monkeypatch):
    gate, answer = threading.Event(), Releases.answer
    monkeypatch.setattr(Releases, "answer", lambda self, requests: gate.wait(20) and answer(self, requests))
    with served(make_app(max_batch=2, max_pending=6)) as client, ThreadPoolExecutor(6) as threads:
        accepted = [threads.submit(post, client, "/v1/recommend", {"k": 3}) for _ in range(6)]
        while "pinrec_pending_requests 6.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        for body in ({"k": 3}, {"requests": [{"k": 3}]}):
            refused = client.post("/v1/recommend" if "k" in body else "/v1/recommend/batch", json=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
        assert client.get("/readyz").status_code == 200
        gate.set()
        assert all(len(future.result()["candidates"]) == 3 for future in accepted)
        assert post(client, "/v1/recommend", {"k": 3})


def test_a_call_past_its_deadline_is_told_and_not_computed(make_app, monkeypatch):
    gate, answer, computed = threading.Event(), Releases.answer, []

    def slow(self, requests):
        gate.wait(20)
        computed.extend(request["k"] for request in requests)
        return answer(self, requests)

    monkeypatch.setattr(Releases, "answer", slow)
    with served(make_app(max_batch=1, deadline=1)) as client, ThreadPoolExecutor(2) as threads:
        running = threads.submit(client.post, "/v1/recommend", json={"k": 3})
        time.sleep(0.1)
        waiting = threads.submit(client.post, "/v1/recommend", json={"k": 4})
        assert [running.result().status_code, waiting.result().status_code] == [504, 504]
        gate.set()
        assert post(client, "/v1/recommend", {"k": 5})
    assert computed == [3, 5]


def test_histories_that_cannot_be_reached_are_not_lost_silently(make_app, monkeypatch):
    def full(self, events):
        raise HistoryUnavailable("disk full at /some/place")

    monkeypatch.setattr(SQLiteHistories, "append", full)
    with served(make_app()) as client:
        answer = client.post("/v1/events", json={"events": events_of("u1", "p1")})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "place" not in answer.text


def test_a_release_is_swapped_under_load_without_a_mixed_answer(saved_model, other_model, tmp_path):
    body = {"requests": [{"surface": surface, "k": 10, "timestamp": NOW} for surface in ("homefeed", "search")] * 4}
    right = {
        folder.name: [offline(PinRecRetriever.from_pretrained(folder), request) for request in body["requests"]]
        for folder in (saved_model, other_model)
    }
    assert len({str([item for item, *_ in lists[0]]) for lists in right.values()}) == 2
    (tmp_path / "current").symlink_to(saved_model)
    metrics = Metrics()
    releases = Releases(tmp_path / "current", metrics)

    def point_to(folder):
        (tmp_path / "new").symlink_to(folder)
        (tmp_path / "new").rename(tmp_path / "current")
        releases.reload()
        return folder.name

    with served(create_app(releases, metrics)) as client, ThreadPoolExecutor(4) as threads:
        until = time.time() + 2.5

        def ask(_):
            answers = []
            while time.time() < until:
                answers.append(post(client, "/v1/recommend/batch", body))
            return answers

        asking = [threads.submit(ask, i) for i in range(4)]
        time.sleep(0.3)
        for folder in (other_model, saved_model, other_model):
            point_to(folder)
            time.sleep(0.3)
        (tmp_path / "broken").mkdir()
        point_to(tmp_path / "broken")  # refused: the present one goes on
        assert client.get("/readyz").json() == {"status": "ready", "release": other_model.name}
        answers = [answer for future in asking for answer in future.result()]
        text = client.get("/metrics").text
    assert {answer["release"] for answer in answers} == set(right)
    for answer in answers:
        assert [told(found) for found in answer["results"]] == right[answer["release"]]
    assert 'pinrec_release_loads_total{result="refused"} 1.0' in text
    assert 'pinrec_release_loads_total{result="loaded"} 3.0' in text


def test_a_client_that_leaves_does_no_harm(client):
    body = json.dumps({"k": 50}).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    for sent in (body, body[:4], b""):  # before the answer, within the body, before it
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + sent)
    assert post(client, "/v1/recommend", {"k": 3})
    assert "pinrec_pending_requests 0.0" in client.get("/metrics").text
