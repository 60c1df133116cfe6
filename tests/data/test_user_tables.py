"""Tables as people have them: of paths and labels, parquet in folders of splits, data sets of the hub."""

import errno
import json
import re
import warnings

import pytest
from samples import cycle, images, parquet, png
from test_user_folders import put, read, several, sizes

from eekd.data import load

bad_input = pytest.mark.bad_input
PATHS = several("images", each=20)
LABELS = ["cat", "dog"] * 10


def table(root, name, rows, header=("path", "label"), delimiter=","):
    lines = [header, *rows] if header else rows
    (root / name).write_text("".join(delimiter.join(map(str, line)) + "\n" for line in lines))
    return root / name


def check(data, labels=LABELS):
    assert data.classes == ("cat", "dog") and sizes(data) == (14, 2, 4)
    by_file = dict(zip(PATHS, labels, strict=True))
    for split in (data.train, data.val, data.test):
        for i in range(len(split)):
            assert by_file["/".join(split.images.read(i)[1].split("/")[-2:])] == data.classes[split.labels[i]]


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [("labels.csv", ("path", "label"), ","), ("labels.csv", ("file_name", "class"), ";"), ("l.tsv", ("id", "y"), "\t"),
     ("l.csv", None, ","), ("train.txt", None, " "), ("train.txt", None, "\t"), ("l.csv", ("image", "breed"), "|")],
)  # fmt: skip
def test_a_table_of_paths_and_labels(tmp_path, name, header, delimiter):
    put(tmp_path, *PATHS)
    file = table(tmp_path, name, zip(PATHS, LABELS, strict=True), header, delimiter)
    data, warning = read(file, memory_budget=0)
    check(data)
    assert warning is None and any(f"{name} names the images in" in said for said in data.decisions)


@pytest.mark.parametrize(
    "called",
    [
        lambda path: path,
        lambda path: "./" + path,
        lambda path: path.replace("/", "\\"),
        lambda path: "C:\\data\\" + path.replace("/", "\\"),
        lambda path: "/home/somebody/old/" + path,
        lambda path: path.split("/")[1],
        lambda path: path.split("/")[1].removesuffix(".png"),
        lambda path: f" {path} ",
    ],
)
def test_images_are_found_by_what_tables_call_them(tmp_path, called):
    put(tmp_path, *PATHS)
    check(read(table(tmp_path, "l.csv", zip(map(called, PATHS), LABELS, strict=True)), memory_budget=0)[0])


@pytest.mark.parametrize(
    "value",
    [
        [{"file": path, "label": label, "width": 8} for path, label in zip(PATHS, LABELS, strict=True)],
        dict(zip(PATHS, LABELS, strict=True)),
        {"labels": [list(pair) for pair in zip(PATHS, LABELS, strict=True)]},
        [list(pair) for pair in zip(PATHS, LABELS, strict=True)],
        {"annotations": [{"file": path, "label": label} for path, label in zip(PATHS, LABELS, strict=True)]},
    ],
)
def test_json(tmp_path, value):
    put(tmp_path, *PATHS)
    (tmp_path / "l.json").write_text(json.dumps(value))
    check(read(tmp_path / "l.json", memory_budget=0)[0])
    if isinstance(value, list) and isinstance(value[0], dict):
        (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, value)))
        check(read(tmp_path / "l.jsonl", memory_budget=0)[0])


def test_labels_in_columns_of_one_class_each(tmp_path):
    put(tmp_path, *PATHS)
    rows = [(path, label == "cat", label == "dog") for path, label in zip(PATHS, LABELS, strict=True)]
    rows = [(path, f"{int(cat)}.0", f"{int(dog)}.0") for path, cat, dog in rows]
    check(read(table(tmp_path, "l.csv", rows, ("image", "cat", "dog")), memory_budget=0)[0])


def test_columns_can_be_named(tmp_path):
    put(tmp_path, *PATHS)
    rows = [(5, label, path, k, k % 3) for k, (path, label) in enumerate(zip(PATHS, LABELS, strict=True))]
    file = table(tmp_path, "l.csv", rows, ("label", "animal", "photo", "number", "age"))
    check(read(file, label_column="animal", memory_budget=0)[0])
    assert read(file, label_column="age")[0].classes == ("0", "1", "2")
    with pytest.raises(ValueError, match="label_column must be one of label, animal, photo, number, age, got 'x'"):
        load(str(file), label_column="x")
    with pytest.raises(ValueError, match="at least two"):
        load(str(file))


