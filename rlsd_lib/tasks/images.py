"""Images of raw rows: found, read, checked, and scaled to the limits of the released code."""

import io
import math
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from rlsd_lib.tasks.task import Row


def images_of(row: Row, folder: str) -> list[dict[str, Any]]:
    """Return a raw row's images as {"bytes", "path"} with resolved paths; both None if missing."""
    images = row["images"] if isinstance(row["images"], list) else [row["images"]]
    found = [image or {"bytes": None, "path": None} for image in images if row["images"]]
    return [
        {**image, "path": image["path"] and str(Path(folder, image["path"]))} for image in found
    ]


def read_bytes(image: dict[str, Any]) -> bytes | None:
    """Return an image's bytes, from its file where it has none of its own; None without either."""
    path = Path(image["path"] or "")
    return image["bytes"] or (path.read_bytes() if path.is_file() else None)


def shape_of(data: bytes) -> tuple[int, int] | None:
    """Decode an image to its end; None where Pillow cannot, or refuses it as far too large."""
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            image.load()
            return image.size
    except Exception:  # a decoder may raise anything on bytes that are not its own
        return None


def stored(image: dict[str, Any], min_area: int, max_area: int) -> dict[str, Any]:
    """Return an image within the limits and in RGB; one that was so already is left as it is."""
    # Once and for all: a transform on reading would decode all images at a look at any column.
    with PillowImage.open(io.BytesIO(read_bytes(image))) as given:
        fitted = fit(given, min_area, max_area)
        if (given.size, given.mode) == (fitted.size, "RGB"):
            return image
    out = io.BytesIO()
    fitted.save(out, "PNG", compress_level=1)  # lossless at any level, and this one is fast
    return {"bytes": out.getvalue(), "path": None}


def fit(image: PillowImage.Image, min_area: int, max_area: int) -> PillowImage.Image:
    """Scale to an area within the limits, sides rounded down, and RGB, as the released code does."""
    area = image.width * image.height
    limit = min(max(area, min_area), max_area)
    factor = math.sqrt(limit / area)
    size = (max(int(image.width * factor), 1), max(int(image.height * factor), 1))
    return (image if limit == area else image.resize(size)).convert("RGB")
