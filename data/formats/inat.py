"""iNaturalist 2018 and 2019, labelled by species or by any coarser rank."""

import json
from pathlib import Path
from typing import Any

from data.listing import ListedImages, Listing, once_per_file
from data.registry import ImageDataset, missing, register_dataset

CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@register_dataset("inat2018", "inat", train_size=437_513, node="INAT")
def inat2018(root: str, split: str, *, category: str = "name") -> ImageDataset:
    """`train2018.json`, `val2018.json`, `categories.json` and the images that they name; see `inat`."""
    return inat(Path(root), split, 2018, category)


@register_dataset("inat2019", "inat19", train_size=265_213, node="INAT")
def inat2019(root: str, split: str, *, category: str = "name") -> ImageDataset:
    """`train2019.json`, `val2019.json`, `categories.json` and the images that they name; see `inat`."""
    return inat(Path(root), split, 2019, category)


def inat(root: Path, split: str, year: int, category: str) -> ImageDataset:
    """Images of one year; classes are the values of `category`, numbered as in DeiT.

    That is in the order in which the training annotations name them, so weights of the lineage fit; the
    training annotations are needed for evaluation too. Images lie as they are published
    (`train_val2018/Plantae/7477/x.jpg`), or without the super-category, as DeiT reads them.

    Args:
        category: kingdom, phylum, class, order, supercategory (not in 2019), family, genus, or name
            (the species).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an annotation names no category or no image, or the category has no such key.
    """
    files = [root / f"train{year}.json", root / f"{split}{year}.json"]
    for path in files:
        if not path.is_file():
            missing(path, f"train{year}.json, val{year}.json, categories.json and train_val{year}/")
    ranks = _ranks(root, files[0], category)
    labels: dict[str, int] = {}
    for species in _read(files[0])[1]:
        labels.setdefault(_rank(ranks, species, files[0]), len(labels))
    names, species = _read(files[1])
    listing = Listing(names, [_label(labels, ranks, s, files[1]) for s in species], str(files[1]))
    if not (root / names[0]).is_file():
        shorter = [_without_supercategory(name) for name in names]
        if (root / shorter[0]).is_file():
            listing = Listing(shorter, listing.labels, str(files[1]))
    return ListedImages(root, listing, list(labels))


@once_per_file
def _read(path: Path) -> tuple[list[str], list[int]]:
    """File names and category ids of the images, in the order of the annotations."""
    content = _json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        marks = [(mark["image_id"], int(mark["category_id"])) for mark in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold 'images' with id and file_name, and 'annotations' with image_id and "
            f"category_id: {error!r}"
        ) from error
    absent = next((image for image, _ in marks if image not in names), None)
    if absent is not None:
        raise ValueError(f"{path}: an annotation names image {absent!r}, which 'images' lacks")
    if not marks:
        raise ValueError(f"{path} has no annotation")
    return [names[image] for image, _ in marks], [category for _, category in marks]


def _ranks(root: Path, train: Path, category: str) -> dict[int, str]:
    """Value of `category` by category id, from categories.json or the training file's own table."""
    path = root / "categories.json"
    table = _table(path if path.is_file() else train, category)
    return table or missing(path, "categories.json with the ranks of every category")


@once_per_file
def _table(path: Path, category: str) -> dict[int, str]:
    content = _json(path)
    entries = content.get("categories", []) if isinstance(content, dict) else content
    try:
        return {
            int(entry.get("id", position)): str(entry[category])
            for position, entry in enumerate(entries)
        }
    except KeyError as error:
        found = [name for name in CATEGORIES if name in entries[0]]
        raise ValueError(
            f"DATA.INAT.CATEGORY='{category}' is not in every category of {path}, which has {found}"
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} must list categories with their ranks: {error}") from error


def _rank(ranks: dict[int, str], species: int, source: Path) -> str:
    if species not in ranks:
        raise ValueError(
            f"{source}: category_id {species} is not one of the {len(ranks)} categories"
        )
    return ranks[species]


def _label(labels: dict[str, int], ranks: dict[int, str], species: int, source: Path) -> int:
    rank = _rank(ranks, species, source)
    if rank not in labels:
        raise ValueError(f"{source}: no training image is of '{rank}' (category_id {species})")
    return labels[rank]


def _without_supercategory(name: str) -> str:
    folder, *middle, species, file = name.split("/")
    return "/".join([folder, species, file]) if middle else name


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
