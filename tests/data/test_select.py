"""Choosing classes and rows, the validation split, rows that are left out, and the limit on them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmdet.boxes import FRACTIONS, Boxes
from vlmdet.data.select import check_pictures, check_places, drop_rows, ensure_val, refuse_above, select, write_problems
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset, Problem, Sample


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURE = encoded(Image.new("RGB", (40, 20)))


def sample(name: str, labels: Sequence[str] = (), *, group: str = "", data: bytes = PICTURE, **changes: Any) -> Sample:
    boxes = Boxes.from_array([[i / 10, 0, (i + 1) / 10, 1] for i in range(len(labels))], FRACTIONS, 40, 20)
    plain = Sample(name, lambda: data, 40, 20, boxes, tuple(labels), group=group, source=f"file:{name}")
    return replace(plain, **changes)


def dataset(**splits: Sequence[Sample]) -> DetectionDataset:
    labels = sorted({label for rows in splits.values() for row in rows for label in row.labels})
    return DetectionDataset("set", dict(splits), tuple(labels), FRACTIONS, "by hand")


def test_select_keeps_named_classes_and_all_pictures() -> None:
    given_set = dataset(train=[sample("a", ["RBC", "WBC", "RBC", "Platelets"]), sample("b", ["RBC"]), sample("c")])
    chosen = select(given_set, classes=["WBC", "Platelets"], rename={"WBC": "white blood cell"})
    a, b, c = chosen.splits["train"]
    assert a.labels == ("white blood cell", "Platelets")
    np.testing.assert_allclose(a.boxes.xyxy, [[0.1, 0, 0.2, 1], [0.3, 0, 0.4, 1]])
    assert (b.labels, len(b.boxes), c.labels) == ((), 0, ())
    assert chosen.labels == ("Platelets", "white blood cell")
    assert "3 boxes of other classes than WBC, Platelets are left out" in chosen.notes[0]
    assert given_set.splits["train"][0].labels == ("RBC", "WBC", "RBC", "Platelets"), "the source is untouched"


def test_select_without_wishes_changes_nothing() -> None:
    given_set = dataset(train=[sample("a", ["x", "y"])], test=[sample("b")])
    same = select(given_set)
    assert (same.labels, same.notes) == (("x", "y"), ())
    assert same.splits["train"][0].labels == ("x", "y")
    assert same.splits["train"][0].boxes.tolist() == given_set.splits["train"][0].boxes.tolist()


def test_two_classes_may_get_one_name() -> None:
    merged = select(dataset(train=[sample("a", ["cat", "dog"])]), rename={"cat": "pet", "dog": "pet"})
    assert merged.labels == ("pet",)
    assert merged.splits["train"][0].labels == ("pet", "pet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["wbc"]}, "no class 'wbc'; did you mean 'WBC'\\? there is: RBC, WBC"),
        ({"classes": ["zebra"]}, "no class 'zebra'; there is: RBC, WBC"),
        ({"classes": []}, "no class of set is chosen"),
        ({"classes": ["RBC"], "rename": {"WBC": "x"}}, "cannot rename 'WBC': it is not among the chosen"),
        ({"rename": {"WBC": " "}}, "cannot rename 'WBC' to an empty name"),
        ({"limit": 0}, "a limit of 0 rows"),
    ],
)
def test_select_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        select(dataset(train=[sample("a", ["RBC", "WBC"])]), **arguments)


def test_limit_is_a_seeded_nested_sample_in_order() -> None:
    rows = [sample(f"{i:03}", ["x"]) for i in range(100)]
    given_set = dataset(train=rows, val=rows[:5])
    ids = {limit: [row.id for row in select(given_set, limit=limit).splits["train"]] for limit in (10, 20, 100, 200)}
    assert [len(found) for found in ids.values()] == [10, 20, 100, 100]
    assert ids[10] == sorted(ids[10]) != [row.id for row in rows[:10]]
    assert set(ids[10]) < set(ids[20])
    assert ids[10] == [row.id for row in select(given_set, limit=10).splits["train"]]
    assert ids[10] != [row.id for row in select(given_set, limit=10, seed=1).splits["train"]]
    limited = select(given_set, limit=10)
    assert len(limited.splits["val"]) == 5
    assert limited.notes == ("train: 10 of 100 rows, drawn with seed 0",)


def test_a_val_split_that_is_there_is_kept() -> None:
    given_set = dataset(train=[sample("a")], val=[sample("b")])
    same, line = ensure_val(given_set)
    assert same is given_set
    assert "1 rows, the data set's own" in line


def test_val_is_made_of_train_alone() -> None:
    rows = [sample(f"{i:03}") for i in range(100)]
    made, line = ensure_val(dataset(train=rows, test=[sample("t")]), fraction=0.1, seed=3)
    assert {name: len(found) for name, found in made.splits.items()} == {"train": 90, "test": 1, "val": 10}
    assert {row.split for row in made.splits["val"]} == {"val"}
    assert {row.id for found in (made.splits["train"], made.splits["val"]) for row in found} == {row.id for row in rows}
    assert line in made.notes
    assert "10 of 100 train rows" in line
    assert "seed 3" in line
    turned, _ = ensure_val(dataset(train=rows[::-1]), fraction=0.1, seed=3)
    assert {row.id for row in turned.splits["val"]} == {row.id for row in made.splits["val"]}
    other, _ = ensure_val(dataset(train=rows), fraction=0.1, seed=4)
    assert {row.id for row in other.splits["val"]} != {row.id for row in made.splits["val"]}


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 100),
)
def test_groups_are_never_divided(sizes: list[int], fraction: float, seed: int) -> None:
    rows = [sample(f"{g}-{i}", group=f"g{g}") for g, size in enumerate(sizes) for i in range(size)]
    made, _ = ensure_val(dataset(train=rows), fraction=fraction, seed=seed)
    train, val = made.splits["train"], made.splits["val"]
    assert train
    assert val
    assert not {row.group for row in train} & {row.group for row in val}
    assert len(train) + len(val) == len(rows)
    assert len(val) <= max(round(fraction * len(rows)), min(sizes))


@pytest.mark.parametrize(
    ("splits", "fraction", "message"),
    [
        ({"test": [sample("a")]}, 0.1, "no train rows .* its splits: test \\(1\\)"),
        ({"train": [sample("a")]}, 0.1, "one group"),
        ({"train": [sample("a", group="g"), sample("b", group="g")]}, 0.1, "one group"),
        ({"train": [sample("a"), sample("b")]}, 1.0, "share of 1.0"),
        ({"train": [sample("a"), sample("b")]}, 0.0, "share of 0.0"),
    ],
)
def test_val_cannot_be_made(splits: dict[str, Any], fraction: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ensure_val(dataset(**splits), fraction=fraction)


def test_what_would_be_scored_against_boxes_elsewhere_is_left_out() -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)  # the row states its size before the turn
    rows = [sample("good", ["a"]), sample("turned", ["a"], data=turned), sample("broken", data=b"no picture")]
    kept, problems = check_places([*rows, sample("other size", data=encoded(Image.new("RGB", (30, 30))))])
    assert [row.id for row in kept] == ["good", "broken"]  # what cannot be opened becomes an error row
    assert [(problem.id, problem.kind) for problem in problems] == [
        ("turned", "exif_rotated"), ("other size", "size_mismatch"),
    ]  # fmt: skip


def test_drop_rows() -> None:
    given_set = dataset(train=[sample("a"), sample("b", data=b"")], val=[sample("c")])
    problems = check_pictures(given_set.splits["train"]) + [Problem("f", None, "c", "cmyk_image", "", "kept")]
    left = drop_rows(given_set, problems)
    assert {name: [row.id for row in rows] for name, rows in left.splits.items()} == {"train": ["a"], "val": ["c"]}
    assert left.problems == problems
    assert len(given_set.splits["train"]) == 2


def test_write_problems(tmp_path: Path) -> None:
    problems = [
        Problem("a.xml", 3, "id", "bad_box", 'said "ä"\nand more', "box_dropped"),
        Problem("b", None, "", "x", "", "kept"),
    ]
    path = write_problems(tmp_path / "run" / "problems.jsonl", problems)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [problem.as_dict() for problem in problems]
    assert list(json.loads(lines[0])) == ["file", "row", "id", "kind", "detail", "action"]
    assert write_problems(tmp_path / "none.jsonl", []).read_text(encoding="utf-8") == ""


def dropped(count: int) -> list[Problem]:
    return [Problem("f", row, str(row), "unreadable_image", "broken", "row_dropped") for row in range(count)]


def test_refuse_above() -> None:
    refuse_above([], 0)
    refuse_above(dropped(1), 100)
    refuse_above(dropped(50), 100, share=0.5)
    kept = [Problem("f", row, str(row), "box_outside", "", "box_clipped") for row in range(90)]
    refuse_above(kept + dropped(1), 100)
    refuse_above(dropped(1) * 5, 100)
    with pytest.raises(DataError, match=r"2 of 100 rows are dropped, over the limit of 1\.0% .*--max-problems"):
        refuse_above(dropped(2), 100)
    with pytest.raises(DataError, match="unreadable_image: 1; first: f, broken"):
        refuse_above(dropped(1), 0)
