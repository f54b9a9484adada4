"""Pictures for findings: boxes drawn on a user's own picture, as a `data:` address for the page.

When: by checks whose evidence is best seen. No torch.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE = 480
COLOURS = ("#1b9e77", "#d95f02", "#7570b3")


def drawn(image: Image.Image, groups: Sequence[tuple[str, np.ndarray]]) -> str:
    """Draw groups of boxes, each in a colour of its own with its name, and return the picture as a JPEG `data:` address.

    Input: `groups`, (name, boxes (n, 4) as fractions x1, y1, x2, y2); boxes may lie outside.
    """
    picture = image.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    for (name, boxes), colour in zip(groups, COLOURS, strict=False):
        for box in np.nan_to_num(boxes)[:30]:
            x1, y1, x2, y2 = (float(one) for one in box * np.tile(picture.size, 2))
            corners = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
            draw.rectangle([min(max(one, -5), 5 + SIDE) for one in corners], outline=colour, width=3)
            draw.text((max(corners[0], 2) + 3, max(corners[1], 2) + 2), name, fill=colour)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
