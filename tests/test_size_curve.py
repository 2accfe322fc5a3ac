"""tools/size_curve.py: which points are worth their bytes, and tables that cannot be compared."""

import json

import common
import pytest
import size_curve

GIVEN = dict(row="as given", bpb=2.0, stderr=0.01, seqs=64, bytes=20_000, artifact_bytes=9_000)


def write_table(path, *rows, **changes):
    """A file as quant_table.py writes it, of rows (storage, bytes, cost)."""
    found = [dict(row=row, artifact_bytes=size, cost=cost) for row, size, cost in rows]
    path.write_text(json.dumps([GIVEN | changes, *found]))
    return path


@pytest.fixture
def tables(tmp_path):
    """Two models: the wide one is better at 3,000 bytes, the deep one at 2,000; at 4,000 it is
    larger than the wide one at 3,000, and worse."""
    wide = write_table(tmp_path / "wide.json", ("int8", 3000, 0.0), ("int4", 2000, 0.5), bpb=1.75)
    deep = write_table(tmp_path / "deep.json", ("int8", 4000, 0.0), ("int4", 2000, 0.125))
    return [wide, deep]


def test_what_is_worth_its_bytes(tables, tool, tmp_path):
    picture = tmp_path / "a.png"
    done = tool(size_curve, *tables, "--out", picture)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[2:]
    assert rows == ["| 2,000 | 2.1250 | deep | int4 |", "| 3,000 | 1.7500 | wide | int8 |"]
    assert common.made_picture(picture)


def test_points_are_kept_if_none_is_smaller_and_better():
    points = [
        size_curve.Point("m", storage, size, bpb)
        for storage, size, bpb in [("a", 5, 1.0), ("b", 4, 1.0), ("c", 4, 2.0), ("d", 3, 3.0)]
    ]
    assert [point.storage for point in size_curve.worth_their_bytes(points)] == ["d", "b"]
    assert size_curve.worth_their_bytes([]) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(bytes=21_000), "is of 64 windows with 21000 bytes, and "),
        (dict(seqs=32), "is of 32 windows with 20000 bytes, and "),
        (dict(bpb="2"), "make it again with tools/quant_table.py"),
        (dict(row="mine"), "is no table of tools/quant_table.py --out"),
    ],
)
def test_tables_that_cannot_be_compared_are_one_line(changes, message, tables, tool, tmp_path):
    other = write_table(tmp_path / "other.json", ("int8", 3000, 0.0), **changes)
    done = tool(size_curve, *tables, other)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{other}: " in done.stderr and message in done.stderr


def test_tables_without_rows_bytes_or_names_of_their_own_are_one_line(tables, tool, tmp_path):
    empty = write_table(tmp_path / "empty.json")
    assert "empty.json: has no rows" in tool(size_curve, empty).stderr
    old = tmp_path / "old.json"
    old.write_text(json.dumps([{"row": "as given", "bpb": 2.0, "seqs": 64}]))
    assert "'bytes': make it again with tools/quant_table.py" in tool(size_curve, old).stderr
    assert (
        "wide, wide: two of these labels are the same"
        in tool(size_curve, tables[0], tables[0]).stderr
    )
