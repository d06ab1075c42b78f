"""iNaturalist: labels of any rank, numbered as in DeiT."""

import json

import pytest
from PIL import Image

from data.formats.inat import CATEGORIES
from data.registry import create_dataset
from utils.config_rules import CHOICES

# Rank by rank: kingdom, phylum, class, order, supercategory, family, genus, name.
SPECIES = [
    ("Plantae", "Tracheophyta", "Liliopsida", "Asparagales", "Plants", "Orchidaceae", "Ophrys", "O. apifera"),
    ("Animalia", "Chordata", "Aves", "Passeriformes", "Birds", "Corvidae", "Corvus", "C. corax"),
    ("Animalia", "Chordata", "Aves", "Passeriformes", "Birds", "Corvidae", "Pica", "P. pica"),
    ("Animalia", "Arthropoda", "Insecta", "Diptera", "Insects", "Syrphidae", "Eristalis", "E. tenax"),
]  # fmt: skip
# Category ids of the training images, in the order of the annotations, and of the validation images.
TRAIN, VAL = [2, 0, 3, 1, 2, 0], [1, 3, 0]
# Labels of VAL by rank, worked out by hand: numbered as TRAIN first shows them.
EXPECTED = {
    "kingdom": (["Animalia", "Plantae"], [0, 0, 1]),
    "phylum": (["Chordata", "Tracheophyta", "Arthropoda"], [0, 2, 1]),
    "class": (["Aves", "Liliopsida", "Insecta"], [0, 2, 1]),
    "order": (["Passeriformes", "Asparagales", "Diptera"], [0, 2, 1]),
    "supercategory": (["Birds", "Plants", "Insects"], [0, 2, 1]),
    "family": (["Corvidae", "Orchidaceae", "Syrphidae"], [0, 2, 1]),
    "genus": (["Pica", "Ophrys", "Eristalis", "Corvus"], [3, 2, 1]),
    "name": (["P. pica", "O. apifera", "E. tenax", "C. corax"], [3, 2, 1]),
}


def annotations(species, year, first):
    images = [
        dict(id=100 + i, file_name=f"train_val{year}/{SPECIES[c][4]}/{c}/{first + i}.jpg")
        for i, c in enumerate(species)
    ]
    marks = [dict(image_id=100 + i, category_id=c) for i, c in enumerate(species)]
    return dict(images=images[::-1], annotations=marks)


def write(root, year=2018, with_supercategory=True):
    for split, species, first in (("train", TRAIN, 0), ("val", VAL, 50)):
        content = annotations(species, year, first)
        (root / f"{split}{year}.json").write_text(json.dumps(content))
        for image in content["images"]:
            folder, group, *rest = image["file_name"].split("/")
            path = root.joinpath(folder, *[group] * with_supercategory, *rest)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(path)
    ranks = [dict(zip(CATEGORIES, names, strict=True), id=i) for i, names in enumerate(SPECIES)]
    (root / "categories.json").write_text(json.dumps(ranks))


def labels(dataset):
    return [dataset[i][1] for i in range(len(dataset))]


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("name", ["inat2018", "INAT19"])
def test_labels_are_those_of_each_rank(tmp_path, category, name):
    write(tmp_path, 2018 if name == "inat2018" else 2019)
    val = create_dataset(name, str(tmp_path), "val", category=category)
    assert (val.classes, labels(val)) == EXPECTED[category]
    train = create_dataset(name, str(tmp_path), "train", category=category)
    assert train.classes == val.classes
    assert [train.classes[label] for label in labels(train)] == [
        SPECIES[species][CATEGORIES.index(category)] for species in TRAIN
    ]
    assert val.describe(0).endswith("/Birds/1/50.jpg")


def test_the_config_knows_every_rank():
    assert CHOICES["DATA.INAT.CATEGORY"] == CATEGORIES


def test_images_may_lie_as_deit_reads_them(tmp_path):
    write(tmp_path, with_supercategory=False)
    val = create_dataset("inat2018", str(tmp_path), "val")
    assert labels(val) == EXPECTED["name"][1]
    assert val.describe(0) == str(tmp_path / "train_val2018" / "1" / "50.jpg")


def test_ranks_come_from_the_annotations_where_there_is_no_table(tmp_path):
    write(tmp_path)
    content = json.loads((tmp_path / "train2018.json").read_text())
    table = json.loads((tmp_path / "categories.json").read_text())
    (tmp_path / "categories.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"categories.json does not exist"):
        create_dataset("inat2018", str(tmp_path), "val")
    for entry in table:
        del entry["supercategory"]  # as in 2019
    (tmp_path / "train2018.json").write_text(json.dumps(content | {"categories": table[::-1]}))
    val = create_dataset("inat2018", str(tmp_path), "val", category="genus")
    assert (val.classes, labels(val)) == EXPECTED["genus"]
    with pytest.raises(ValueError, match=r"CATEGORY='supercategory' is not in .*'kingdom'.*'name'"):
        create_dataset("inat2018", str(tmp_path), "val", category="supercategory")


def test_what_is_wrong_is_named(tmp_path):
    def build():
        return create_dataset("inat2018", str(tmp_path), "val")

    with pytest.raises(FileNotFoundError, match=r"train2018.json does not exist.*categories.json"):
        build()
    write(tmp_path)
    path = tmp_path / "val2018.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"annotations": [dict(image_id=100, category_id=9)]}, "category_id 9 is not one of the 4"),
        ({"annotations": [dict(image_id=7, category_id=0)]}, "names image 7, which 'images' lacks"),
        ({"annotations": []}, "has no annotation"),
        ({"images": [dict(id=1)]}, "must hold 'images' with id and file_name"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            build()
    (tmp_path / "categories.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"categories.json must list categories with their ranks"):
        build()
    write(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"val2018.json is damaged"):
        build()
    path.write_text(json.dumps(good))
    train = json.loads((tmp_path / "train2018.json").read_text())
    train["annotations"] = [mark for mark in train["annotations"] if mark["category_id"] != 3]
    (tmp_path / "train2018.json").write_text(json.dumps(train))
    with pytest.raises(ValueError, match=r"no training image is of 'E. tenax' \(category_id 3\)"):
        build()
