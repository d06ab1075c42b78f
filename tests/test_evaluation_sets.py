"""Evaluation sets: which folder is which class, and what `main.py --eval` makes of TEST."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import main as program
from config import load_config
from data import build_evaluation_sets
from data.evaluation_sets import (
    LabelledFolders,
    NumberedImages,
    SelectedImages,
    folder_labels,
    open_set,
    parse_entry,
)
from data.formats.imagenet import FolderImages
from data.loader import UnreadableImageError
from models import CONFIG_DIR
from tasks.classification import ClassificationTask
from tests.processes import free_port, run_on_two_processes

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def write_images(root, folders, count=2, side=32):
    for place, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = (20 * place % 256, 100 * number % 256, 60)
            Image.new("RGB", (side, side), colour).save(root / folder / f"{number}.png")
    return root


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
    return root


# -- which folder is which class ---------------------------------------------------------------------


def test_folders_of_imagenet_v2_are_named_by_label(tmp_path):
    """Sorted as text they would be 0, 1, 10, 100, 101, ...: another label each."""
    root = folders(tmp_path, [str(label) for label in range(1000)])
    labels = folder_labels(root, SYNSETS)
    assert labels == {str(label): label for label in range(1000)}


def test_synsets_of_a_subset_find_their_place_among_the_thousand(tmp_path):
    """ImageNet-A and -R have 200 folders; their n-th is not class n."""
    chosen = [6, 107, 999]
    root = folders(tmp_path, [SYNSETS[label] for label in chosen])
    numbers = [str(label) for label in range(1000)]  # a model whose own class names are no synsets
    for classes in (SYNSETS, numbers):
        assert sorted(folder_labels(root, classes).values()) == chosen


def test_the_names_of_the_training_classes_come_first(tmp_path):
    """Digits are named 0 ... 9; so may be the classes of other data, in another order."""
    root = folders(tmp_path, ["1", "2"])
    assert folder_labels(root, ["2", "1", "0"]) == {"1": 1, "2": 0}


def test_a_folder_that_is_no_class_is_named(tmp_path):
    root = folders(tmp_path, ["ant", "bea"])
    with pytest.raises(ValueError, match=r"1 are no class of the model, such as \['bea'\] .*'bee'"):
        folder_labels(root, ["ant", "bee", "cat"])


def test_a_set_knows_which_classes_occur(tmp_path):
    root = write_images(tmp_path / "a", ["cat", "ant"])
    found = open_set(f"imagenet_a={root}", ["ant", "bee", "cat"], None)
    assert found.subset == [0, 2]
    dataset = found.parts[""]
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 2, 2]
    assert dataset.describe(2).endswith("cat/0.png")
    assert dataset.classes == ["ant", "bee", "cat"]
    whole = open_set(
        f"sketch={write_images(tmp_path / 'b', ['ant', 'bee', 'cat'])}", dataset.classes, None
    )
    assert whole.subset is None


@pytest.mark.parametrize("group", ["", "blur/"])
def test_corruptions_are_scored_one_by_one(tmp_path, group):
    for severity in (1, 5):
        write_images(tmp_path / f"{group}fog" / str(severity), ["ant", "cat"])
    write_images(tmp_path / f"{group}snow" / "2", ["ant"])
    found = open_set(f"imagenet_c={tmp_path}", ["ant", "bee", "cat"], None)
    assert list(found.parts) == ["fog/1", "fog/5", "snow/2"]
    assert found.subset == [0, 2]
    assert [len(part) for part in found.parts.values()] == [4, 4, 2]
    with pytest.raises(FileNotFoundError, match="<corruption>/<severity"):
        open_set(f"imagenet_c={tmp_path / group / 'fog' / '1'}", ["ant", "cat"], None)


def validation_images(root):
    """Two classes, whose files carry the numbers 4, 2 and 1, 3 of ImageNet's validation images."""
    for folder, numbers in (("ant", (4, 2)), ("bee", (1, 3))):
        (root / "val" / folder).mkdir(parents=True)
        for number in numbers:
            path = root / "val" / folder / f"ILSVRC2012_val_{number:08d}.JPEG"
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
    return FolderImages(root, "val")