def test_numbers_are_classes_in_the_order_of_numbers(tmp_path):
    """Labels, and images that are called as a label is: 0.png, 1.png."""
    paths = [f"{k}.png" for k in range(24)]
    put(tmp_path, *paths)
    file = table(tmp_path, "l.csv", [(k % 12, path) for k, path in enumerate(paths)], ("label", "name"))
    data, _ = read(file, memory_budget=0, val_fraction=0)
    assert data.classes == tuple(map(str, range(12)))
    names = [int(data.train.images.read(i)[1].split("/")[-1][:-4]) for i in range(len(data.train))]
    assert [k % 12 for k in names] == data.train.labels.tolist()


def test_a_split_column(tmp_path):
    put(tmp_path, *PATHS)
    parts = ["train"] * 12 + ["valid"] * 4 + ["test"] * 4
    file = table(tmp_path, "l.csv", zip(PATHS, LABELS, parts, strict=True), ("path", "label", "split"))
    assert sizes(read(file)[0]) == (12, 4, 4)


def test_tables_named_as_splits(tmp_path):
    """Kaggle's: train.csv with labels, test.csv without."""
    put(tmp_path, *PATHS, *several("images/test", each=4))
    table(tmp_path, "train.csv", zip(PATHS, LABELS, strict=True), ("id", "label"))
    for header, rows in ((["id"], [[path] for path in several("images/test", each=4)]),
                         (["id", "label"], [[path, ""] for path in several("images/test", each=4)])):  # fmt: skip
        table(tmp_path, "test.csv", rows, header)
        data, warning = read(tmp_path, memory_budget=0)
        check(data)
        assert "test.csv, which has no labels" in warning


def test_a_flat_folder_with_its_table_beside_it(tmp_path):
    """Kaggle's: labels.csv beside train/ and test/ without folders of classes."""
    put(tmp_path, *several("train", each=20), *several("test", each=5))
    names = [f"{k:03}" for k in range(20)]
    table(tmp_path, "labels.csv", zip(names, LABELS, strict=True), ("id", "breed"))
    (tmp_path / "sample_submission.csv").write_text("id,cat,dog\n000,0.5,0.5\n")
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and sizes(data) == (14, 2, 4) and "test/, whose images" in warning


def test_the_metadata_of_an_imagefolder(tmp_path):
    for part in ("train", "test"):
        put(tmp_path, *several(part, each=20))
        table(tmp_path / part, "metadata.csv", zip([f"{k:03}.png" for k in range(20)], LABELS, strict=True))
    assert sizes(read(tmp_path)[0]) == (18, 2, 20)


def test_tables_with_a_column_for_each_class_beside_each_split(tmp_path):
    """Roboflow's."""
    for part, each in (("train", 12), ("valid", 6), ("test", 6)):
        put(tmp_path, *several(part, each=each))
        rows = [(f"{k:03}.png", k % 2, (k + 1) % 2) for k in range(each)]
        table(tmp_path / part, "_classes.csv", rows, ("filename", " cat", " dog"))
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and sizes(data) == (12, 6, 6) and warning is None


def test_a_column_can_be_named_of_a_table_beside_flat_images(tmp_path):
    put(tmp_path, *several("train", each=20), *several("test", each=4))
    rows = [(f"{k:03}", "xyz"[k % 3], LABELS[k]) for k in range(20)]
    table(tmp_path, "train.csv", rows, ("id", "kind", "animal"))
    table(tmp_path, "test.csv", [(f"{k:03}",) for k in range(4)], ("id",))
    data, _ = read(tmp_path, label_column="animal")
    assert data.classes == ("cat", "dog") and "train.csv names the labels of the images in train/." in data.decisions
    with pytest.raises(ValueError, match=r"\(train.csv names them, but no column of it can be their label\)$"):
        load(str(tmp_path))


