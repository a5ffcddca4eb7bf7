import collections
import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data.amazon import load_amazon
from pinrec_hf.data.kuairand import load_kuairand
from pinrec_hf.data.movielens import load_movielens
from pinrec_hf.data.public import PUBLIC_SETS, prepare_public
from pinrec_hf.data.trivago import load_trivago

DATA = Path(os.environ.get("PINREC_DATA", Path(__file__).parents[2] / "../shared/data"))


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not in PINREC_DATA ({DATA})")
    return DATA / name


def records(table, *columns):
    return [tuple(row.values()) for row in table.select(list(columns)).to_pylist()]


def read(folder, split):
    return pq.read_table(folder / split).to_pylist()


KUAIRAND_FLAGS = [
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "tab",
]
KUAIRAND_LOG = ",".join(["user_id", "video_id", "date", "hourmin", "time_ms", *KUAIRAND_FLAGS]) + "\n"
KUAIRAND_ITEMS = """video_id,author_id,video_type,upload_dt,upload_type,video_duration,music_id,tag
0,7,NORMAL,2022-04-10,Web,64000.0,5,"3,9"
1,8,AD,2022-04-09,UNKNOWN,,6,
"""


def kuairand_line(user, video, ms, tab=1, **flags):
    values = ({"tab": tab} | flags).get
    return ",".join(map(str, [user, video, 20220408, 1000, ms, *(values(name, 0) for name in KUAIRAND_FLAGS)])) + "\n"