def test_real_labels_belong_to_the_number_of_the_file(tmp_path):
    """Images without a label are left out; the n-th list is that of the n-th number, not of the n-th file."""
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps([[1], [0, 1], [], [0]]))
    found = open_set(f"imagenet_real={labels}", ["ant", "bee"], validation_images(tmp_path))
    dataset = found.parts[""]
    numbers = [dataset.describe(index)[-6] for index in range(len(dataset))]
    assert numbers == ["2", "4", "1"], "in the order of the folders, without number 3"
    assert found.accepted.tolist() == [[0, 1], [0, -1], [1, -1]]
    assert [round(np.asarray(dataset[index][0])[0, 0, 0] / 40) for index in range(3)] == [2, 4, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0], [1]], "is not ILSVRC2012_val_00000001.JPEG to"),
        ([[7]] * 4, "must name classes below 2"),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(tmp_path, content, message):
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_set(f"imagenet_real={labels}", ["ant", "bee"], validation_images(tmp_path))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "TEST.SETS imagenet_real: there is no file"),
        ("[[0], [1]", ValueError, "TEST.SETS imagenet_real: .* cannot be read"),
        ('{"0": 1}', ValueError, "must be a list with a list of labels per image"),
    ],
)
def test_a_file_of_real_labels_that_is_none_is_named(tmp_path, content, error, message):
    labels = tmp_path / "real.json"
    if content is not None:
        labels.write_text(content)
    with pytest.raises(error, match=message):
        open_set(f"imagenet_real={labels}", ["ant", "bee"], validation_images(tmp_path))


def test_a_set_without_class_folders_is_named_as_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"TEST\.SETS: .*<class>/<image>"):
        folder_labels(tmp_path, ["ant", "bee"])


def test_timms_copy_of_the_real_labels_is_at_hand(tmp_path):
    found = open_set("imagenet_real", SYNSETS, validation_images(tmp_path))
    assert 1 <= len(found.parts[""]) <= 4
    assert found.accepted.max() < 1000


@pytest.mark.parametrize("entry", ["imagenet_a", "=x", "val=/data", "a b=/data", "imagenet_c="])
def test_entries_that_are_no_set_are_refused(entry):
    with pytest.raises(ValueError, match=r"TEST.SETS entry .* must be NAME=PATH"):
        parse_entry(entry)


def test_a_path_may_hold_an_equals_sign():
    assert parse_entry("v2=/data/a=b") == ("v2", "/data/a=b")


def test_numbers_and_selections_pass_everything_else_on(tmp_path):
    root = write_images(tmp_path, ["ant", "bee"])
    whole = LabelledFolders(root, {"ant": 0, "bee": 1}, ["ant", "bee"])
    chosen = NumberedImages(SelectedImages(whole, [3, 0]))
    assert len(chosen) == 2
    assert [chosen[i][1] for i in range(2)] == [(1, 0), (0, 1)]
    assert chosen.describe(0) == whole.describe(3)
    chosen.decode = lambda content: len(content)
    assert chosen[1][0] == len((root / "ant" / "0.png").read_bytes())


# -- main.py --eval ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    args = ["--opts", "TRAIN.EPOCHS", "1"]
    program.main(["--cfg", SMOKE, "--output", str(folder), *args])
    return str(folder / "smoke_cls" / "default" / "checkpoints" / "last.pth")


def score(weights, *opts, flags=(), tag="default"):
    args = ["--cfg", SMOKE, "--output", "out", "--tag", tag, "--eval", "--resume", weights]
    program.main([*args, *flags, *(["--opts", *opts] if opts else [])])
    folder = Path("out/smoke_cls") / tag
    return json.loads((folder / "eval.json").read_text()), folder


def test_a_plain_evaluation_writes_what_it_always_wrote(weights):
    result, folder = score(weights)
    assert list(result) == ["checkpoint", "acc1", "acc5", "loss", "images", "skipped"]
    assert result["images"] == 20
    assert {path.name for path in folder.iterdir()} == {"eval.json", "log_rank0.txt"}


