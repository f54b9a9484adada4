"""`vlmdet inspect` as a user meets it: a screen, a page, a file of problems, or one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmdet.cli import main


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three pictures of 128 x 96 pixels: one like another, one truncated; a box two pixels too wide; a hostile class."""
    folder = tmp_path / "my set"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name in ("a", "b", "c"):
        picture = folder / "JPEGImages" / f"{name}.jpg"
        Image.radial_gradient("L").resize((128, 96)).save(picture, quality=90 if name == "a" else 40)
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>128</width><height>96</height></size>"
            "<object><name>&lt;script&gt;alert(1)&lt;/script&gt;</name><bndbox><xmin>64</xmin><ymin>48</ymin>"
            f"<xmax>{130 if name == 'b' else 120}</xmax><ymax>90</ymax></bndbox></object></annotation>"
        )
    broken = folder / "JPEGImages" / "c.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    (folder / "ImageSets/Main/train.txt").write_text("a\nc\n")
    (folder / "ImageSets/Main/val.txt").write_text("b\n")
    return folder


def test_screen_page_and_problems(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(voc)]) == 0
    printed = capsys.readouterr().out
    assert "3 pictures, 3 boxes, 1 class\n" in printed
    assert "page: inspect-my-set.html" in printed
    page = (tmp_path / "inspect-my-set.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    lines = (tmp_path / "inspect-my-set.problems.jsonl").read_text(encoding="utf-8").splitlines()
    found = sorted((problem["kind"], problem["id"], problem["action"]) for problem in map(json.loads, lines))
    assert found == [
        ("box_outside", "b", "box_clipped"),
        ("near_duplicate", "b", "kept"),
        ("truncated_image", "c", "row_dropped"),
    ]


def test_json_is_one_document_under_the_limits_that_were_named(voc: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "look.html"
    command = [sys.executable, "-m", "vlmdet", "inspect", str(voc), "--json", "--html", str(page)]
    limits = ["--min-pixels", "784", "--max-pixels", "3136", "--factor", "28"]
    done = subprocess.run([*command, *limits], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["images"], found["boxes"], found["rows_dropped"]) == (3, 3, 1)
    assert found["limits"] == {"min_pixels": 784, "max_pixels": 3136, "factor": 28}
    assert found["quantiles"]["tokens"]["max"] == 2  # 56 x 28: rounded down from 64.7 x 48.5
    assert found["problems"]["box_outside"] == {"box_clipped": 1}
    assert found["page"] == str(page) and page.is_file()
    assert Path(found["problems_file"]).is_file()
    assert "3 pictures" in done.stderr


def test_inspect_needs_no_torch(voc: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vlmdet.cli import main\n"
        f"assert main(['inspect', {str(voc)!r}, '--html', {str(tmp_path / 'p.html')!r}]) == 0\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'cv2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--model", "qwen2vl"], "did you mean 'qwen2-vl'"),
        (["--min-pixels", "0"], "--min-pixels"),
        (["--html", "."], "is a folder"),
        (["--classes", "cat"], "no class 'cat'"),
    ],
)
def test_a_mistake_is_one_line(
    voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(voc), *args]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))
