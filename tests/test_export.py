"""Students that leave: loaded in one line, predicting, evaluated, exported, and used where no eekd is."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eekd
from eekd import evaluate as evaluate_command
from eekd import predict as predict_command
from eekd.data import load
from eekd.export import Student, export, load_student
from eekd.export import __main__ as export_command
from eekd.export.card import card
from eekd.export.evaluation import batches, data_of, evaluate, teacher_of
from eekd.export.gain import gain
from eekd.export.latency import latencies
from eekd.io.files import read_json, write_json_atomic
from eekd.train import __main__ as cli
from eekd.train import train

from eekd.train.config import Config, Student as Phase, Teacher  # isort: skip

CONFIG = Config(
    data="digits", students=("ce", "attention"), device="cpu",
    teacher=Teacher(model="resnet8_w4", epochs=2, snapshots=2, lr=0.1, batch_size=64),
    student=Phase(model="resnet8_w4", epochs=1, lr=0.1, batch_size=64),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(CONFIG, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def folder(run) -> Path:
    return run / "students" / "attention"


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def picture(pixels: torch.Tensor, path: Path) -> Path:
    """One image (1, 8, 8) uint8 as a file."""
    Image.fromarray(pixels[0].numpy()).save(path)
    return path


def test_a_student_is_loaded_in_three_lines_and_sees_what_it_was_trained_on(folder, digits, tmp_path):
    student = eekd.load_student(folder)
    assert isinstance(student, Student) and student.classes == digits.classes and not student.training
    pixels, path = digits.test.images[:3], tmp_path / "image.png"
    batch = next(iter(digits_loader(digits)))
    assert torch.equal(student.normalize(pixels), batch.images[:3])  # to the bit as in training
    x = student.preprocess(picture(pixels[0], path))
    assert torch.equal(x, batch.images[:1])
    rows = student.predict([path, path], top=3)
    assert len(rows) == 2 and len(rows[0]) == 3 and rows[0][0][0] in digits.classes
    logits = student(x)
    assert logits.shape == (1, 10) and rows[0][0][0] == digits.classes[logits.argmax()]
    assert student.predict(path)[0][1] == pytest.approx(logits.softmax(-1).max().item())


def digits_loader(digits):
    from eekd.data import Loader

    return Loader(digits.test, batch_size=16, train=False)


def test_an_image_may_come_as_any_of_what_people_hold(folder, digits, tmp_path):
    student, pixels = load_student(folder), digits.test.images[0]
    path = picture(pixels, tmp_path / "image.png")
    wanted = student.preprocess(str(path))
    array = pixels[0].numpy()
    colour = np.repeat(array[:, :, None], 3, 2)
    for image in (path, path.read_bytes(), Image.open(path), array, array[:, :, None], colour,
                  Image.fromarray(colour).convert("CMYK").convert("RGB")):  # fmt: skip
        torch.testing.assert_close(student.preprocess(image), wanted, rtol=0, atol=0.02)
    assert student.preprocess([]).shape == (0, 1, 8, 8)
    assert student.preprocess(np.zeros((30, 20), np.uint8)).shape == (1, 1, 8, 8)


@pytest.mark.bad_input
@pytest.mark.parametrize(("image", "error", "said"), [
    ("missing.png", FileNotFoundError, "missing.png is missing"),
    (b"no image", ValueError, "damaged or no image"),
    (np.zeros((8, 8)), TypeError, "array .* of uint8, got float64"),
    (torch.zeros(1, 8, 8), TypeError, "got a tensor"),
    (7, TypeError, "got int"),
])  # fmt: skip
def test_what_is_no_image_is_one_sentence(folder, image, error, said):
    with pytest.raises(error, match=said):
        load_student(folder).preprocess(image)


@pytest.mark.bad_input
def test_a_folder_that_is_no_student(run, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be the folder of a student"):
        load_student(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got attention, ce: name one, as .*students/attention"):
        load_student(run)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_student(tmp_path)
    record = read_json(folder / "student.json")
    old = tmp_path / "old"
    del record["classes"]
    write_json_atomic(old / "student.json", record)
    with pytest.raises(ValueError, match="before eekd saved the classes of students"):
        load_student(old)


def test_every_flipped_byte_of_an_exported_student_is_found(folder, tmp_path):
    out = load_student(folder).save(tmp_path / "out")
    again = load_student(out)
    assert again.facts["classes"] == [*"0123456789"]
    for name in ("config.json", "model.safetensors"):
        data = (out / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 40)):
            (out / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ValueError, match=name):
                load_student(out)
        (out / name).write_bytes(data)
    with pytest.raises(FileExistsError, match="must be new or empty"):
        again.save(out)


@pytest.mark.bad_input
@pytest.mark.parametrize("change", [
    {"preprocessing": {"image_size": 8, "channels": 1, "zoom": 1.0, "mean": [0.5], "std": [0.0]}},
    {"preprocessing": {"image_size": 8, "channels": 2, "zoom": 1.0, "mean": [0.5, 0.5], "std": [1.0, 1.0]}},
    {"preprocessing": {"image_size": 10**9, "channels": 1, "zoom": 1.0, "mean": [0.5], "std": [1.0]}},
    {"preprocessing": {}}, {"classes": ["a", "b"]}, {"format": 2}, {"sha256": None}, {"model": "resnet20"},
])  # fmt: skip
def test_a_config_that_cannot_be(folder, tmp_path, change):
    out = load_student(folder).save(tmp_path / "out")
    write_json_atomic(out / "config.json", {**read_json(out / "config.json"), **change})
    with pytest.raises(ValueError, match="config.json"):
        load_student(out)


def test_an_exported_folder_runs_no_python_file(folder, tmp_path):
    out = load_student(folder).save(tmp_path / "out")
    (tmp_path / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    facts = read_json(out / "config.json")
    spec = {**facts["model"], "name": f"{tmp_path / 'model.py'}:net"}
    write_json_atomic(out / "config.json", {**facts, "model": spec})
    with pytest.raises(ValueError, match="factory must be given, .* got None"):
        load_student(out)
    assert not (tmp_path / "ran").exists()
    factory = lambda: eekd.models.build(**facts["model"])  # noqa: E731
    assert load_student(out, factory).classes == tuple("0123456789")


def test_the_card_says_what_was_measured_and_obeys_no_name(folder):
    student = load_student(folder)
    text = card(student.facts)
    accuracy = read_json(folder / "student.json")["test"]["accuracy"]
    assert f"{accuracy:.2%}" in text and "resnet8\\_w4, a student of attention" in text
    hostile = {**student.facts, "classes": ["<script>", "](x)", "a|b", *"3456789"]}
    assert "<script>" not in card(hostile).partition("## Where")[0] and "\\|b" in card(hostile)


def test_the_card_names_data_without_the_folders_above_them(run, folder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/environment.json"
    record = read_json(path)
    for name, public in (("/home/me/secret/cats", "cats"), ("owner/cats", "owner/cats"), ("digits", "digits")):
        write_json_atomic(path, record | {"data": record["data"] | {"name": name}})
        text = card(load_student(tmp_path / "run/students/attention").facts)
        assert f"Trained on `{public}`" in text and "secret" not in text


def test_a_run_of_one_student_is_measured_against_its_teacher(run, tmp_path):
    alone = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("ce", "last")))
    assert [path.name for path in (alone / "students").iterdir()] == ["attention"]
    assert teacher_of(alone) is not None


def test_evaluation_agrees_with_the_run(folder, digits):
    record = read_json(folder / "student.json")
    found = evaluate(load_student(folder), digits, teacher=teacher_of(folder), seconds=0.05)
    assert found["student"]["accuracy"] == pytest.approx(record["test"]["accuracy"])
    assert found["student"]["nll"] == pytest.approx(record["test"]["loss"], rel=1e-3)
    members = read_json(folder.parent.parent / "teacher" / "snapshots.json")["test"]["members"]
    for key in ("accuracy", "nll", "ece"):
        assert found["teacher"][key] == pytest.approx(members[1][key], rel=1e-3, abs=1e-3)
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum() == found["images"] == len(digits.test)
    assert confusion.diagonal().sum().item() / found["images"] == pytest.approx(found["student"]["accuracy"])
    assert sum(row["images"] for row in found["per_class"].values()) == found["images"]
    assert 0 < found["student"]["latency"]["p50"] <= found["student"]["latency"]["p95"]


def test_the_runs_own_data_are_read_by_all_of_its_settings(folder, monkeypatch):
    """By fewer, evaluation would be of other images, without a word."""
    asked = {}
    monkeypatch.setattr("eekd.export.evaluation.load", lambda name, root, **options: asked.update(options))
    data_of(load_student(folder), folder)
    assert asked == CONFIG.reading() and {"channels", "classes", "split"} <= asked.keys()


def test_other_data_are_matched_by_name_of_class(folder, digits, tmp_path):
    student = load_student(folder)
    for name, images in (("seven", digits.test.images[digits.test.labels == 7]),):
        for split in ("train", "val", "test"):
            for number, pixels in zip((0, 1), images, strict=False):
                for label in ("7", "3"):
                    (tmp_path / "data" / split / label).mkdir(parents=True, exist_ok=True)
                    picture(pixels, tmp_path / "data" / split / label / f"{name}-{number}.png")
    other = load(str(tmp_path / "data"), image_size=8)
    labels = torch.cat([y for _, y in batches(student, other, "test")])
    assert sorted(labels.tolist()) == [3, 3, 7, 7]
    (tmp_path / "data/train/7").rename(tmp_path / "data/train/dog")
    (tmp_path / "data/val/7").rename(tmp_path / "data/val/dog")
    (tmp_path / "data/test/7").rename(tmp_path / "data/test/dog")
    with pytest.raises(ValueError, match="must have classes that the student knows .*, got 'dog'"):
        next(batches(student, load(str(tmp_path / "data"), image_size=8), "test"))


def test_latencies_take_turns():
    order = []
    found = latencies({"a": lambda x: order.append("a"), "b": lambda x: order.append("b")}, torch.ones(1), seconds=0)
    assert order[6:10] == ["a", "b", "a", "b"] and found["a"]["calls"] == found["b"]["calls"] == 10


def test_the_gain_is_one_line(run, capsys):
    line = gain(run)
    rows = {row["name"]: row for row in read_json(run / "summary.json")["rows"]}
    points = 100 * abs(rows["attention"]["test_accuracy"] - rows["teacher"]["test_accuracy"])
    assert line.startswith("The student taught by attention has 100% of") and f"{points:.2f} points" in line
    assert "\n" not in line


def test_the_gain_is_the_last_line_and_cannot_fail_a_run(run, capsys, monkeypatch):
    assert cli.main(["--resume", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("The student taught by attention has 100% of")

    def fails(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("eekd.export.gain.latencies", fails)
    assert cli.main(["--resume", str(run)]) == 0
    told = capsys.readouterr()
    assert "the student's speed was not measured: no memory" in told.err and "everything is in" in told.out


def test_the_gain_of_large_images_takes_no_minutes(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    path, asked = tmp_path / "run/students/attention/student.json", []
    record = read_json(path)
    record["spec"]["image_size"] = record["teacher"]["spec"]["image_size"] = 224
    write_json_atomic(path, record)

    def timed(networks, images, seconds, least):
        asked.append((len(images), least))
        return {"student": {"p50": 1.0}, "teacher": {"p50": 3.0}}

    monkeypatch.setattr("eekd.export.gain.latencies", timed)
    assert "3.0 times its speed on this CPU" in gain(tmp_path / "run") and asked == [(2, 3)]


def test_predict_names_files_and_folders(folder, digits, tmp_path, capsys):
    for number in range(3):
        (tmp_path / "some" / "deep").mkdir(parents=True, exist_ok=True)
        picture(digits.test.images[number], tmp_path / "some" / "deep" / f"{number}.png")
    (tmp_path / "some" / ".hidden.png").write_text("")
    (tmp_path / "some" / "notes.txt").write_text("")
    student = load_student(folder)
    names = [student.predict(tmp_path / "some" / "deep" / f"{number}.png")[0][0] for number in range(3)]

    def told(*flags, code=0):
        assert predict_command.main([str(folder), str(tmp_path / "some"), *flags]) == code
        return capsys.readouterr()

    assert [line.split()[1] for line in told().out.splitlines()] == names
    rows = [json.loads(line) for line in told("--format", "json", "--top", "2").out.splitlines()]
    assert [row["predictions"][0]["class"] for row in rows] == names and len(rows[0]["predictions"]) == 2
    rows = list(csv.DictReader(io.StringIO(told("--format", "csv").out)))
    assert [row["class_1"] for row in rows] == names and 0 < float(rows[0]["probability_1"]) <= 1
    (tmp_path / "some" / "bad.png").write_text("no image")
    told_bad = told(code=1)
    assert [line.split()[1] for line in told_bad.out.splitlines()] == names
    assert "bad.png is damaged or no image" in told_bad.err and told_bad.err.count("\n") == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(("words", "said"), [
    (["STUDENT", "empty"], "images must be files or folders of images"),
    (["empty", "x.png"], "config.json is missing"),
    (["STUDENT", "x.png", "--top", "0"], "top must be at least 1"),
    (["STUDENT", "x.png", "--device", "gpu"], "device must be one that torch finds here, got 'gpu'"),
])  # fmt: skip
def test_predict_says_what_is_wrong(folder, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert predict_command.main([str(folder) if word == "STUDENT" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and told.count("\n") == 1


def test_evaluate_prints_and_writes_what_it_found(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert evaluate_command.main([str(folder), "--json", str(out)]) == 0
    told, record = capsys.readouterr().out, read_json(out)
    assert f"{record['found']['student']['accuracy']:.2%}" in told and "teacher" in told and "taken for" in told
    assert record["environment"]["torch"] == torch.__version__ and len(record["found"]["confusion"]) == 10
    exported = load_student(folder).save(tmp_path / "out")
    assert evaluate_command.main([str(exported)]) == 2
    assert "data must be given" in capsys.readouterr().err
    assert evaluate_command.main([str(exported), "--data", "digits"]) == 0
    assert f"{record['found']['student']['accuracy']:.2%}" in capsys.readouterr().out


WITHOUT_EEKD = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("eekd", "timm"):
            raise ImportError("this environment has no " + name)
sys.meta_path.insert(0, Nothing())
import torch
images, logits = torch.load(sys.argv[1], weights_only=True)
torch.testing.assert_close(torch.export.load(sys.argv[2]).module()(images), logits, rtol=1e-3, atol=1e-4)
print("same")
"""


