import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pinrec_hf.data import sequence_files
from pinrec_hf.data.sequence_files import SequenceFiles, sequence_schema

SCHEMA = sequence_schema(pa.int64(), pa.string(), {"weight"})


def users(lengths: list[int]) -> pa.Table:
    columns = {"user_id": list(range(len(lengths))), "target_start": [0] * len(lengths)}
    filler = {
        "item_id": "x",
        "surface": "home",
        "timestamp": 1,
        "outcomes": ["save"],
        "request_id": 0,
        "weight": 1.0,
    }
    columns |= {name: [[value] * n for n in lengths] for name, value in filler.items()}
    return pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in columns])).select(SCHEMA.names)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_files_depend_on_the_rows_alone(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(sequence_files, "EVENTS_PER_ROW_GROUP", 10)
    monkeypatch.setattr(sequence_files, "ROW_GROUPS_PER_FILE", 2)
    rows = users([3, 7, 25, 1, 1, 8, 2, 4, 9, 1])
    with SequenceFiles(tmp_path / "train", SCHEMA) as files:
        for start in range(0, rows.num_rows, batch):
            files.write(rows.slice(start, batch))
    assert files.num_users == 10
    written = sorted((tmp_path / "train").iterdir())
    groups = [
        pq.read_metadata(file).row_group(g).num_rows
        for file in written
        for g in range(pq.read_metadata(file).num_row_groups)
    ]
    assert groups == [2, 1, 3, 3, 1]  # 10, 25, 10, 15 and 1 events
    assert [file.name for file in written] == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert pa.concat_tables(pq.read_table(file) for file in written).equals(rows)


def test_columns_are_dictionary_encoded(tmp_path):
    with SequenceFiles(tmp_path / "train", SCHEMA) as files:
        files.write(users([5, 5]))
    group = pq.read_metadata(tmp_path / "train" / "part-00000.parquet").row_group(0)
    surface = next(
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith("surface")
    )
    assert "RLE_DICTIONARY" in surface.encodings
