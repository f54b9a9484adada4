"""Write COCO detection JSON, one file a split, beside the pictures.

When: ONCE, by `write_dataset(…, to="coco")`.

    annotations/instances_train.json      images/000001.jpg

Boxes are x, y, width, height in pixels with two decimals, as in COCO's own files. Ids of pictures and annotations count
from 1, those of categories too, in the order of the class names. A picture's own id stands in the extra field `name`;
readers that do not know it pass over it. Source: cocodataset.org, "Data format".
"""

from __future__ import annotations

import json
from typing import Any

from vlmdet.data.writers.files import Writing

ROUNDING = "boxes within .005 pixel (two decimals)"
_DECIMALS = 2


def write(writing: Writing) -> None:
    """Write every split."""
    categories = {label: number for number, label in enumerate(writing.dataset.labels, start=1)}
    (writing.root / "annotations").mkdir()
    for split in writing.dataset.splits:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for row in writing.rows(split, "images"):
            sample = row.sample
            image = {"id": len(images) + 1, "file_name": row.file.removeprefix("images/")}
            image |= {"width": row.width, "height": row.height, "name": sample.id}
            images.append(image | ({"group": sample.group} if sample.group else {}))
            for label, (x1, y1, x2, y2) in zip(sample.labels, writing.corners(row, _DECIMALS).tolist(), strict=True):
                width, height = round(x2 - x1, _DECIMALS), round(y2 - y1, _DECIMALS)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": categories[label],
                        "bbox": [x1, y1, width, height],
                        "area": round(width * height, 2 * _DECIMALS),
                        "iscrowd": 0,
                    }
                )
        document = {
            "info": {"description": writing.dataset.source},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": label} for label, number in categories.items()],
        }
        path = writing.root / "annotations" / f"instances_{writing.split_file(split)}.json"
        path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