@pytest.mark.full
@pytest.mark.parametrize("isa", [None, "AVX2"])
def test_an_exported_program_needs_no_eekd(folder, digits, tmp_path, isa):
    """Neither do the students whose convolutions are guarded, on a processor without AVX-512."""
    command = [sys.executable, "-m", "eekd", "export", str(folder), "--out", str(tmp_path / "out"), "--to",
               "torch-export"]  # fmt: skip
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "validation images of digits" in done.stdout, done.stderr
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        assert not any(name.endswith((".py", ".pkl")) for name in archive.namelist())
    student = load_student(tmp_path / "out")
    images = student.normalize(digits.test.images[:5])
    with torch.inference_mode():
        torch.save((images.clone(), student(images).clone()), tmp_path / "wanted.pt")
    code = [sys.executable, "-c", WITHOUT_EEKD, str(tmp_path / "wanted.pt"), str(tmp_path / "out" / "model.pt2")]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "same\n", done.stderr


def test_the_card_says_how_the_programs_were_checked(folder, digits, tmp_path):
    student = load_student(folder)
    images = student.normalize(digits.val.images)
    found = export(student, tmp_path / "out", ["torch-export"], images=images, labels=digits.val.labels, what="a | b")
    assert found["images"] == len(digits.val) and set(found["files"]) == {"model.safetensors", "model.pt2"}
    text, file = (tmp_path / "out/README.md").read_text(), found["files"]["model.pt2"]
    assert f"| `model.pt2` | {file['bytes'] / 1e6:.3g} | {file['difference']:.2g} | {file['accuracy']:.2%} |" in text
    assert "on 144 a \\| b:" in text and "model.onnx" not in text
    again = load_student(tmp_path / "out")
    assert again.facts["exported"] == found
    assert "model.pt2" not in (again.save(tmp_path / "copy") / "README.md").read_text()  # which is not there
    stored = torch.export.load(tmp_path / "out/model.pt2")
    assert not any(x.any() for x in stored.example_inputs[0])  # none of the images
    assert file["bytes"] < found["files"]["model.safetensors"]["bytes"] + 200_000
    program = stored.module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(images[:count]), student(images[:count]), rtol=1e-3, atol=1e-4)