def test_sets_are_scored_beside_the_validation_split_or_instead(weights, tmp_path):
    root = write_images(tmp_path / "other", ["0", "7"], count=3)
    result, _ = score(weights, "TEST.SETS", f"['val', 'mine={root}']")
    assert list(result["sets"]) == ["val", "mine"]
    assert result["sets"]["val"]["loss"] == result["loss"]
    assert result["sets"]["mine"]["images"] == 6
    assert result["sets"]["mine"]["acc5"] == 100, "of two classes"
    alone, _ = score(weights, "TEST.SETS", f"['mine={root}']")
    assert alone["images"] == 6
    assert alone["sets"] == {"mine": result["sets"]["mine"]}


def test_scores_are_written_before_the_next_set_is_read(weights, tmp_path):
    good = write_images(tmp_path / "good", ["0", "7"])
    bad = write_images(tmp_path / "bad", ["0", "7"])
    (bad / "0" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"1\.png"):
        score(weights, "TEST.SETS", f"['good={good}', 'bad={bad}']")
    result = json.loads(Path("out/smoke_cls/default/eval.json").read_text())
    assert list(result["sets"]) == ["good"]


def test_corruptions_are_summed_up(weights, tmp_path):
    for corruption in ("fog", "snow"):
        for severity in "12":
            write_images(tmp_path / "c" / corruption / severity, ["0", "1"], count=1)
    result, _ = score(weights, "TEST.SETS", f"['imagenet_c={tmp_path / 'c'}']")
    errors = result["sets"]["imagenet_c"]["errors"]
    assert set(errors) == {"fog", "snow"}
    assert set(errors["fog"]) == {"mean", "1", "2"}
    assert result["mean_error"] == pytest.approx(100 - result["acc1"])
    assert result["images"] == 8


def test_an_attack_is_scored_beside_the_images_as_they_are(weights):
    plain, _ = score(weights)
    flags = ["--attack-type", "pgd", "--adv-eps", "16", "--adv-steps", "2", "--adv-step-size", "8"]
    result, _ = score(weights, flags=flags)
    assert {key: result[key] for key in plain} == plain
    attack = result["attack"]
    assert (attack["type"], attack["steps"], attack["images"]) == ("pgd", 2, 20)
    assert (attack["eps"], attack["step_size"]) == pytest.approx((16 / 255, 8 / 255))
    assert attack["loss"] > result["loss"]


def test_flips_are_averaged_and_said(weights):
    plain, _ = score(weights)
    result, _ = score(weights, "TEST.TTA", "flip")
    assert result["tta"] == "flip"
    assert result["loss"] != plain["loss"]
    assert result["images"] == 20


def test_crops_are_cut_out_of_the_margin(weights, tmp_path, monkeypatch):
    shapes = set()
    predict = ClassificationTask.predict

    def watch(self, model, batch):
        shapes.add(tuple(batch[0].shape[1:]))
        return predict(self, model, batch)

    monkeypatch.setattr(ClassificationTask, "predict", watch)
    root = write_images(tmp_path / "big", ["0", "1"], side=80)
    size = ["DATA.IMG_SIZE", "56"]
    result, _ = score(weights, "TEST.TTA", "ten", "TEST.SETS", f"['big={root}']", *size)
    assert shapes == {(3, 64, 64)}
    assert result["images"] == 4