def test_kuairand_from_its_published_files(tmp_path):
    ms = 1_649_400_000_000
    first = [
        kuairand_line(2, 0, ms + 1, is_click=1, long_view=1, is_forward=1),
        kuairand_line(2, 1, ms, is_click=1, long_view=1, tab=4),
        kuairand_line(2, 1, ms, is_click=1, long_view=1, tab=4),  # twice the same row
        kuairand_line(1, 1, ms + 2, is_click=1, is_hate=1),
    ]
    second = [kuairand_line(2, 0, ms + 10**9, is_click=1), kuairand_line(1, 0, ms + 10**9)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text(KUAIRAND_LOG + "".join(first))
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text(KUAIRAND_LOG + "".join(second))
    (folder / "video_features_basic_pure.csv").write_text(KUAIRAND_ITEMS)
    log, items = load_kuairand(tmp_path)
    assert records(log, "user_id", "item_id", "surface", "outcomes") == [
        (1, 1, "1", ["hate"]),
        (1, 0, "1", []),
        (2, 1, "4", ["long_view"]),
        (2, 0, "1", ["engage"]),
        (2, 0, "1", ["click"]),
    ]
    assert log["timestamp"][0].as_py() == datetime.fromtimestamp(ms / 1000 + 0.002, UTC).replace(tzinfo=None)
    assert records(items, "item_id", "features") == [
        (0, ["author=7", "music=5", "type=NORMAL", "upload_type=Web", "duration=6", "tag=3", "tag=9"]),
        (1, ["author=8", "music=6", "type=AD", "upload_type=UNKNOWN"]),
    ]
    assert items["available_from"][0].as_py() == datetime(2022, 4, 9, 16)


def test_kuairand_history_is_merged_in_order(tmp_path):
    ints = pa.list_(pa.int64())
    history = {
        "user_id": [5],
        "impression_seq": pa.array([[1, 2, 1, 3]], ints),
        "long_view_seq": pa.array([[9, 2, 8, 1]], ints),
        "like_seq": pa.array([[7, 8, 3]], ints),
    }
    pq.write_table(pa.table(history), tmp_path / "history_before_apr25.parquet")
    flags = ["is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate"]
    event = {"user_id": 5, "video_id": 1, "time_ms": 1_650_812_741_436, "tab": 0} | dict.fromkeys(flags, 0)
    pq.write_table(pa.Table.from_pylist([event]), tmp_path / "events.parquet")
    item = {"video_id": 1, "author_id": 2, "video_type": "A", "upload_dt": "2022-04-10", "upload_type": "W"}
    item |= {
        "video_duration": 5000.0,
        "music_id": 3,
        "tag": "1",
        "counts": 10,
        "show_cnt": 2.0,
        "play_progress": 0.5,
    }
    pq.write_table(pa.Table.from_pylist([item]), tmp_path / "items.parquet")
    log, items = load_kuairand(tmp_path)
    assert records(log, "item_id", "outcomes", "surface") == [
        (7, ["engage"], None),  # liked only: the oldest
        (9, ["long_view"], None),
        (8, ["engage"], None),  # liked and viewed, no longer in the impressions
        (1, [], None),
        (2, ["long_view"], None),
        (1, ["long_view"], None),  # the last of its two impressions
        (3, ["engage"], None),
        (1, [], "0"),
    ]
    assert log["timestamp"].null_count == 7
    assert set(items.column_names) == {"item_id", "available_from", "features"}
    assert not any(
        name in feature
        for row in items["features"].to_pylist()
        for feature in row
        for name in ("cnt", "counts", "progress")
    )


def test_movielens_from_its_published_files(tmp_path):
    ratings = [(user, 10, rating, 978300000 + user) for user, rating in zip(range(1, 6), [1, 3, 4, 5, 2], strict=True)]
    ratings += [(1, 20, 5, 978300009), (1, 10, 5, 978300001)]
    (tmp_path / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
    movies = "10::Cité des enfants perdus, La (1995)::Adventure|Sci-Fi\n20::Rare (1990)::Drama\n"
    (tmp_path / "movies.dat").write_bytes(movies.encode("latin1"))
    log, items = load_movielens(tmp_path)
    assert records(log, "user_id", "item_id", "outcomes", "order") == [
        (1, 10, ["watch"], 1),
        (1, 10, ["love"], 7),
        (2, 10, ["watch"], 2),
        (3, 10, ["like"], 3),
        (4, 10, ["love"], 4),
        (5, 10, ["watch"], 5),
    ]
    assert items.to_pylist() == [
        {
            "item_id": 10,
            "title": "Cité des enfants perdus, La (1995)",
            "features": ["genre=Adventure", "genre=Sci-Fi", "year=1995"],
        }
    ]


def test_amazon_from_its_published_files(tmp_path):
    reviews = [("u2", "B1", 1390694400), ("u1", "B2", 1390694400), ("u1", "B1", 1390694400)]
    lines = [json.dumps({"reviewerID": u, "asin": a, "unixReviewTime": t, "helpful": [0, 0]}) for u, a, t in reviews]
    with gzip.open(tmp_path / "reviews_Beauty_5.json.gz", "wt") as file:
        file.write("\n".join(lines))
    meta = [
        {"asin": "B2", "title": 'It\'s "red"', "brand": "X", "categories": [["Beauty", "Nails"], ["Beauty"]]},
        {"asin": "B0", "title": "never bought"},
        {"asin": "B1", "price": 1.5},
    ]
    with gzip.open(tmp_path / "meta_Beauty.json.gz", "wt") as file:
        file.write("\n".join(map(str, meta)))  # Python literals, as published
    log, items = load_amazon(tmp_path)
    assert records(log, "user_id", "item_id", "order") == [("u1", "B2", 2), ("u1", "B1", 3), ("u2", "B1", 1)]
    assert items.to_pylist() == [
        {"item_id": "B1", "title": None, "features": []},
        {
            "item_id": "B2",
            "title": 'It\'s "red"',
            "features": ["brand=X", "category=Beauty", "category=Nails", "word=it", "word=s", "word=red"],
        },
    ]


TRIVAGO = """user_id,session_id,timestamp,step,action_type,reference,platform,city,device,impressions,prices
a,s,1541030408,1,search for destination,"Niagara Falls, Canada",FR,Paris,mobile,,
a,s,1541030409,2,filter selection,4 Star,FR,Paris,mobile,,
a,s,1541030410,3,clickout item,12,FR,Paris,mobile,11|12|13,1|2|3
a,s,1541030411,4,interaction item image,12,FR,Paris,mobile,,
a,s,1541030412,5,interaction item info,unknown,FR,Paris,mobile,,
a,s,1541030413,6,search for item,13,FR,Paris,mobile,,
a,s,1541030414,7,clickout item,99,FR,Paris,mobile,11,1
"""


def test_trivago_from_its_published_files(tmp_path):
    (tmp_path / "train.csv").write_text(TRIVAGO)
    log, items = load_trivago(tmp_path)
    assert items is None
    where = "Niagara Falls, Canada"
    assert records(log, "item_id", "surface", "outcomes", "query", "position", "request_id") == [
        (None, "search", [], where, None, "s/1"),
        (None, "refine", [], "4 Star", None, "s/2"),
        (11, "result_list", [], where, 0, "s/3"),
        (12, "result_list", ["clickout"], where, 1, "s/3"),
        (13, "result_list", [], where, 2, "s/3"),
        (12, "item_detail", ["interaction"], None, None, "s/4"),
        (13, "search", ["search"], None, None, "s/6"),
        (11, "result_list", [], where, 0, "s/7"),
        (99, "result_list", ["clickout"], where, None, "s/7"),
    ]
    assert log["request_features"][0].as_py() == ["device=mobile", "platform=FR"]
    (tmp_path / "item_metadata.csv").write_text("item_id,properties\n12,Wifi|Pool\n")
    assert load_trivago(tmp_path)[1].to_pylist() == [{"item_id": 12, "features": ["property=Wifi", "property=Pool"]}]


@pytest.mark.parametrize("name", sorted(PUBLIC_SETS))
def test_a_folder_without_the_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*neither"):
        prepare_public(name, tmp_path, tmp_path / "out")


def test_an_unknown_set(tmp_path):
    with pytest.raises(ValueError, match="no public set 'netflix'; there are"):
        prepare_public("netflix", tmp_path, tmp_path / "out")


def test_real_kuairand(tmp_path):
    folder, out = real("kuairand_pure"), tmp_path / "data"
    report = prepare_public("kuairand", folder, out)
    assert report.findings == []
    history = report.rows_kept["log"] - 180_142
    assert (history, report.num_items) == (919_338, 7_583)
    assert sum(report.num_events.values()) == report.rows_kept["log"]
    assert report.num_events["validation"] + report.num_events["test"] == 48_779
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["surfaces"][:5] == ["1", "0", "4", "2", "6"]
    assert set(metadata["outcomes"]) == {"click", "long_view", "engage", "hate"}
    assert "hate" not in metadata["outcome_counts"]["1"]
    assert metadata["split"] == {
        "kind": "time",
        "train_end": 1651507200,
        "validation_end": 1651593600,
        "test_end": 1651766400,
    }
    targets, users = 0, 0
    for row in read(out, "test"):
        events = list(zip(row["item_id"], row["outcomes"], row["surface"], strict=True))
        acted, found = {item for item, what, _ in events[: row["target_start"]] if what}, 0
        for item, what, surface in events[row["target_start"] :]:
            is_target = bool(what) and what != ["hate"] and item not in acted
            found += is_target and surface in ("0", "1", "2", "4", "6")
            acted |= {item} if what else set()
        targets, users = targets + found, users + (found > 0)
    assert (targets, users) == (13_455, 8_103)


def test_real_movielens(tmp_path):
    folder, out = real("ml1m"), tmp_path / "data"
    report = prepare_public("ml1m", folder, out)
    assert report.findings == []
    assert (report.rows_kept["log"], report.num_items) == (999_611, 3_416)
    assert report.num_users == {"train": 6_040, "validation": 6_040, "test": 6_040}
    test = read(out, "test")
    assert collections.Counter(row["outcomes"][-1][0] for row in test) == {
        "watch": 2_478,
        "like": 1_990,
        "love": 1_572,
    }
    ratings = pq.read_table(folder / "ratings.parquet").to_pandas().sort_values(["user_id", "sasrec_pos"])
    order = ratings.groupby("user_id")["movie_id"].agg(list)
    assert all(row["item_id"] == order[row["user_id"]] for row in test)


@pytest.mark.parametrize(("name", "events", "items"), [("beauty", 198_502, 12_101), ("sports", 296_337, 18_357)])
def test_real_amazon(name, events, items):
    log, catalogue = load_amazon(real(f"amazon_{name}"))
    assert (log.num_rows, catalogue.num_rows) == (events, items)
    assert catalogue["title"].null_count == 0
    assert set(log["item_id"].unique().to_pylist()) == set(catalogue["item_id"].to_pylist())


def test_real_trivago():
    log, items = load_trivago(real("trivago"))
    assert items is None
    assert log.filter(pc.is_valid(log["position"])).num_rows == 312_539
    queries = log.filter(pc.is_null(log["item_id"]))
    assert (queries.num_rows, queries["query"].null_count) == (12_391, 0)
