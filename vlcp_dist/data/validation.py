"""The labels of ImageNet's validation images, which come without class folders: Kaggle's table or a plain list."""

import csv
from collections.abc import Sequence

from vlcp_dist.data.classes import SourceError
from vlcp_dist.data.storage import Location

# Kaggle's table (ImageId,PredictionString), and one wnid a line in the order of the sorted file names.
TABLE = "LOC_val_solution.csv"
LIST = "imagenet_2012_validation_synset_labels.txt"


def images_of_class(folders: Sequence[Location], images: Sequence[str], *, of: object) -> dict[str, list[str]]:
    """wnid -> those of `images` (file names) that show it, from the label file in the first of `folders` to have one.

    Raises:
        SourceError: there is no label file, or it does not go with the images. `of` names the images there.
    """
    ordered = sorted(images)
    path = next((path for folder in folders for name in (TABLE, LIST) if (path := folder / name).is_file()), None)
    if path is None:
        raise SourceError(
            f"{of}: images without class folders, so their labels are needed: put {TABLE} or {LIST} into {folders[0]}"
        )
    wnids = _table(path, ordered) if path.name == TABLE else _list(path, ordered)
    found: dict[str, list[str]] = {}
    for image, wnid in zip(ordered, wnids, strict=True):
        found.setdefault(wnid, []).append(image)
    return found


def _table(path: Location, images: Sequence[str]) -> list[str]:
    """`ILSVRC2012_val_00000001,n01751748 111 108 230 366`: the wnid comes before each box."""
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    wnid = {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].split()}
    stems = [image.rpartition("/")[2].rpartition(".")[0] for image in images]
    if missing := [image for image, stem in zip(images, stems, strict=True) if stem not in wnid]:
        raise SourceError(
            f"{path}: no label for {len(missing)} of {len(images)} images (the first is {missing[0]}); "
            f"fetch the file again, or remove the images"
        )
    return [wnid[stem] for stem in stems]


def _list(path: Location, images: Sequence[str]) -> list[str]:
    wnids = path.read_text(encoding="utf-8").split()
    if len(wnids) != len(images):
        raise SourceError(
            f"{path}: {len(wnids)} labels for {len(images)} images, and only their order tells which is whose; "
            f"use the whole validation set, or {TABLE}, which has names"
        )
    return wnids