@bad_input
@pytest.mark.parametrize(
    ("label", "said"),
    [
        (lambda k: "holdout" if k > 14 else "train", "column split, whose 2 values .holdout, train. tell no splits"),
        (lambda k: "" if k > 14 else "train", "the column split, whose 2 values .nothing, train. tell no splits"),
    ],
)
def test_a_split_column_that_tells_no_splits_is_said(tmp_path, label, said):
    put(tmp_path, *PATHS)
    rows = [(path, LABELS[k], label(k)) for k, path in enumerate(PATHS)]
    _, warning = read(table(tmp_path, "l.csv", rows, ("path", "label", "split")))
    assert re.search(said, warning)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("a", "b", "NA"), "NA is read as a class, of 6 images; if it means that there is no label"),
        (("a", "b", "a|b"), "'a.b' is read as one class, though its parts are classes too"),
        (("scab", "rust", "scab rust"), "'scab rust' is read as one class, though its parts"),
        (("hot", "dog", "hot cat"), None),
    ],
)
def test_classes_that_could_be_none_or_several_are_said(tmp_path, labels, said):
    put(tmp_path, *PATHS)
    _, warning = read(table(tmp_path, "l.csv", [(path, labels[k % 3]) for k, path in enumerate(PATHS)]))
    assert re.search(said, warning) if said else warning is None


@bad_input
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_column_of_ids_or_captions_is_no_label(tmp_path, place):
    put(tmp_path, *several("train", each=20))
    rows = [{"file_name": f"{k:03}.png", "text": f"caption {k}", "box": [1, 2]} for k in range(20)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = "must have classes as labels, got 20 different ones in 20 rows such as 'caption 0'"
    said = said if place == "file" else "metadata.jsonl names them, but no column of it can be their label"
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path / "train/metadata.jsonl" if place == "file" else tmp_path))


def test_a_table_of_excel_in_utf_16(tmp_path):
    put(tmp_path, *PATHS)
    text = "path\tlabel\n" + "".join(f"{p}\t{y}\n" for p, y in zip(PATHS, LABELS, strict=True))
    (tmp_path / "l.csv").write_text(text, encoding="utf-16")
    check(read(tmp_path / "l.csv", memory_budget=0)[0])


@bad_input
def test_two_labels_of_an_image_in_a_table_beside_are_refused(tmp_path):
    put(tmp_path, *several("train", each=20))
    rows = [(f"{k:03}.png", LABELS[k]) for k in range(20)]
    table(tmp_path, "labels.csv", [*rows, ("000.png", "dog")], ("id", "breed"))
    with pytest.raises(ValueError, match="labels.csv must have one label for '.*000.png', got 'cat' and 'dog'$"):
        load(str(tmp_path))


def test_images_elsewhere(tmp_path):
    put(tmp_path / "far", *PATHS)
    file = table(tmp_path, "l.csv", zip(PATHS, LABELS, strict=True))
    check(read(file, root=str(tmp_path / "far"), memory_budget=0)[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "sep=;\npath;label\n" + "".join(f"{p};{y}\n" for p, y in zip(PATHS, LABELS, strict=True))),
        ("l.csv", "\ufeffpath\tlabel\r\n" + "".join(f"{p}\t{y}\r\n" for p, y in zip(PATHS, LABELS, strict=True))),
        ("l.txt", "".join(f"{p},{y}\n" for p, y in zip(PATHS, LABELS, strict=True))),
        ("l.json", json.dumps({"cat": PATHS[::2], "dog": PATHS[1::2]})),
        ("l.json", "\n".join(json.dumps({"file": p, "y": y}) for p, y in zip(PATHS, LABELS, strict=True))),
        ("l.ndjson", "\n".join(json.dumps({"file": p, "y": y}) for p, y in zip(PATHS, LABELS, strict=True))),
        ("l.csv", "".join(f"{p.upper()},{y}\n" for p, y in zip(PATHS, LABELS, strict=True))),
    ],
    ids=["Excel's first line", "tabs", "txt with commas", "by class", "lines", "ndjson", "capitals"],
)
def test_tables_of_other_habits(tmp_path, name, text):
    put(tmp_path, *PATHS)
    (tmp_path / name).write_text(text)
    check(read(tmp_path / name, memory_budget=0)[0])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0.0", "2.0", "10.0"], ("0", "2", "10")),
        (["1", "2", "3"], ("1", "2", "3")),
        (["True", "False", "True"], ("False", "True")),
        (["0.5", "1.0", "1.5"], ("0.5", "1.0", "1.5")),
        (["-1", "1", "1"], ("-1", "1")),
    ],
)
def test_labels_that_are_numbers(tmp_path, labels, classes):
    put(tmp_path, *PATHS)
    rows = [(path, labels[k % 3]) for k, path in enumerate(PATHS)]
    assert read(table(tmp_path, "l.csv", rows))[0].classes == classes
    text = json.dumps([{"image": path, "label": json.loads(y.lower())} for path, y in rows])
    (tmp_path / "l.json").write_text(text)
    assert read(tmp_path / "l.json")[0].classes == classes


