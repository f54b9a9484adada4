"""Time and memory of reading a drawn COCO file, against pycocotools; prints one JSON line.

    python benchmarks/readers.py                    # 100,000 pictures, about 700,000 boxes, 5 rounds
    python benchmarks/readers.py --pictures 2000    # a trial

Both open the file and then walk over every picture and take the boxes and classes of it: `open_dataset` and its samples
here, `COCO(file)`, `getAnnIds` and `loadAnns` there. They take turns in one process; `ratio` is pycocotools' time over
ours, of the least and of the median. Memory is `ru_maxrss` of a fresh process for each, imports included; a process
inherits that figure from the one that starts it, so these run first, while this one is small. No picture exists:
annotations can be read without.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def draw(file: Path, pictures: int, *, boxes: float = 7.0, seed: int = 0) -> int:
    """Write a COCO file with a Poisson number of boxes a picture, each with a polygon of its four corners."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(boxes, pictures)
    images = [
        {"id": i + 1, "file_name": f"{i + 1:012}.jpg", "width": 640, "height": 480, "license": 1}
        for i in range(pictures)
    ]
    annotations = []
    for i, count in enumerate(counts.tolist()):
        for x, y, width, height in rng.uniform((0, 0, 10, 10), (500, 360, 140, 120), (count, 4)).round(2).tolist():
            right, low = round(x + width, 2), round(y + height, 2)
            annotations.append(
                {
                    "segmentation": [[x, y, right, y, right, low, x, low]],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "image_id": i + 1,
                    "bbox": [x, y, width, height],
                    "category_id": int(rng.integers(1, 91)),
                    "id": len(annotations) + 1,
                }
            )
    categories = [{"id": number, "name": f"class {number}", "supercategory": "thing"} for number in range(1, 91)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return len(annotations)


def ours(file: Path) -> int:
    """Open and walk with vlmdet; returns the number of boxes."""
    from vlmdet.data.readers import open_dataset

    total = 0
    for sample in open_dataset(file, format="coco").splits["train"]:
        total += len(sample.boxes.xyxy)
        assert len(sample.labels) == len(sample.boxes)
    return total


def theirs(file: Path) -> int:
    """Open and walk with pycocotools; returns the number of boxes."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(sys.stderr):
        coco = COCO(str(file))
    total = 0
    for picture in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=picture))
        boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        labels = [coco.cats[annotation["category_id"]]["name"] for annotation in annotations]
        total += len(boxes)
        assert len(labels) == len(boxes)
    return total


def alone(what: str, file: Path, pictures: int) -> int:
    """Run one part in a process of its own; returns the number that it prints last."""
    command = [sys.executable, __file__, "--only", what, "--file", str(file), "--pictures", str(pictures)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


READERS = {"vlmdet": ours, "pycocotools": theirs}


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("draw", *READERS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "draw":
        print(draw(args.file, args.pictures))
        return
    if args.only:
        READERS[args.only](args.file)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "instances_train.json"
        count = alone("draw", file, args.pictures)
        megabytes = {name: round(alone(name, file, args.pictures) / 1024, 1) for name in READERS}
        seconds: dict[str, list[float]] = {name: [] for name in READERS}
        for _ in range(args.rounds):
            for name, read in READERS.items():
                started = time.perf_counter()
                assert read(file) == count
                seconds[name].append(time.perf_counter() - started)
                gc.collect()
        size = file.stat().st_size
    least = {name: min(values) for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "benchmark": "readers",
        "peer": "pycocotools",
        "pictures": args.pictures,
        "boxes": count,
        "file_mb": round(size / 1e6, 1),
        "rounds": args.rounds,
        "seconds_min": {name: round(value, 2) for name, value in least.items()},
        "seconds_median": {name: round(value, 2) for name, value in median.items()},
        "ratio_min": round(least["pycocotools"] / least["vlmdet"], 2),
        "ratio_median": round(median["pycocotools"] / median["vlmdet"], 2),
        "peak_mb": megabytes,
        "memory_share": round(megabytes["vlmdet"] / megabytes["pycocotools"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
