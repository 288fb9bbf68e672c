"""Class packs: all latents of a class as one memory-mappable array, and their keys, copied from the shards."""

import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlcp_dist.data import shards, storage
from vlcp_dist.data.shards import ShardError
from vlcp_dist.data.storage import Location
from vlcp_dist.data.threads import concurrently

# Not the folder of the stage itself: there a class called "plan" or "inputs" would meet files of that name.
FOLDER = "classes"


class ClassPack(NamedTuple):
    """`latents` is fp16 (len(keys), c, h, w), a read-only memory map; `keys` names its rows, in the index's order."""

    keys: list[str]
    latents: np.ndarray


def build(class_id: str, keys: Sequence[str], tars: Sequence[Location]) -> dict[str, bytes]:
    """The files of a pack, by path inside the stage folder. Every tar is read once from its front to its end.

    Args:
        keys: the samples of the pack. The tars must hold all of them, in this order; other samples are passed over.

    Raises:
        ShardError: a key is missing, comes twice or in another place, or its latent is no fp16 array of the
            first one's shape.
    """
    wanted = set(keys)
    found: list[str] = []
    parts: list[memoryview] = []
    shape: tuple[int, ...] | None = None
    concurrently(storage.local, tars, threads=4)  # of an object store, all at once: the loop then finds them here
    for tar in tars:
        for key, members in shards.read(tar, keys=wanted):
            latent = shards.parse_npy(members["npy"])
            shape = shape or latent.shape
            if latent.dtype != np.float16 or latent.shape != shape:
                raise ShardError(
                    f"{tar}: the latent of {key} is {latent.dtype} {latent.shape}, not float16 {shape}: "
                    f"delete {tar} and run again"
                )
            found.append(key)
            parts.append(latent.data.cast("B"))
    if found != list(keys):
        wrong = next((key for key in keys if key not in set(found)), "the order of its samples")
        places = ", ".join(map(str, tars))
        raise ShardError(f"class {class_id}: {places} do not hold {wrong} as the index says: delete them and run again")
    header = io.BytesIO()
    facts = {"descr": "<f2", "fortran_order": False, "shape": (len(found), *(shape or ()))}
    np.lib.format.write_array_header_1_0(header, facts)
    table = {"class_id": class_id, "keys": found}
    return {
        f"{FOLDER}/{class_id}.npy": b"".join([header.getvalue(), *parts]),
        f"{FOLDER}/{class_id}.json": (json.dumps(table, indent=1) + "\n").encode(),
    }


def load(folder: Location, class_id: str) -> ClassPack:
    """The pack of a class; of an object store, through the node's copy of it.

    Raises:
        FileNotFoundError: there is none.
        ShardError: array and keys do not go together.
    """
    path = folder / FOLDER / f"{class_id}.npy"
    keys = json.loads(storage.fetch([path.with_suffix(".json")])[0])["keys"]
    latents = np.load(storage.local(path), mmap_mode="r", allow_pickle=False)
    if latents.dtype != np.float16 or len(latents) != len(keys):
        raise ShardError(
            f"{path} holds {latents.dtype} {latents.shape}, but there are {len(keys)} keys: delete it and run again"
        )
    return ClassPack(keys, latents)