def test_a_program_that_differs_is_not_left_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eekd.export.formats._torch_export", lambda student, images, path: (
        path.write_text("") * 0 + torch.zeros(len(images), 10)))  # fmt: skip
    with pytest.raises(RuntimeError, match="must give the network's logits, got one "):
        export(load_student(folder), tmp_path / "out", ["torch-export"])
    assert not (tmp_path / "out").exists()  # so that the command can be given again


@pytest.mark.full
def test_onnx_gives_the_same_logits_and_int8_says_what_it_costs(folder, digits, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    assert export_command.main([str(folder), "--out", str(out), "--to", "onnx", "--int8"]) == 0
    told = capsys.readouterr().out
    assert "model.int8.onnx: accuracy" in told and "points against fp32" in told
    assert "for convolutions keep their fp32 weights" in told  # most weights are theirs
    assert "| `model.int8.onnx` |" in (out / "README.md").read_text()
    student = load_student(out)
    images = student.normalize(digits.test.images[:7])
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (logits,) = session.run(["logits"], {"images": images.numpy()})  # another batch than it was exported with
    torch.testing.assert_close(torch.from_numpy(logits), student(images), rtol=1e-3, atol=1e-4)
    assert (out / "model.int8.onnx").stat().st_size < (out / "model.onnx").stat().st_size


@pytest.mark.bad_input
def test_without_the_extra_one_sentence_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_command.main([str(folder), "--out", str(tmp_path / "out"), "--to", "onnx"]) == 2
    assert "pip install 'eekd[export]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export_command.main([str(folder), "--out", str(tmp_path / "out"), "--int8"]) == 2
    assert "to must have onnx where int8 is asked for, got safetensors" in capsys.readouterr().err


def test_the_hub_is_reached_through_its_own_mixin(folder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    sent = {}

    def upload(self, *, repo_id, folder_path, **options):
        sent.update(repo=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()))
        Path(folder_path).rename(tmp_path / "uploaded")
        Path(folder_path).mkdir()

    monkeypatch.setattr(
        hub.HfApi, "create_repo", lambda self, repo_id, **options: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    student = load_student(folder)
    student.push_to_hub("me/student")
    assert sent == {"repo": "me/student", "files": ["README.md", "config.json", "model.safetensors"]}
    again = Student.from_pretrained(tmp_path / "uploaded")
    x = torch.randn(2, 1, 8, 8)
    assert again.classes == student.classes and torch.equal(again(x), student(x))