def test_labels_that_may_be_none_are_named(tmp_path):
    put(tmp_path, *PATHS)
    rows = [(path, (-1, 0, 1)[k % 3]) for k, path in enumerate(PATHS)]
    data, warning = read(table(tmp_path, "l.csv", rows))
    assert data.classes == ("-1", "0", "1") and "l.csv: -1 is read as a class, of 7 images; if it means" in warning


@pytest.mark.parametrize(
    ("column", "parts"), [("is_valid", (15, 0, 5)), ("is_test", (15, 0, 5)), ("is_train", (5, 0, 15))]
)
@pytest.mark.parametrize("truth", [("1", "0"), ("True", "False")])
def test_a_column_of_truths_tells_the_splits(tmp_path, column, parts, truth):
    put(tmp_path, *PATHS)
    rows = [(path, y, truth[k >= 5]) for k, (path, y) in enumerate(zip(PATHS, LABELS, strict=True))]
    data, _ = read(table(tmp_path, "l.csv", rows, ("path", "label", column)), val_fraction=0)
    assert sizes(data) == parts


def test_images_named_again_are_said(tmp_path):
    put(tmp_path, *PATHS)
    rows = [*zip(PATHS, LABELS, strict=True), (PATHS[0], "cat"), (PATHS[1], "dog")]
    data, warning = read(table(tmp_path, "l.csv", rows), memory_budget=0)
    check(data)
    assert "left out are 2 rows of l.csv that name an image again" in warning
    split = ["train"] * 20 + ["test"] * 2
    file = table(
        tmp_path, "l.csv", [(*row, part) for row, part in zip(rows, split, strict=True)], ("p", "label", "split")
    )
    assert "l.csv: 2 images of test are in train too" in read(file)[1]


def test_missing_images_can_be_left_out(tmp_path):
    put(tmp_path, *PATHS)
    (tmp_path / PATHS[3]).unlink()
    file = table(tmp_path, "l.csv", zip(PATHS, LABELS, strict=True))
    data, warning = read(file, bad_images="skip")
    assert sum(sizes(data)) == 19 and "1 row (images/003.png) of l.csv whose images are missing" in warning


@bad_input
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("images/000.png", "cat"), ("images/999.png", "dog")], "names 1 image .images/999.png. that .* lacks"),
        ([("images/000.png", "cat"), ("images/001.png", "")], "a label for 'images/001.png', got none in row 2"),
        ([("a", "cat"), ("b", "dog")], "images below .*, got none in its columns path, label: --root says"),
        ([("images/000.png", "cat", 1), ("images/001.png", "dog")], "must have 2 columns in each row, got 3 in row 2"),
        ([("../secret.png", "cat"), ("images/000.png", "dog")], "names 1 image .../secret.png. that"),
        ([("/etc/passwd", "cat"), ("images/000.png", "dog")], "names 1 image ./etc/passwd. that"),
        ([], "must have a path and a label in each row, got 0 rows"),
        (
            [(PATHS[0], "cat"), (PATHS[1], "dog"), (PATHS[0], "dog")],
            "one label for 'images/000.png', got 'cat' and, in row",
        ),
        (
            [(path, f"{k * 1.7:.3f}") for k, path in enumerate(PATHS)],
            "classes as labels, got 20 different numbers such as",
        ),
        ([(PATHS[0], "cat"), (PATHS[1], "nan")], "a label for 'images/001.png', got none in row 2"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, rows, said):
    put(tmp_path / "data", *PATHS)
    put(tmp_path, "secret.png")
    file = table(tmp_path / "data", "l.csv", rows, ("path", "label") if rows else None)
    with pytest.raises(ValueError, match=said) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)


@bad_input
@pytest.mark.parametrize(
    ("name", "text"),
    [("l.json", "{"), ("l.json", "5"), ("l.json", "[" * 10**5), ("l.json", '{"a": {}}'), ("l.json", "[[1]]"),
     ("l.csv", "x"), ("l.jsonl", "{}\n["), ("l.csv", b"\xff\xfe\0"), ("l.csv", 'a,b\n"' + "x" * 200_000),
     ("l.json", "null"), ("l.json", "[null]"), ("l.json", '[{"a": [1]}]'), ("l.txt", "one\ntwo")],
)  # fmt: skip
def test_a_damaged_table_is_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{name} must ") as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@bad_input
def test_a_name_of_several_images_is_refused(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png", "c/2.png")
    with pytest.raises(ValueError, match="must hold one image called '1.png', got several"):
        load(str(table(tmp_path, "l.csv", [("1.png", "x"), ("2.png", "y")])))


@bad_input
@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "data.rar", "data.7z"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match="unpack it and give the folder"):
        load(str(tmp_path / name))


