"""Links in a model's folder: followed inside the folder and into the hub cache's own files, and nowhere else.

In the hub's cache a model is a folder of links, `models--OWNER--NAME/snapshots/REVISION/config.json` to
`../../blobs/HASH`. Any other link that leaves the folder would carry somebody's file along with the model.
"""

from __future__ import annotations

import os
from pathlib import Path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, below `folder`, is somewhere else in truth."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return not any(real.is_relative_to(place) for place in (root, *_blobs(root)))


def _blobs(root: Path) -> tuple[Path, ...]:
    """Where a snapshot of the hub's cache keeps its files; of a part of one as well."""
    return tuple(above.parent / "blobs" for above in root.parents if above.name == "snapshots")[:1]