def test_predictions_and_report_lie_in_the_runs_folder(weights, tmp_path):
    root = write_images(tmp_path / "other", ["3", "5"])
    sets = ["TEST.SETS", f"['val', 'mine={root}']"]
    result, folder = score(weights, "TEST.PREDICTIONS", "p.csv", "TEST.REPORT", "True", *sets)
    assert {path.name for path in folder.iterdir()} >= {
        *("p.csv", "p_mine.csv", "per_class.csv", "confusion.csv", "confusion.png"),
        *("per_class_mine.csv", "confusion_mine.csv", "confusion_mine.png"),
    }
    rows = list(csv.DictReader((folder / "p.csv").read_text().splitlines()))
    assert len(rows) == 20
    right = sum(row["label"] == row["top1"] for row in rows)
    assert 5 * right == pytest.approx(result["acc1"])
    mine = list(csv.DictReader((folder / "p_mine.csv").read_text().splitlines()))
    assert {row["top1"] for row in mine} <= {"3", "5"}
    assert [Path(row["sample"]).parent.name for row in mine] == ["3", "3", "5", "5"]
    assert 0 <= result["ece"] <= 100
    assert result["mean_class_acc"] == pytest.approx(result["acc1"]), "as many images per class"


def test_rows_stay_with_their_images_where_one_cannot_be_read(weights, tmp_path):
    root = write_images(tmp_path / "other", ["3", "5"], count=3)
    (root / "3" / "1.png").write_bytes(b"no image")
    opts = ["TEST.SETS", f"['mine={root}']", "DATA.ON_ERROR", "skip", "DATA.BATCH_SIZE", "2"]
    result, folder = score(weights, *opts, "TEST.PREDICTIONS", "p.csv")
    rows = list(csv.DictReader((folder / "p_mine.csv").read_text().splitlines()))
    samples = [str(Path(row["sample"]).relative_to(root)) for row in rows]
    assert samples == ["3/0.png", "3/2.png", "5/0.png", "5/1.png", "5/2.png"]
    assert [row["label"] for row in rows] == ["3", "3", "5", "5", "5"]
    assert (result["images"], result["skipped"]) == (5, 1)


def test_a_set_on_the_device_is_predicted_as_one_from_workers(weights):
    """DATA.ON_DEVICE stacks labels, whether they carry a number or not."""
    opts = ["TEST.PREDICTIONS", "p.csv", "AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", "0.0"]
    plain, folder = score(weights, *opts)
    other, there = score(weights, *opts, "DATA.ON_DEVICE", "True", tag="device")
    assert other == plain
    assert (there / "p.csv").read_text() == (folder / "p.csv").read_text()


def run_main_on_two_processes(*runs: list[str]) -> None:
    """main.py with each of the argument lists in turn, in the same two processes."""
    script = "import os, main\nfrom tests.processes import time_briefly\ntime_briefly()\n"
    for arguments in runs:
        script += f"os.environ['MASTER_PORT'] = '{free_port()}'; main.main({arguments!r})\n"
    run_on_two_processes(script, timeout=300)


def test_two_processes_train_beside_frozen_weights_and_predict_as_one_does(weights):
    """Trap: distributed evaluation counts duplicates; here each image has exactly one row, in order."""
    opts = ["TEST.PREDICTIONS", "p.csv", "TEST.REPORT", "True", "DATA.SYNTHETIC.VAL_SIZE", "53"]
    common = ["--cfg", SMOKE, "--output", "out"]
    freeze = ["TRAIN.FREEZE", "['backbone']", "TRAIN.EPOCHS", "1"]
    run_main_on_two_processes(
        [*common, "--tag", "probe", "--pretrained", weights, "--opts", *freeze],
        [*common, "--tag", "two", "--eval", "--resume", weights, "--opts", *opts],
    )
    probe = torch.load("out/smoke_cls/probe/checkpoints/last.pth", weights_only=True)["model"]
    start = torch.load(weights, weights_only=True)["model"]
    changed = {name.split(".")[0] for name in probe if not torch.equal(probe[name], start[name])}
    assert changed == {"head"}
    one, folder = score(weights, *opts, tag="one")
    other = folder.parent / "two"
    assert json.loads((other / "eval.json").read_text()) == one
    for name in ("p.csv", "per_class.csv", "confusion.csv"):
        assert (other / name).read_text() == (folder / name).read_text(), name


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.SETS", "['mine=nowhere']"], "is no folder"),
        (["TEST.SETS", "[]"], "must name at least one set"),
        (["TEST.SETS", "['val', 'val']"], "none twice"),
        (["TEST.SETS", "['imagenet_a']"], "must be NAME=PATH"),
        (["TEST.TTA", "five"], "TEST.TTA cuts crops"),
        (["TEST.TTA", "six"], "TEST.TTA='six' must be one of"),
        (["TEST.PREDICTIONS", "p.txt"], "must end in one of"),
        (["TEST.ATTACK_EPS", "300"], "TEST.ATTACK_EPS=300.0 must be within"),
        (["TEST.CROP_RATIO", "0"], "TEST.CROP_RATIO=0.0 must be within"),
    ],
)
def test_mistakes_stop_before_anything_is_written(weights, opts, message, capsys):
    with pytest.raises(SystemExit):
        score(weights, *opts)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_the_data_the_classes_are_those_of_imagenet(tmp_path):
    """ImageNet-A alone, where the validation images are not on this machine."""
    root = write_images(tmp_path / "a", [SYNSETS[6], SYNSETS[107]])
    opts = ["DATA.DATASET", "imagenet", "DATA.DATA_PATH", "nowhere"]
    classes, (found,) = build_evaluation_sets(
        load_config(SMOKE, [*opts, "TEST.SETS", f"['imagenet_a={root}']"])
    )
    assert classes == SYNSETS
    assert found.subset == [6, 107]
    with pytest.raises(FileNotFoundError, match=r"DATA.DATA_PATH must hold"):
        build_evaluation_sets(load_config(SMOKE, opts))


