"""Read-outs agree with scikit-learn, with arithmetic by hand, and with what they write down."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from tiny_classes import write_encoder
from tiny_runs import assert_one_line

import mirl
from mirl.cli import main
from mirl.data.shapes import Shapes
from mirl.errors import UserError
from mirl.tasks import knn
from mirl.tasks.accuracy import Accuracy, accuracy
from mirl.tasks.knn import vote
from mirl.tasks.probe import fit_linear

SHAPES = "shapes:80:32"


def test_accuracy_by_hand():
    ranks = np.array([  # the place of the right class among six, for eight images
        0, 0, 1, 5, 4, 0, 0, 3
    ])  # fmt: skip
    labels = np.array([0, 1, 2, 3, 4, 0, 0, 2])
    scores = np.zeros((8, 6))
    for i, (label, rank) in enumerate(zip(labels, ranks, strict=True)):
        order = [c for c in range(6) if c != label]
        order.insert(rank, label)
        scores[i, order] = np.arange(6, 0, -1) / 10
    result = accuracy(scores, labels, "abcdef")
    assert (result.top1, result.top5, result.images) == (4 / 8, 7 / 8, 8)
    assert result.per_class == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.0}  # f has no image
    assert str(result).startswith("top-1 50.00% (95 % interval 21.52% to 78.48%), top-5 87.50%")


@pytest.mark.parametrize("hits", [0, 1, 13, 40])
def test_wilsons_interval_by_hand(hits):
    count, z = 40, 1.959963984540054
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scores = np.stack([np.arange(count) < hits, np.arange(count) >= hits], axis=1).astype(np.float32)
    result = accuracy(scores, np.zeros(count, np.int64), ["a", "b"])
    assert result.top1 == share
    assert result.interval == pytest.approx((centre - half, centre + half), abs=1e-9)


@pytest.mark.parametrize(("classes", "top5"), [(5, None), (6, 1.0)])
def test_five_classes_or_fewer_have_no_top5(classes, top5):
    assert accuracy(np.eye(classes), np.arange(classes), "abcdef"[:classes]).top5 == top5


def clusters(count, width=12, classes=7, seed=0):
    """Return features around class centres so near each other that neighbours disagree, and labels."""
    centres = np.random.default_rng(9).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=count)
    features = centres[labels] + 1.5 * generator.normal(size=(count, width))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("chunks", [None, (64, 16), (100, 300), (1, 1)], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.004])
def test_votes_are_those_of_scikit_learn(monkeypatch, chunks, temperature):
    if chunks:  # several chunks of queries and of training features
        monkeypatch.setattr(knn, "CHUNK", chunks[0])
        monkeypatch.setattr(knn, "TRAIN_CHUNK", chunks[1])
    (train, labels), (test, truth) = clusters(230), clusters(57, seed=1)
    votes = vote(train, labels, test, 7, ks=[20, 1, 5], temperature=temperature)
    votes |= vote(train, labels, test, 7, ks=[1000], temperature=temperature)  # apart: k training images are one chunk
    assert list(votes) == ["k=1", "k=5", "k=20", "k=230"]
    for name, actual in votes.items():
        reference = KNeighborsClassifier(
            int(name[2:]), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
        ).fit(train.double(), labels)
        expected = torch.from_numpy(reference.predict_proba(test.double()))
        actual = actual.double() / actual.sum(dim=1, keepdim=True)
        torch.testing.assert_close(actual, expected, atol=1e-3 if temperature < 0.01 else 1e-5, rtol=0)
        assert torch.equal(actual.argmax(dim=1), expected.argmax(dim=1))
        assert 0.2 < (actual.argmax(dim=1) == truth).double().mean() < 0.99
    alike = {tuple(votes[name].argmax(dim=1).tolist()) for name in votes}
    assert temperature < 0.01 or len(alike) > 1


def test_k_beyond_the_training_images_is_reported_once_as_all_of_them():
    (train, labels), (test, _) = clusters(8), clusters(3, seed=1)
    assert list(vote(train, labels, test, 7, ks=[10, 20, 8], temperature=0.07)) == ["k=8"]


def problem(seed=0):
    features, labels = make_classification(
        8000, 40, n_informative=12, n_redundant=8, n_classes=10, n_clusters_per_class=1, class_sep=1.3,
        random_state=seed,
    )  # fmt: skip
    features = features * np.geomspace(0.01, 100, 40) + np.linspace(-5, 5, 40)  # no two features alike
    features, labels = torch.from_numpy(features).float(), torch.from_numpy(labels)
    return features[:4000], labels[:4000], features[4000:], labels[4000:]


def fit(train, labels, test, *, epochs=50, seed=0):
    return fit_linear(train, labels, test, 10, epochs=epochs, batch_size=256, seed=seed)["linear"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_probe_is_as_good_as_logistic_regression(seed):
    train, labels, test, truth = problem(seed)
    scaler = StandardScaler().fit(train)
    reference = LogisticRegression(max_iter=1000).fit(scaler.transform(train), labels)
    expected = reference.score(scaler.transform(test), truth)
    actual = (fit(train, labels, test).argmax(dim=1) == truth).float().mean().item()
    assert 0.6 < expected < 0.85
    assert actual == pytest.approx(expected, abs=0.01)


def test_test_images_have_no_part_in_the_probe(capfd):
    train, labels, test, _ = problem()
    train, labels, test = train[:600], labels[:600], test[:50]
    torch.manual_seed(1)
    alone = fit(train, labels, test, epochs=3)
    torch.manual_seed(2)
    among = fit(train, labels, torch.cat([test, 1e3 * test, torch.zeros(20, 40)]), epochs=3)
    torch.testing.assert_close(among[:50], alone, atol=1e-4, rtol=1e-4)
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2 and said[0] == said[1] and "best of the sweep on 60 training images" in said[0]
    assert not torch.allclose(fit(train, labels, test, epochs=3, seed=1), alone)


def test_the_winner_of_the_sweep_is_right_on_images_it_was_not_fitted_on(capfd):
    """Noise can be learned by heart: the share that the probe reports must be that of guessing."""
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(400, 600, generator=generator), torch.randint(2, (400,), generator=generator)
    assert LogisticRegression(max_iter=1000).fit(train, labels).score(train, labels) > 0.95
    fit_linear(train, labels, train, 2, epochs=30, batch_size=64, seed=0)
    share = float(capfd.readouterr().out.rpartition("(")[2].rstrip("%)\n"))
    assert 20 < share < 80


@pytest.mark.parametrize("count", [2, 3, 513])
def test_the_probe_takes_few_images(count):
    train, labels, test, _ = problem()
    assert torch.isfinite(fit(train[:count], labels[:count], test[:5], epochs=2)).all()


@pytest.fixture
def colours(tmp_path):
    """Two classes of images of two colours, three of which cannot be read."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name, strong in (("red", 0), ("blue", 2)):
            path = tmp_path / "colours" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 130, (20, 24, 3), dtype=np.uint8)
                pixels[..., strong] += 120
                Image.fromarray(pixels).save(path / f"{index:02}.png")
    for broken in ("train/red/00.png", "train/blue/05.png", "val/blue/00.png"):
        (tmp_path / "colours" / broken).write_bytes(b"no image")
    return tmp_path / "colours"