# ---- parquet and the hub ----


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "Testing"), ("data/train", "data/val")])
def test_parquet_in_folders_of_splits(tmp_path, hub, train, test):
    for part in (train, test):
        (tmp_path / part).mkdir(parents=True)
        parquet(hub, tmp_path / part / "0000.parquet")
    data, warning = read(tmp_path)
    assert sizes(data) == (36, 4, 40) and warning is None


def test_hidden_parquet_is_passed_over_and_parts_without_a_split_are_named(tmp_path, hub):
    for name in (".cache/0.parquet", "train.parquet", "test.parquet", "more.parquet"):
        parquet(hub, tmp_path / name)
    data, warning = read(tmp_path)
    assert sizes(data) == (36, 4, 40) and "1 parquet file (more.parquet) whose names tell no split" in warning


def test_shards_that_are_missing_are_named(tmp_path, hub):
    for number in (0, 2):
        parquet(hub, tmp_path / f"data/train-0000{number}-of-00003.parquet")
    assert read(tmp_path)[1].endswith("left out are 1 of the 3 shards of train, not there")
    assert read(tmp_path / "data/train-00000-of-00003.parquet")[1] is None


def test_parquet_beside_images(tmp_path, hub):
    parquet(hub, tmp_path / "data/train-00000-of-00001.parquet")
    put(tmp_path, "assets/logo.png", "figure.png")
    data, warning = read(tmp_path)
    assert len(data.classes) == 4 and warning.endswith("left out are the images in assets/, beside parquet files")
    put(tmp_path, *several("train/cat", "train/dog"))
    data, warning = read(tmp_path)
    assert data.classes == ("cat", "dog") and "parquet files, for there are folders of images" in warning


def test_parquet_in_several_folders_is_said(tmp_path, hub):
    for name in "ab":
        parquet(hub, tmp_path / name / "train-00000-of-00001.parquet")
    assert "The parquet files of train lie in 2 folders (a, b): all are read." in read(tmp_path)[0].decisions


@bad_input
def test_parquet_that_is_none_is_told(tmp_path, hub):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="train.parquet must be parquet, got a pointer of Git LFS: `git lfs pull`"):
        load(str(tmp_path))
    addresses = [f"https://x.org/{k}.png" for k in range(40)]
    hub.Dataset.from_dict({"image": addresses, "label": FOUR}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="^image 0 must be bytes or the path of a file, got an address: download 'htt"):
        load(str(tmp_path))
    captions = [f"caption {k}" for k in range(40)]
    rows(hub, image=hub.Image, text=captions).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="column text, must have classes as labels, got 40 different ones in 40 rows"):
        load(str(tmp_path))


def rows(hub, n=40, **columns):
    cells = [{"bytes": png(x), "path": None} for x in images(n, 3, 16).transpose(0, 2, 3, 1)]
    columns = {name: cells if column is hub.Image else column for name, column in columns.items()}
    features = {
        name: hub.Image() if column is cells else hub.Value("string" if isinstance(column[0], str) else "int64")
        for name, column in columns.items()
    }
    return hub.Dataset.from_dict(columns, features=hub.Features(features))


@pytest.fixture
def serve(hub, monkeypatch):
    """A hub that has the splits given."""

    def give(**splits):
        asked = []

        def load_dataset(*arguments, **settings):
            asked.append((arguments, settings))
            if settings.get("streaming"):
                return {name: split.to_iterable_dataset() for name, split in splits.items()}
            return hub.DatasetDict(splits)

        monkeypatch.setattr(hub, "load_dataset", load_dataset)
        return asked

    return give


FOUR = cycle(40, 4).tolist()


def test_columns_are_found_by_their_types(hub, serve):
    serve(train=rows(hub, photo=hub.Image, species=FOUR))
    data, _ = read("some/thing")
    assert sizes(data) == (29, 3, 8) and "Images are in the column photo, labels in species." in data.decisions
    serve(train=rows(hub, photo=hub.Image, species=FOUR, age=FOUR).cast_column("species", hub.ClassLabel(4)))
    assert "labels in species." in " ".join(read("some/thing")[0].decisions)
    serve(train=rows(hub, mask=hub.Image, image=hub.Image, label=FOUR))
    assert "Images are in the column image" in " ".join(read("some/thing")[0].decisions)


