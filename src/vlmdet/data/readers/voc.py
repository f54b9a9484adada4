"""Read Pascal VOC: one XML file a picture.

When: ONCE, by `open_dataset`. A set is a folder, or holds one such folder:

    Annotations/BloodImage_00001.xml      <filename>, <size>, and an <object> with <name> and <bndbox> per box
    JPEGImages/BloodImage_00001.jpg
    ImageSets/Main/train.txt, val.txt, test.txt      one name a line; trainval.txt is a union, and no split of its own

Boxes are taken as `xyxy/pixel` as written. The devkit of 2007 counts pixels from 1 and includes the last one, most
tools that write this format count from 0; the two differ by one pixel at most and no file says which it is, so nothing
is subtracted. Pictures are not opened; of one whose file has no <size> the head is read. Source: the VOC2007
development kit, section 8.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from vlmdet.boxes import BoxFormat
from vlmdet.data.readers.rows import Report, Rows
from vlmdet.data.readers.values import safe_path, side
from vlmdet.errors import DataError
from vlmdet.records import DetectionDataset

SPLITS = ("train", "val", "test")
BOX_FORMAT = BoxFormat("xyxy", "pixel")
LARGEST_XML = 16_000_000
"""Bytes above which an annotation file is refused: a real one has some kilobytes."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")


class _NoDoctype(ElementTree.TreeBuilder):
    """Builds the tree of a document that declares nothing: a DOCTYPE can define entities that grow or read files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse the document; the parser calls this before it expands anything."""
        raise _RefusedError(f"it declares a DOCTYPE '{name}', which is refused")


class _RefusedError(ValueError):
    """An annotation file that is not read; the row is dropped and reported."""


def find_root(path: Path) -> Path | None:
    """Return the folder with Annotations/: `path`, or the only such folder in it; None where there is none.

    Raises:
        DataError: several folders in it are Pascal VOC sets.
    """
    if not path.is_dir():
        return None
    if (path / "Annotations").is_dir():
        return path
    found = sorted(folder for folder in path.iterdir() if (folder / "Annotations").is_dir())
    if len(found) > 1:
        raise DataError(f"{path} holds {len(found)} Pascal VOC sets", f"name one: {', '.join(map(str, found))}")
    return found[0] if found else None


def read_voc(
    path: Path, *, box_format: BoxFormat | None = None, exif: str | None = None, split: str | None = None
) -> DetectionDataset:
    """Read a Pascal VOC set.

    When: once.

    Input: `path`, the folder with Annotations/ or the one above it; `box_format`, None or `xyxy/pixel`, since the files
    name each side; `exif` and `split` as `open_dataset`.
    Output: a `DetectionDataset` with the splits that ImageSets/Main lists; without lists every annotation is in
    `train`. Class names are sorted. Objects marked <difficult> are objects like the others.

    Raises:
        DataError: no Annotations/ or nothing in it, another box format, or no such split.
    """
    root = find_root(path)
    if root is None:
        raise DataError(f"{path} holds no Annotations/ folder", "name the folder of a Pascal VOC set")
    if box_format not in (None, BOX_FORMAT):
        raise DataError(f"Pascal VOC names the sides of its boxes and writes {BOX_FORMAT}", "leave --box-format out")
    lists, notes = _read_lists(root)
    rows = Rows(str(path), split=split, exif=exif)
    rows.notes += notes
    listed: set[tuple[str, str]] = set()
    for name, entries in lists.items():
        rows.add_split(name)
        file = str(root / "ImageSets" / "Main" / f"{name}.txt")
        for line, entry in entries:
            if (name, entry) in listed:  # under an id of its own: the first row of this name stays
                again = f"{entry} (line {line})"
                rows.report(name, file, line, again, "duplicate_row", f"'{entry}' is listed twice", "row_dropped")
                continue
            elsewhere = [other for other in lists if (other, entry) in listed]
            sample_id = f"{name}/{entry}" if elsewhere else entry
            report = rows.reporter(name, file, sample_id)
            if elsewhere:
                report(line, "split_overlap", f"'{entry}' is in {elsewhere[0]} and in {name}", "kept")
            listed.add((name, entry))
            xml = safe_path(root / "Annotations", f"{entry}.xml", root)
            if xml is None:
                report(line, "path_outside", f"'{entry}' is no path inside {root}", "row_dropped")
                continue
            _read_row(rows, root, xml, sample_id, name)
    return rows.finish(stated=BOX_FORMAT, why="defined by Pascal VOC", labels=sorted(rows.labels), is_named=True)


