"""Write Pascal VOC: one XML file a picture.

When: ONCE, by `write_dataset(…, to="voc")`.

    Annotations/000001.xml      JPEGImages/000001.jpg      ImageSets/Main/train.txt

Corners are whole pixels, counted from 0, as `data.readers.voc` takes them and most tools write them. The devkit of 2007
and tools that follow it to the letter count from 1 and include the last pixel: they see the upper left corner one pixel
further up and left. Source: the VOC2007 development kit, section 8.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from vlmdet.data.writers.files import Row, Writing
from vlmdet.errors import DataError

ROUNDING = "corners within half a pixel (whole pixels, counted from 0)"
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(writing: Writing) -> None:
    """Write every split.

    Raises:
        DataError: a class name holds a character that XML cannot hold.
    """
    for label in writing.dataset.labels:
        if _NOT_XML.search(label):
            raise DataError(
                f"the class {label!r} holds a control character, which XML cannot hold", "rename it with --rename"
            )
    annotations, lists = writing.root / "Annotations", writing.root / "ImageSets" / "Main"
    annotations.mkdir()
    lists.mkdir(parents=True)
    for split in writing.dataset.splits:
        stems = []
        for row in writing.rows(split, "JPEGImages"):
            (annotations / f"{row.stem}.xml").write_bytes(_annotation(writing, row))
            stems.append(f"{row.stem}\n")
        (lists / f"{writing.split_file(split)}.txt").write_text("".join(stems), encoding="utf-8")


def _annotation(writing: Writing, row: Row) -> bytes:
    tree = ElementTree.Element("annotation")
    _add(tree, folder="JPEGImages", filename=row.file.removeprefix("JPEGImages/"))
    _add(ElementTree.SubElement(tree, "size"), width=row.width, height=row.height, depth=3)
    _add(tree, segmented=0)
    corners = writing.corners(row, 0).astype(int).tolist()
    for label, (x1, y1, x2, y2) in zip(row.sample.labels, corners, strict=True):
        thing = ElementTree.SubElement(tree, "object")
        _add(thing, name=label, pose="Unspecified", truncated=0, difficult=0)
        _add(ElementTree.SubElement(thing, "bndbox"), xmin=x1, ymin=y1, xmax=x2, ymax=y2)
    ElementTree.indent(tree)
    # a bare carriage return would be read back as a line feed (XML 1.0, 2.11); only a class name can hold one
    return ElementTree.tostring(tree, encoding="unicode").replace("\r", "&#13;").encode() + b"\n"


def _add(parent: ElementTree.Element, **fields: str | int) -> None:
    for name, value in fields.items():
        ElementTree.SubElement(parent, name).text = str(value)