# -- fine-tuning -------------------------------------------------------------------------------------


def modes_while_training(monkeypatch, weights, *opts):
    seen = {}
    losses = ClassificationTask.losses

    def watch(self, model, batch):
        seen.update({name: module.training for name, module in model.named_modules()})
        return losses(self, model, batch)

    monkeypatch.setattr(ClassificationTask, "losses", watch)
    args = ["--cfg", SMOKE, "--output", "out", "--pretrained", weights]
    program.main([*args, "--opts", "TRAIN.EPOCHS", "1", *opts])
    state = torch.load("out/smoke_cls/default/checkpoints/last.pth", weights_only=True)
    start = torch.load(weights, weights_only=True)["model"]
    changed = {
        name for name, value in state["model"].items() if not torch.equal(value, start[name])
    }
    return seen, changed


def test_frozen_prefixes_keep_weights_and_statistics(monkeypatch, weights):
    opts = ["TRAIN.FREEZE", "['backbone']", "TRAIN.EMA.ENABLE", "True"]
    seen, changed = modes_while_training(monkeypatch, weights, *opts)
    assert {name.split(".")[0] for name in changed} == {"head"}
    assert seen[""], "the model itself trains"
    assert not all(seen.values()), "its batch norms do not"


def test_the_linear_probe_recipe_trains_the_classifier_alone(weights, tmp_path):
    recipe = CONFIG_DIR / "_base_" / "linear_probe.yaml"
    cfg = tmp_path / "probe.yaml"
    cfg.write_text(f"BASE: [{SMOKE}, {recipe}]\n")
    args = ["--cfg", str(cfg), "--output", "out", "--pretrained", weights]
    program.main([*args, "--opts", "TRAIN.MAX_STEPS", "2"])
    state = torch.load("out/smoke_cls/default/checkpoints/last.pth", weights_only=True)
    start = torch.load(weights, weights_only=True)["model"]
    changed = {
        name for name, value in start.items() if not torch.equal(state["model"][name], value)
    }
    assert changed == {"head.weight", "head.bias"}
    decays = {group["weight_decay"] for group in state["optimizer"]["param_groups"]}
    assert decays == {0.0}


def test_a_frozen_prefix_that_is_none_stops_the_run(capsys):
    with pytest.raises(SystemExit):
        program.main(["--cfg", SMOKE, "--output", "out", "--opts", "TRAIN.FREEZE", "['stem']"])
    assert "TRAIN.FREEZE=['stem']: no parameter" in capsys.readouterr().err
    assert not Path("out").exists()