def _read_lists(root: Path) -> tuple[dict[str, list[tuple[int, str]]], list[str]]:
    """Return split -> (line, name) rows, and what is worth noting about the choice."""
    written = sorted(xml.stem for xml in (root / "Annotations").glob("*.xml"))
    main = root / "ImageSets" / "Main"
    found = [name for name in SPLITS if (main / f"{name}.txt").is_file()]
    if "train" not in found and "val" not in found and (main / "trainval.txt").is_file():
        lists = {"train": _read_list(main / "trainval.txt", written)}
        notes = [f"{main / 'trainval.txt'} is read as train, since there is no train.txt"]
        found = [name for name in found if name != "train"]
    elif not found:
        if not written:
            raise DataError(f"{root / 'Annotations'} holds no .xml file", "name the folder of a Pascal VOC set")
        return {"train": list(enumerate(written, start=1))}, [f"{main} lists no split: every annotation is in train"]
    else:
        lists, notes = {}, []
    for name in found:
        lists[name] = _read_list(main / f"{name}.txt", written)
    listed = {entry for rows in lists.values() for _, entry in rows}
    unlisted = [entry for entry in written if entry not in listed]
    if unlisted:
        notes.append(f"{len(unlisted)} annotation files are in no split and are not used, e.g. {unlisted[0]}.xml")
    return lists, notes


def _read_list(path: Path, written: list[str]) -> list[tuple[int, str]]:
    """Read the names of a split; a class list's mark (-1, 0, 1) behind a name is left out."""
    known = set(written)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        entry = line.strip()
        head, _, mark = entry.rpartition(" ")
        if entry not in known and mark in ("-1", "0", "1"):
            entry = head.strip()
        if entry:
            rows.append((number, entry))
    return rows


def _parse_xml(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > LARGEST_XML:
            raise _RefusedError(f"it has over {LARGEST_XML:,} bytes")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _RefusedError("there is no such file") from error
    except OSError as error:
        raise _RefusedError(f"it cannot be read ({error.strerror})") from error
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(data)
        element = parser.close()
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise _RefusedError(f"it is no whole XML document ({error})") from error
    if not isinstance(element, ElementTree.Element):
        raise _RefusedError("it holds no element")
    return element


def _read_row(rows: Rows, root: Path, xml: Path, sample_id: str, split: str) -> None:
    """Add the row of one annotation file, or report why it cannot be used."""
    report = rows.reporter(split, str(xml), sample_id)
    try:
        tree = _parse_xml(xml)
    except _RefusedError as error:
        report(None, "broken_xml", str(error), "row_dropped")
        return
    picture = _find_picture(root, xml, (tree.findtext("filename") or "").strip(), report)
    if picture is None:
        return
    width, height = (side((tree.findtext(f"size/{name}") or "").strip()) for name in ("width", "height"))
    if not (width and height):
        report(None, "size_missing", "no <size>; it is taken from the picture", "kept")
        width = height = 0
    row = rows.add(sample_id, split, str(picture), file=str(xml), width=width, height=height)
    for number, thing in enumerate(tree.iterfind("object"), start=1):
        label = (thing.findtext("name") or "").strip()
        if not label:
            rows.report_row(row, "unknown_category", f"object {number} has no name", "box_dropped", number)
            continue
        sides = [(thing.findtext(f"bndbox/{name}") or "").strip() for name in ("xmin", "ymin", "xmax", "ymax")]
        rows.add_box(row, sides, label, number)


def _find_picture(root: Path, xml: Path, name: str, report: Report) -> Path | None:
    """Return the picture that <filename> names, else the one named like the annotation file; never one outside."""
    folder = root / "JPEGImages"
    if name:
        named = safe_path(folder, name, root)
        if named is None:
            report(None, "path_outside", f"<filename> '{name[:200]}' is no path inside {root}", "row_dropped")
            return None
        if named.is_file():
            if named.stem != xml.stem:
                report(
                    None,
                    "filename_mismatch",
                    f"<filename> '{name[:200]}' is used, though unlike the file's name",
                    "kept",
                )
            return named
    for suffix in _SUFFIXES:
        like = folder / f"{xml.stem}{suffix}"
        if like.is_file():
            report(
                None, "filename_mismatch", f"<filename> '{name[:200]}' is not in {folder}; {like.name} is used", "kept"
            )
            return like
    report(None, "missing_image", f"neither '{name[:200]}' nor a picture '{xml.stem}' is in {folder}", "row_dropped")
    return None