@pytest.mark.parametrize("weights", ["pixels", "run"])
def test_images_keep_their_classes_from_the_folder_to_the_score(finished, colours, tmp_path, weights):
    weights = str(finished) if weights == "run" else weights
    options = {"weights": weights, "data": colours, "workers": 0, "batch_size": 4}
    for name, found in (
        ("linear", mirl.probe(**options, epochs=30, probe_batch=4, out=tmp_path / "probe.json")),
        ("k=3", mirl.knn(**options, k=3, out=tmp_path / "knn.json")),
    ):
        (result,) = found.values()
        assert result[name].per_class == {"blue": 1.0, "red": 1.0}
        assert result[name].images == 9 and result[name].top5 is None


def test_json_says_what_was_found_and_how(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    found = mirl.knn(weights=str(run), data=SHAPES, k=[5, 20], workers=0)
    (path,) = (run / "readouts").iterdir()
    written = json.loads(path.read_text())
    assert path.name.startswith("knn_shapes-80-32") and path.suffix == ".json"
    assert (written["command"], written["fitted_on"], written["classes"]) == ("knn", 80, 10)
    assert written["options"]["k"] == [5, 20] and written["options"]["temperature"] == 0.07
    assert list(found) == [4] and list(written["blocks"]) == ["4"]
    assert list(found[4]) == list(written["blocks"]["4"]) == ["k=5", "k=20"]
    for name, result in found[4].items():
        saved = written["blocks"]["4"][name]
        assert isinstance(result, Accuracy)
        assert Accuracy(**saved | {"interval": tuple(saved["interval"])}) == result
        assert result.images == 20 and set(result.per_class) == set(Shapes.classes)
        assert result.interval[0] < result.top1 < result.interval[1] and result.top1 <= result.top5


def test_every_block_is_read_and_drawn(finished, tmp_path):
    options = {"weights": str(finished), "data": SHAPES, "workers": 0, "k": 5}
    every = mirl.knn(**options, every_block=True, out=str(tmp_path / "new" / "every.json"))
    assert list(every) == [1, 2, 3, 4]
    assert list(json.loads((tmp_path / "new" / "every.json").read_text())["blocks"]) == ["1", "2", "3", "4"]
    with Image.open(tmp_path / "new" / "every.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["every.json", "every.png"]
    for block in (2, 4):
        assert mirl.knn(**options, block=block, out=str(tmp_path / "one.json")) == {block: every[block]}
    assert not (tmp_path / "one.png").exists()


def test_commands_write_where_the_user_is_unless_a_run_is_named(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["knn", "--weights", "pixels", "--data", SHAPES, "--k=[1,10]", "--workers", "0"]) == 0
    assert main(["probe", "--weights=pixels", f"--data={SHAPES}", "--epochs=3", "--workers=0"]) == 0
    encoder = ["probe", f"--weights={finished / 'encoder'}", f"--data={SHAPES}", "--epochs=1", "--workers=0"]
    assert main([*encoder, "--every_block", "--out=deep/probe.json"]) == 0
    output, errors = capfd.readouterr()
    assert not errors and f"{SHAPES}: 80 images to fit, 20 to test, 10 classes" in output
    assert output.count("linear") == 5 and "block 4" in output and "pixels k=10" in output
    names = {path.name.split("_")[0] for path in (tmp_path / "readouts").iterdir()}
    assert names == {"knn", "probe"}
    for path in (tmp_path / "readouts").iterdir():
        (block,) = json.loads(path.read_text())["blocks"].items()
        assert block[0] == "0" and 0 <= next(iter(block[1].values()))["top1"] <= 1
    written = json.loads((tmp_path / "deep" / "probe.json").read_text())
    assert list(written["blocks"]) == ["1", "2", "3", "4"] and list(written["blocks"]["3"]) == ["linear"]
    assert (tmp_path / "deep" / "probe.png").exists()


def test_results_of_different_questions_do_not_replace_each_other(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(shutil.copytree(finished, tmp_path / "run").parent))
    for options in ({}, {"block": 2}, {"every_block": True}, {"untrained": True}, {"pool": "cls"}):
        mirl.knn(weights="~/run", data=SHAPES, k=5, workers=0, **options)
    written = [json.loads(path.read_text()) for path in (tmp_path / "run" / "readouts").glob("*.json")]
    assert sorted(len(result["blocks"]) for result in written) == [1, 1, 1, 1, 4]


def test_a_disk_that_refuses_the_picture_is_one_line(tmp_path):
    """Its place is looked at only then."""
    (tmp_path / "knn.png").mkdir()
    weights = write_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/knn.png: Is a directory; choose another --out$"):
        mirl.knn(weights=weights, data="shapes:40:16", k=5, workers=0, every_block=True, out=str(tmp_path / "knn.json"))


def test_the_default_ks_are_reported(finished, tmp_path):
    found = mirl.knn(weights=str(finished), data="shapes:150:32", workers=0, out=tmp_path / "knn.json")
    assert list(found[4]) == ["k=10", "k=20", "k=100", "k=150"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--weights is missing; give a run folder, a timm name, or `pixels`"),
        (["--weights", "nowhere"], "'nowhere' is neither a file, a folder nor the name of a timm model"),
        (["--weights", "pixels", "--data", "nowhere"], "'nowhere' does not exist"),
        (["--weights", "pixels", "--val_fraction", "1"], "--val_fraction 1.* is not allowed; give more than 0"),
        (["--weights", "pixels", "--seed", "-1"], r"--seed -1 is not allowed; give 0 to 2\^63 - 1"),
        (["--weights", "pixels", "--untrained"], "raw pixels have no blocks and no weights; leave out --block"),
        (["--weights", "run", "--block=1", "--every_block"], "--block and --every_block were both given; choose one"),
        (["--weights", "pixels", "--pool", "max"], "--pool max is not allowed; give mean or cls"),
        (["--weights", "pixels", "--data", SHAPES, "--out", "file/x.json"], "cannot write file/x.json: .*; choose"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["knn", "probe"])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capfd, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code = main([command, "--workers=0", *arguments])
    assert_one_line(code, capfd.readouterr().err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("knn", {"k": 0}, "--k 0 is not allowed; give numbers from 1 on"),
        ("knn", {"k": [5, 0]}, "--k .5, 0. is not allowed"),
        ("knn", {"k": []}, "--k .. is not allowed"),
        ("knn", {"temperature": 0}, "--temperature 0 is not allowed; give more than 0"),
        ("probe", {"epochs": 0}, "--epochs 0 is not allowed; give 1 or more"),
        ("probe", {"probe_batch": 1}, "--probe_batch 1 is not allowed; give 2 or more"),
        ("knn", {"weights": "run", "block": 5}, "--block 5 is not there: the encoder has 4 blocks"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_named(finished, tmp_path, command, options, message):
    weights = str(finished) if "weights" in options else "pixels"
    with pytest.raises(UserError, match=message):
        getattr(mirl, command)(**{"data": SHAPES, "out": tmp_path / "x.json"} | options | {"weights": weights})
    assert not list(tmp_path.iterdir())
