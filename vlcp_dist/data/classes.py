"""Class ids, the human names that prompts use, and the public ImageNet subsets. Keyed by id throughout."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlcp_dist.data.storage import Location, locate
from vlcp_dist.errors import InputError

# Where a listing is looked for beside the images; the first one found is used.
LISTINGS = ("classes.txt", "LOC_synset_mapping.txt")

# fmt: off
SUBSETS: dict[str, tuple[str, ...]] = {
    "imagenette": (
        "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
        "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
    ),
    "imagewoof": (
        "n02086240", "n02087394", "n02088364", "n02089973", "n02093754",
        "n02096294", "n02099601", "n02105641", "n02111889", "n02115641",
    ),
    "imageidc": (
        "n02869837", "n01749939", "n02488291", "n02107142", "n13037406",
        "n02091831", "n04517823", "n04589890", "n03062245", "n01773797",
    ),
    "imagenet100": (
        "n01558993", "n01692333", "n01729322", "n01735189", "n01749939", "n01773797", "n01820546",
        "n01855672", "n01978455", "n01980166", "n01983481", "n02009229", "n02018207", "n02085620",
        "n02086240", "n02086910", "n02087046", "n02089867", "n02089973", "n02090622", "n02091831",
        "n02093428", "n02099849", "n02100583", "n02104029", "n02105505", "n02106550", "n02107142",
        "n02108089", "n02109047", "n02113799", "n02113978", "n02114855", "n02116738", "n02119022",
        "n02123045", "n02138441", "n02172182", "n02231487", "n02259212", "n02326432", "n02396427",
        "n02483362", "n02488291", "n02701002", "n02788148", "n02804414", "n02859443", "n02869837",
        "n02877765", "n02974003", "n03017168", "n03032252", "n03062245", "n03085013", "n03259280",
        "n03379051", "n03424325", "n03492542", "n03494278", "n03530642", "n03584829", "n03594734",
        "n03637318", "n03642806", "n03764736", "n03775546", "n03777754", "n03785016", "n03787032",
        "n03794056", "n03837869", "n03891251", "n03903868", "n03930630", "n03947888", "n04026417",
        "n04067472", "n04099969", "n04111531", "n04127249", "n04136333", "n04229816", "n04238763",
        "n04336792", "n04418357", "n04429376", "n04435653", "n04485082", "n04493381", "n04517823",
        "n04589890", "n04592741", "n07714571", "n07715103", "n07753275", "n07831146", "n07836838",
        "n13037406", "n13040303",
    ),
}
# fmt: on

_WNID = re.compile(r"n\d{8}")
_SAFE = re.compile(r"[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*")


class SourceError(InputError):
    """The data cannot be used as it is. The message names the place and the way out."""


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """A class: `id` is its wnid or folder name (files and keys), `name` what prompts call it."""

    id: str
    name: str


def load_classes(ids: Sequence[str], *, listing: str | Location | Mapping[str, str] | None) -> list[ClassInfo]:
    """The classes `ids`, sorted by id, with their names.

    Names come from `listing`: a file that `read_listing` understands, or a mapping of id to name. Without
    one, a name is the id with underscores and hyphens as spaces. Raises `SourceError` for ids that the
    listing lacks, for wnids without a listing ("the n02091831 in the image" is no prompt), and for ids that
    are no file names: every class has files named by its id.
    """
    if unsafe := [id for id in ids if not _SAFE.fullmatch(id) or len(id.encode(errors="replace")) > 200]:
        raise SourceError(
            f"class ids name files, and {_some([repr(id) for id in unsafe])} cannot: an id is at most 200 bytes, does "
            f"not begin with a dot and holds no slash and no control characters; rename the folder or mend the listing"
        )
    if listing is None:
        if unnamed := [id for id in ids if _WNID.fullmatch(id)]:
            raise SourceError(
                f"no names for {_some(unnamed)}: put ImageNet's LOC_synset_mapping.txt or a classes.txt "
                f"(id<TAB>name a line) beside the images, or set class_names"
            )
        names: Mapping[str, str] = {id: re.sub(r"[_-]+", " ", id).strip() or id for id in ids}
    elif isinstance(listing, Mapping):
        names = listing
    else:
        names = {info.id: info.name for info in read_listing(listing, ids=ids)}
    if missing := sorted(set(ids) - set(names)):
        where = "the class_names given" if isinstance(listing, Mapping) else f"{listing}"
        raise SourceError(
            f"{where}: {len(set(ids)) - len(missing)} of {len(set(ids))} classes of the data are listed; "
            f"missing {_some(missing)}. Add them, or select classes that are listed"
        )
    return [ClassInfo(id, names[id]) for id in sorted(set(ids))]


def find_listing(folder: Location) -> Location | None:
    """The class listing that lies in `folder` (see `LISTINGS`), or None."""
    return next((folder / name for name in LISTINGS if (folder / name).is_file()), None)


def read_listing(path: str | Location, *, ids: Iterable[str] = ()) -> list[ClassInfo]:
    """The classes of a listing file, in the order of its lines.

    Three forms, told apart by the whole file: `id<TAB>name`; `id name` (ImageNet's LOC_synset_mapping.txt, or
    where the first words are among `ids`, the ids in use); else one name a line, whose id is `id_of(name)`.
    Two ids may share a name, as ImageNet's two cranes do. Raises `SourceError` for an id listed twice, an
    empty file, an empty line before the end (it would shift the numbers of those after it) and a line without
    a tab among lines with one.
    """
    try:
        text = (locate(path) if isinstance(path, str) else path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if not text.strip():
        raise SourceError(f"{path}: the class listing is empty")
    if "" in lines:
        raise SourceError(f"{path}: line {lines.index('') + 1} is empty; remove it")

    if any("\t" in line for line in lines):
        pairs = [line.partition("\t")[::2] for line in lines]
    elif _is_id_and_name(lines, set(ids)):
        pairs = [line.partition(" ")[::2] for line in lines]
    else:
        pairs = [(id_of(line), line) for line in lines]

    infos = [ClassInfo(id.strip(), name.strip()) for id, name in pairs]
    for number, info in enumerate(infos, 1):
        if not info.id or not info.name:
            raise SourceError(f"{path}: line {number} has no name after its id: {lines[number - 1]!r}")
    if repeated := _repeated(info.id for info in infos):
        raise SourceError(f"{path}: listed more than once: {_some(repeated)}; keep one line for each class")
    return infos


def ids_of_labels(labels: Mapping[str, str], *, listing: str | Location | Mapping[str, str] | None) -> dict[str, str]:
    """The class id of every label, where a data set labels by id, by name, or by number.

    `labels` maps each label to the place where it was first seen, for errors. A number that is no id is a
    line of the listing file, counted from 0. Without a listing a label is a name, and its id `id_of(label)`.
    Raises `SourceError` for a label that cannot be told, or two that make the same id.
    """
    if listing is None:
        ids = {label: id_of(label) for label in labels}
        by_id: dict[str, str] = {}
        for label, place in labels.items():
            if label.isdecimal():
                raise SourceError(
                    f"{place}: the label {label} is a number and no list says of what: put a classes.txt "
                    f"(one name a line, in the order of the numbers from 0) beside the tars"
                )
            other = by_id.setdefault(ids[label], label)
            if not ids[label] or other != label:
                raise SourceError(
                    f"{place}: no class id can be made of label {label!r}, or {other!r} makes the same; "
                    f"put a classes.txt (id<TAB>name a line) beside the tars"
                )
        return ids

    if isinstance(listing, Mapping):
        where = "the class_names given"
        infos = [ClassInfo(id, name) for id, name in listing.items()]
        lines = []  # a mapping has no order to count by
    else:
        where = f"{listing}"
        infos = lines = read_listing(listing, ids=labels)
    known = {info.id for info in infos}
    uses = Counter(info.name for info in infos)
    by_name = {info.name: info.id for info in infos if uses[info.name] == 1}
    ids = {}
    for label, place in labels.items():
        if label in known:
            ids[label] = label
        elif label in by_name:
            ids[label] = by_name[label]
        elif label.isdecimal() and int(label) < len(lines):
            ids[label] = lines[int(label)].id
        else:
            raise SourceError(
                f"{place}: the label {label!r} is no id and no unique name in {where}, nor the number of one "
                f"of its {len(lines)} lines (from 0); correct the list or the label"
            )
    return ids


def select_ids(ids: Iterable[str], wanted: Sequence[str] | str | None) -> list[str]:
    """Those of `ids` that are `wanted`: a list of ids, the name of one of `SUBSETS`, or None for all; sorted.

    Raises `SourceError` for an unknown subset, for an empty or repeating list, and for missing ids.
    """
    have = set(ids)
    if wanted is None:
        return sorted(have)
    what = "the classes asked for"
    if isinstance(wanted, str):
        if wanted not in SUBSETS:
            near = difflib.get_close_matches(wanted, SUBSETS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SourceError(
                f"unknown class subset {wanted!r}{hint}: use one of {', '.join(SUBSETS)}, or a list of ids"
            )
        what, wanted = f"subset {wanted}", SUBSETS[wanted]
    if not wanted:
        raise SourceError("an empty list of classes; leave it out to take all")
    if repeated := _repeated(wanted):
        raise SourceError(f"{what}: asked for more than once: {_some(repeated)}")
    if missing := [id for id in wanted if id not in have]:
        raise SourceError(
            f"{what}: found {len(wanted) - len(missing)} of {len(wanted)}; the data has no {_some(missing)} "
            f"(its {len(have)} classes: {_some(sorted(have))})"
        )
    return sorted(wanted)


def id_of(name: str) -> str:
    """A class id made of a human name: letters, digits, `_` and `-` stay, all else becomes `_`."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")


def _is_id_and_name(lines: list[str], ids: set[str]) -> bool:
    firsts = [line.partition(" ")[0] for line in lines]
    if all(_WNID.fullmatch(first) for first in firsts):
        return True
    return all(" " in line for line in lines) and not ids.isdisjoint(firsts)


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _some(values: Sequence[str], most: int = 8) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