@bad_input
def test_columns_that_do_not_tell_can_be_named(hub, serve):
    serve(train=rows(hub, photo=hub.Image, mask=hub.Image, species=FOUR, age=FOUR))
    with pytest.raises(ValueError, match="got photo, mask, species, age: --image-column names"):
        load("some/thing")
    with pytest.raises(ValueError, match="got photo, mask, species, age: --label-column names"):
        load("some/thing", image_column="mask")
    said = " ".join(read("some/thing", image_column="mask", label_column="age")[0].decisions)
    assert "in the column mask, labels in age." in said
    for name in ("image_column", "label_column"):
        with pytest.raises(ValueError, match=f"{name} must be one of photo, mask, species, age, got 'x'"):
            load("some/thing", **{"image_column": "mask", "label_column": "age", name: "x"})


def test_splits_of_other_names(hub, serve):
    train = rows(hub, image=hub.Image, label=FOUR)
    serve(training=train, evaluation=train.select(range(8)))
    assert sizes(read("some/thing")[0]) == (36, 4, 8)
    serve(full=train)
    assert sizes(read("some/thing")[0]) == (29, 3, 8)
    serve(a=train, b=train.select(range(8)), c=train.select(range(4)))
    with pytest.raises(ValueError, match="must have a split train, got a, b, c: --split TRAIN,TEST names"):
        load("some/thing")
    data, warning = read("some/thing", split="a,b")
    assert sizes(data) == (36, 4, 8) and "1 split (c)" in warning
    assert sizes(read("some/thing", split="a,c,b")[0]) == (40, 4, 8)
    with pytest.raises(ValueError, match="split must name splits of some/thing, a, b, c, got 'd'"):
        load("some/thing", split="a,d")


@bad_input
def test_a_configuration_is_passed_on_and_asked_for(hub, serve, monkeypatch):
    asked = serve(train=rows(hub, image=hub.Image, label=FOUR))
    load("some/thing", config_name="full")
    assert asked == [(("some/thing", "full"), {})]
    message = "Config name is missing.\nPlease pick one among the available configs: ['full', 'small']\nExample: x"

    def load_dataset(*arguments, **settings):
        raise ValueError(message)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"\['full', 'small'\] Example: x; --config-name chooses one$"):
        load("some/thing")


def test_a_stream_keeps_an_even_sample_of_all(hub, serve):
    """Rows lie class by class, of which the first thousand would hold one only."""
    serve(train=rows(hub, image=hub.Image, label=sorted(FOUR)), test=rows(hub, 8, image=hub.Image, label=FOUR[:8]))
    data, again = (load("some/thing", streaming=True, train_limit=12) for _ in range(2))
    assert len(data.train) == 12 and len(data.test) == 8 and len(set(data.train.labels.tolist())) == 4
    assert data.fingerprint == again.fingerprint
    assert any("of the 40 images of train are kept in memory" in said for said in data.decisions)


@bad_input
@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied", "/c"), OSError(errno.EROFS, "read-only", "/c")]
)
def test_a_cache_that_cannot_be_written_is_left_for_another(tmp_path, hub, monkeypatch, error):
    parquet(hub, tmp_path / "all.parquet")
    real = hub.load_dataset

    def load_dataset(*arguments, **settings):
        if "cache_dir" not in settings:
            raise error
        return real(*arguments, **settings)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.warns(
        UserWarning, match="cannot be written to .*: the data are cached in .*, which the next run does not"
    ):
        assert sizes(load(str(tmp_path / "all.parquet"))) == (29, 3, 8)


def test_what_save_to_disk_wrote(tmp_path, hub):
    train = rows(hub, image=hub.Image, label=FOUR)
    hub.DatasetDict(train=train, test=train.select(range(8))).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert sizes(read(tmp_path / "both")[0]) == (36, 4, 8) and sizes(read(tmp_path / "one")[0]) == (29, 3, 8)


@bad_input
@pytest.mark.parametrize("labels", [[[0], [1]] * 20, [0.5, 1.0] * 20])
def test_labels_that_are_none_are_refused(tmp_path, hub, labels):
    cells = [png(x) for x in images(40, 3, 16).transpose(0, 2, 3, 1)]
    hub.Dataset.from_dict({"image": cells, "label": labels}).to_parquet(str(tmp_path / "t.parquet"))
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"in label, one class an image, got (\[0\]|0.5) in row 0"),
    ):
        load(str(tmp_path / "t.parquet"))
