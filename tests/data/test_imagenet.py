"""ImageNet's layouts: which files count, which class each has, and what is said where something is missing."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import IMAGENET_VAL as VAL
from layouts import IMAGENET_WNIDS as WNIDS
from layouts import imagenet_val_name as name_of
from layouts import label_imagenet as two_columns
from layouts import lay_out_imagenet
from layouts import save_imagenet as save

from advmoe.data import Dataset, FileSet, load_dataset

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet-samples.tar"
# In the order of the wnids.
IDS = {"n01000000": 2, "n02000000": 3, "n03000000": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    lay_out_imagenet(root)
    return root


def load(root: Path, **options: int | float | None) -> Dataset:
    return load_dataset("imagenet", root=root, **{"workers": 0, "val_fraction": 0.0, "image_size": 8, **options})  # type: ignore[arg-type]


def message(root: Path) -> str:
    with pytest.raises(ValueError) as error:
        load(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_ground_truth(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{IDS[wnid]}\n" for wnid in VAL))


def write_meta(folder: Path) -> None:
    """A `meta.mat` like the official one: a struct array in the order of the ids, with inner nodes after the leaves."""
    from scipy.io import savemat

    rows = [*sorted((number, wnid) for wnid, number in IDS.items()), (4, "n00000001")]
    synsets = np.zeros((4, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, (number, wnid) in enumerate(rows):
        synsets[row, 0] = (float(number), wnid, "words")
    savemat(folder / "meta.mat", {"synsets": synsets})


def class_folders(root: Path) -> None:
    for number, wnid in enumerate(VAL):
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / f"{name_of(number)}.JPEG").rename(root / "val" / wnid / f"{name_of(number)}.JPEG")


def kaggle(root: Path) -> None:
    lines = [f"{name_of(number)},{wnid} 85 1 499 272 {wnid} 3 4 5 6 \n" for number, wnid in enumerate(VAL)]
    (root / "val" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))


def kit_with_meta(root: Path) -> None:
    write_ground_truth(root / "ILSVRC2012_devkit_t12" / "data")
    write_meta(root / "ILSVRC2012_devkit_t12" / "data")


def kit_with_text(root: Path) -> None:
    write_ground_truth(root)
    (root / "map_clsloc.txt").write_text("".join(f"{wnid} {number} some_words\n" for wnid, number in IDS.items()))


def test_a_part_of_the_files(root: Path) -> None:
    class_folders(root)
    part, whole = load(root, train_examples=7), load(root)
    assert isinstance(part.train, FileSet) and isinstance(whole.train, FileSet)
    assert len(part.train) == 7 and set(part.train.paths) < set(whole.train.paths)
    assert list(part.train.paths) == sorted(part.train.paths)
    # A file's folder tells its class, and its red does.
    assert [WNIDS.index(path.decode().split("/")[1]) for path in part.train.paths] == part.train.labels.tolist()
    assert (part.train.pixels(slice(None))[:, 0, 0, 0] * 255).round().tolist() == part.train.labels.tolist()
    assert len(part.test) == 4
    with pytest.raises(ValueError, match=r"<= the 12 training images, got 13$"):
        load(root, train_examples=13)


@pytest.mark.parametrize("labels", [class_folders, two_columns, kaggle, kit_with_meta, kit_with_text])
def test_every_kind_of_labels_gives_the_same_classes(root: Path, labels: Callable[[Path], None]) -> None:
    labels(root)
    data = load(root)
    assert data.classes == WNIDS
    assert isinstance(data.train, FileSet) and isinstance(data.test, FileSet)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 0, 4)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    red = data.test.pixels(slice(None))[:, 0, 0, 0].mul(255).round().int().tolist()
    assert red == data.test.labels.tolist()
    assert sorted(red) == [0, 0, 1, 2]
    assert (data.image_size, data.in_channels, data.flip) == (8, 3, True)
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)


def test_size_is_224_unless_given_and_words_are_names(root: Path) -> None:
    two_columns(root)
    (root / "LOC_synset_mapping.txt").write_text("n01000000 tench, Tinca tinca\nn02000000 dog\n")
    data = load_dataset("imagenet", root=root, workers=0)
    assert data.image_size == 224 and data.test.pixels(slice(0, 1)).shape == (1, 3, 224, 224)
    assert data.classes == ("tench, Tinca tinca", "dog", "n03000000")


def test_hold_out_follows_the_seed_and_the_classes(root: Path) -> None:
    two_columns(root)
    one, same, other = (load_dataset("imagenet", root=root, val_fraction=0.25, seed=s, workers=0) for s in (1, 1, 2))
    parts = [(part.train, part.val) for part in (one, same, other)]
    held = []
    for train, val in parts:
        assert isinstance(train, FileSet) and isinstance(val, FileSet)
        assert val.labels.tolist() == [0, 1, 2]
        assert len({*train.paths.tolist(), *val.paths.tolist()}) == 12
        held.append(val.paths.tolist())
    assert held[0] == held[1] != held[2]


def add_unknown_class(root: Path) -> None:
    class_folders(root)
    save(root / "val" / "n04000000" / "x.JPEG")


def label_unknown_class(root: Path) -> None:
    two_columns(root)
    text = (root / "val_labels.txt").read_text()
    (root / "val_labels.txt").write_text(text.replace("n03000000", "n04000000"))


def too_few_lines(root: Path) -> None:
    kit_with_text(root)
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")


def unknown_id(root: Path) -> None:
    kit_with_text(root)
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n7\n")


def kit_without_map(root: Path) -> None:
    write_ground_truth(root / "data")


def kit_with_damaged_map(root: Path) -> None:
    kit_without_map(root)
    (root / "data" / "meta.mat").write_bytes(b"MATLAB 5.0")


def two_classes_for_one(root: Path) -> None:
    two_columns(root)
    with (root / "val_labels.txt").open("a") as file:
        file.write("ILSVRC2012_val_00000002.JPEG n02000000\n")


def two_columns_short(root: Path) -> None:
    two_columns(root)
    (root / "val_labels.txt").write_text("ILSVRC2012_val_00000001.JPEG n01000000\n")


WRONG: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "val").rename(root / "x"), "hold a folder val, got "),
    (lambda root: (root / "train").rename(root / "x"), "hold a folder train, got "),
    (
        lambda root: None,
        "hold class folders in val, or beside a flat val one of val_labels.txt, LOC_val_solution.csv, "
        "ILSVRC2012_validation_ground_truth.txt, got neither in ",
    ),
    (add_unknown_class, "have only classes of train in val, got 'n04000000' in "),
    (label_unknown_class, "hold val images of classes of train, got 'n04000000' in "),
    (two_columns_short, "val_labels.txt with a line for each image of val, got none for 'val/ILSVRC2012_val_00000002"),
    (two_classes_for_one, "one class for each image, got 'n01000000' and 'n02000000' for 'ILSVRC2012_val_00000002'"),
    (too_few_lines, "a line in ILSVRC2012_validation_ground_truth.txt for each image of val, got 2 lines for 4 images"),
    (unknown_id, "hold ILSVRC2012_validation_ground_truth.txt with ILSVRC2012 ids, got '7'"),
    (kit_without_map, "hold meta.mat or map_clsloc.txt beside ILSVRC2012_validation_ground_truth.txt"),
    (kit_with_damaged_map, "hold a readable meta.mat, got "),
]


@pytest.mark.parametrize(("damage", "expected"), WRONG, ids=[expected for _, expected in WRONG])
def test_what_is_missing_is_named(root: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(root)
    found = message(root)
    assert found.startswith("data.root must ") and expected in found


def half_sorted(root: Path) -> None:
    """As an interrupted script that sorts leaves it: every class has its folder, two images lie in theirs."""
    for wnid in WNIDS:
        (root / "val" / wnid).mkdir()
    for number in (0, 2):
        (root / "val" / f"{name_of(number)}.JPEG").rename(root / "val" / VAL[number] / f"{name_of(number)}.JPEG")


@pytest.mark.parametrize("labels", [two_columns, kaggle, kit_with_meta, kit_with_text])
def test_what_is_not_sorted_yet_has_the_class_of_the_label_file(root: Path, labels: Callable[[Path], None]) -> None:
    labels(root)
    half_sorted(root)
    data = load(root)
    assert isinstance(data.test, FileSet)
    red = data.test.pixels(slice(None))[:, 0, 0, 0].mul(255).round().int().tolist()
    assert red == data.test.labels.tolist() == [WNIDS.index(wnid) for wnid in VAL]
    assert data.notes == ()


def test_half_sorted_without_labels_is_refused(root: Path) -> None:
    half_sorted(root)
    found = message(root)
    assert "got neither in " in found and found.endswith(
        f"for 2 images without a class: 'val/{name_of(1)}.JPEG', 'val/{name_of(3)}.JPEG'"
    )


def test_loose_images_of_train_are_refused_and_archives_noted(root: Path) -> None:
    two_columns(root)
    for wnid in ("n04000000", "n05000000"):
        (root / "train" / f"{wnid}.tar").write_bytes(b"")
    (note,) = load(root).notes
    assert note.startswith("train: 2 files left out (the name's ending is none of .bmp, ") and note.endswith("2 '.tar'")
    save(root / "train" / "x.JPEG")
    assert "the images of train in class folders, got 1 beside them: 'train/x.JPEG'" in message(root)


def test_an_image_that_a_link_does_not_lead_to_is_refused_before_training(root: Path) -> None:
    two_columns(root)
    (root / "train" / WNIDS[0] / "gone.JPEG").symlink_to(root / "gone.JPEG")
    assert message(root).endswith(f"got 'train/{WNIDS[0]}/gone.JPEG', a link that leads nowhere")


def test_labels_of_images_that_are_not_there_are_noted(root: Path) -> None:
    two_columns(root)
    (root / "val" / f"{name_of(1)}.JPEG").unlink()
    data = load(root)
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.notes == ("val: 3 images, 1 that val_labels.txt names are not there",)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("labels", [two_columns, kaggle, kit_with_text])
def test_label_files_of_windows(root: Path, labels: Callable[[Path], None], encoding: str) -> None:
    labels(root)
    (root / "words.txt").write_text("n01000000\tcafé\nn02000000\tdog\nn03000000\tant\n", encoding="utf-8")
    for path in [*root.glob("*.txt"), *root.glob("val/*.csv")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_bytes("".join(f"{line} \t\r\n" for line in lines).encode(encoding))
    data = load(root)
    assert data.test.labels.tolist() == [2, 0, 1, 0]
    assert data.classes == ("café", "dog", "ant") and data.notes == ()


def test_quoted_columns(root: Path) -> None:
    kaggle(root)
    path = root / "val" / "LOC_val_solution.csv"
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in path.read_text().splitlines()]
    path.write_text("\n".join(quoted))
    assert load(root).test.labels.tolist() == [2, 0, 1, 0]


@pytest.mark.skipif(not SAMPLES.is_file(), reason="imagenet-samples.tar is not there")
def test_real_images_are_all_read(tmp_path: Path) -> None:
    with tarfile.open(SAMPLES) as tar:
        for member in tar:
            wnid = member.name.split("_")[0]
            stream = tar.extractfile(member)
            assert stream is not None
            content = stream.read()
            for part in ("train", "val"):
                path = tmp_path / part / wnid / member.name
                path.parent.mkdir(parents=True)
                path.write_bytes(content)
    data = load_dataset("imagenet", root=tmp_path, val_fraction=0, workers=0)
    assert (len(data.train), len(data.test), data.num_classes) == (50, 50, 50)
    x = data.test.pixels(slice(None))
    assert x.shape == (50, 3, 224, 224)
    # Natural images: their channels' means and deviations are about the published ones.
    for channel in range(3):
        assert x[:, channel].mean().item() == pytest.approx(data.mean[channel], abs=0.06)
        assert x[:, channel].std().item() == pytest.approx(data.std[channel], abs=0.06)
