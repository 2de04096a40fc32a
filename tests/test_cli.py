"""A user's mistake is one line that says what to do, exit code 2 and no traceback; bad files do not stop a run."""

import dataclasses
import importlib
import inspect
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

import mirl.cli

COUNT = 40  # images in `photos`


def flags(options):
    return [f"--{name}={value}".replace(" ", "") for name, value in options.items() if value is not None]


@pytest.fixture
def photos(tmp_path):
    """A folder of small photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.jpg")
    return folder


@pytest.fixture
def mistake(tiny, tmp_path, monkeypatch, capfd):
    """Run `mirl pretrain` on a tiny run with changed options; return the one line of the error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **changes):
        options = tiny | {"out": str(tmp_path / "run"), "epochs": 1} | changes
        return one_line(["pretrain", *flags(options), *arguments], capfd)

    return run


def one_line(arguments, capfd):
    assert mirl.cli.main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mirl"), lines
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "nowhere/photos"}, "'nowhere/photos' does not exist"),
        ({"model": "resnet50"}, "unknown model 'resnet50'; use vit_"),
        ({"method": "dino"}, "--method dino is not allowed; give mirl or mae"),
        ({"segments": 3}, "depth 4 does not divide into 3 segments; choose 1, 2, 4 or give --taps"),
        ({"model": "vit_ti_6", "segments": 3}, "3 segments cannot be paired; choose 1 or an even number"),
        (
            {"method": "mae", "segments": 2},
            "mae has one decoder, after its last block; leave out --segments and --taps",
        ),
        ({"taps": [4, 2]}, "taps.*4, 2"),
        ({"taps": [1, 3]}, "taps .1, 3. do not end at depth 4"),
        ({"patch_size": 7}, r"patches of 7x7 do not tile an image of 32x32; choose --image_size \[35,35\]"),
        ({"mask_ratio": 1}, "--mask_ratio 1.* more than 0 and less than 1"),
        ({"mask_ratio": 0.999}, "0 of 16 patches visible; choose 0.063 to 0.937"),
        ({"mask_ratio": "nan"}, "--mask_ratio nan is not allowed"),
        ({"base_lr": "nan"}, "--base_lr nan is not allowed"),
        ({"base_lr": "inf"}, "--base_lr inf is not allowed"),
        ({"batch_size": 200}, "--batch_size 200 is more than the 98 training images; give at most 98"),
        ({"batch_size": 0}, "--batch_size 0 is not allowed; give 1 or more"),
        ({"epochs": "many"}, "--epochs many is not allowed; give a whole number; see mirl pretrain --help"),
        ({"epochs": 0}, "--epochs 0 is not allowed; give 1 or more"),
        ({"image_size": "[1,2,3]"}, r"--image_size \[1, 2, 3\] .* a whole number or \[height,width\]"),
        ({"image_size": 0}, "must be positive"),
        ({"patch_size": 0}, "must be positive"),
        ({"channels": 4}, "shapes are RGB"),
        ({"decoder_width": 30}, "--decoder_width 30"),
        ({"data": "shapes:1"}, "1 image is too few"),
        ({"data": "shapes:none"}, "no valid count"),
        ({"devices": 0}, "--devices 0"),
        ({"devices": "gpu"}, "--devices gpu"),
        ({"bogus": 1}, "--bogus.*see mirl pretrain --help"),
        ({"epoch": 3}, "--epoch"),
        ({"config": "missing.yaml"}, "missing.yaml"),
        ({"seed": -1}, r"--seed -1 is not allowed; give 0 to 2\^63 - 1"),
        ({"weight_decay": "inf"}, "--weight_decay inf is not allowed"),
        ({"precision": "16"}, "--precision 16 needs a GPU"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path, options, message):
    assert re.search(message, mistake(**options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("epochs: [1", "config"),
        ("bogus: 1", "'bogus' is not accepted"),
        ("epochs: many", "--epochs many is not allowed"),
        ("- 1", "config"),
        ("data: !!python/object/apply:os.system ['touch ran']", "python/object/apply"),
        (b"\xff\xfe\x00\x01", "utf-8"),
    ],
    ids=str,
)
def test_a_bad_config_is_one_line_and_runs_no_code(tmp_path, monkeypatch, capfd, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in one_line(["pretrain", "--config", str(path)], capfd)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_flag_overrides_the_config(tiny, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny | {"epochs": 3}))
    run = tmp_path / "run"
    assert mirl.cli.main(["pretrain", f"--config={config}", "--epochs", "1", "--out", str(run)]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 1
    assert "shapes:106: 98 images to train on, 8 held out\n" in capfd.readouterr().out


@pytest.fixture
def new_command(tmp_path, monkeypatch):
    """Make a command of options; what it was called with is in the list that is returned."""

    def make(name, options):
        module = f"module_of_{name}"
        (tmp_path / f"{module}.py").write_text(
            f"from dataclasses import asdict, dataclass\n@dataclass\nclass Options:\n    {options}\n"
            "calls = []\ndef command(**options):\n    calls.append(asdict(Options(**options)))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(mirl.cli.COMMANDS, name, (f"{module}:command", f"{module}:Options", "for this test"))
        return importlib.import_module(module).calls

    return make


@pytest.fixture
def lists(new_command):
    """A command with lists among its options."""
    return new_command(
        "lists",
        "runs: list[str]; images: list[str] | None = None; block: list[float] | None = None; "
        "k: list[int] | int = 1; resume: bool = False; seed: int = 0",
    )


@pytest.mark.parametrize(
    "line, expected",
    [
        ("a b", {"runs": ["a", "b"]}),
        ("a", {"runs": ["a"]}),
        ("--seed -3 a --resume b", {"runs": ["a", "b"], "seed": -3, "resume": True}),
        ("a --resume false --images x.jpg y,z.jpg [1].png", {"runs": ["a"], "images": ["x.jpg", "y,z.jpg", "[1].png"]}),
        ("a --images=x.jpg", {"runs": ["a"], "images": ["x.jpg"]}),
        ('a --images ["x.jpg"]', {"runs": ["a"], "images": ["x.jpg"]}),
        ("a --images 1 null", {"runs": ["a"], "images": ["1", "null"]}),
        ("a --block 0 0.25 1 1", {"runs": ["a"], "block": [0, 0.25, 1, 1]}),
        ("a --block [0,0.25,1,1]", {"runs": ["a"], "block": [0, 0.25, 1, 1]}),
        ("a --k 5", {"runs": ["a"], "k": 5}),
        ("a --k 5 7", {"runs": ["a"], "k": [5, 7]}),
        ("a --k [5,7]", {"runs": ["a"], "k": [5, 7]}),
    ],
)
def test_several_values_follow_a_flag_or_stand_alone(lists, line, expected):
    assert mirl.cli.main(["lists", *line.split()]) == 0
    nothing = {"images": None, "block": None, "k": 1, "resume": False, "seed": 0}
    assert lists == [nothing | expected]


@pytest.mark.parametrize(
    "line, message",
    [("", "runs"), ("a --block x", "--block"), ("a --k", "--k"), ("a --bogus", "--bogus"), ("a --seed", "--seed")],
)
def test_a_mistake_in_a_list_is_one_line(lists, capfd, line, message):
    assert message in one_line(["lists", *line.split()], capfd)
    assert lists == []


@pytest.fixture
def optional_run(new_command):
    """A command with a run that it can do without."""
    return new_command("optional", "run: str | None = None; predict: str | None = None")


@pytest.mark.parametrize(
    "line, expected",
    [("", (None, None)), ("a", ("a", None)), ("a --predict b", ("a", "b")), ("--predict b a", ("a", "b"))],
)
def test_an_optional_run_needs_no_flag(optional_run, line, expected):
    assert mirl.cli.main(["optional", *line.split()]) == 0
    assert optional_run == [dict(zip(("run", "predict"), expected, strict=True))]


@pytest.mark.parametrize(
    "line, shown", [("a --predict 1.jpg 2.jpg", "2 .*: a, 2.jpg;"), ("a b c d", "4 .*: a, b, ...;")]
)
def test_a_second_run_is_one_line(optional_run, capfd, line, shown):
    """Else the last photo of a pattern that the shell expanded would take the run's place."""
    message = one_line(["optional", *line.split()], capfd)
    assert re.search(f"one run can be given, but {shown} .*give their folder or quote the pattern", message)
    assert optional_run == []


@pytest.mark.parametrize("name", mirl.cli.COMMANDS)
def test_a_commands_parameters_are_options_with_the_same_defaults(name):
    function, options = map(mirl.cli._found, mirl.cli.COMMANDS[name][:2])
    defaults = {
        field.name: inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(options)
    }
    parameters = inspect.signature(function).parameters.values()
    own = {each.name: each.default for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
    assert own.items() <= defaults.items()
    assert own == defaults or len(own) < len(parameters)  # what has no parameter of its own is in **options


def test_unknown_commands_are_one_line_that_lists_the_commands(capfd):
    assert "unknown command 'pretain'; choose one of: pretrain" in one_line(["pretain"], capfd)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["pretrain", "--help"]], ids=str)
def test_help_is_not_an_error(arguments, capfd):
    try:
        assert mirl.cli.main(arguments) == 0
    except SystemExit as leave:
        assert leave.code == 0
    output, errors = capfd.readouterr()
    assert output and not errors


@pytest.mark.parametrize(
    "arguments, unbuffered",  # the first line fails, or, if all is written in one piece, the end
    [(["--help"], "1"), (["--help"], ""), (["info", "--help"], "")],
)
def test_output_that_nobody_reads_is_no_error(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "mirl.cli", *arguments], stdout=writer, stderr=subprocess.PIPE, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_an_existing_run_is_kept_and_the_error_names_the_ways_on(mistake, tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").touch()
    (run / "config.yaml").write_text(config := yaml.safe_dump(tiny | {"method": "mirl", "epochs": 1}))
    assert re.search("holds a run; add --resume to go on, --overwrite to start again, or another --out", mistake())
    assert "choose one" in mistake("--resume", "--overwrite")
    assert (run / "config.yaml").read_text() == config


@pytest.mark.parametrize("name", ["letters.txt", "pictures/me.jpg", "log.txt/x", "config.yaml", "checkpoints/x.pt"])
def test_overwrite_of_another_folder_is_refused_and_deletes_nothing(mistake, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("dear")
    assert re.search("not empty and not a run folder|Is a directory", message := mistake("--overwrite"))
    assert message.endswith("choose another --out")
    assert path.read_text() == "dear"


def test_a_run_that_never_began_may_be_started_again(mistake, tiny, tmp_path):
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / "log.txt").write_text("of a run that was stopped at once\n")
    run = mirl.pretrain(**tiny | {"out": str(tmp_path / "run"), "epochs": 1})
    assert (run / "encoder" / "model.safetensors").exists()


def test_an_out_that_cannot_be_written_is_one_line(mistake, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write the run folder" in mistake(out=str(tmp_path / "file"))
    assert "cannot write the run folder" in mistake(out=str(tmp_path / "file" / "run"))
    assert "cannot write the run folder" in mistake(out="/proc/run")


def test_folders_without_usable_images_are_one_line(mistake, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no images, but 0 other files" in mistake(data=str(empty))
    (empty / "notes.txt").write_text("x")
    assert "has no images, but 1 other file" in mistake(data=str(empty))
    for index in range(5):
        (empty / f"{index}.jpg").write_bytes(b"")
    message = mistake(data=str(empty))
    assert re.search("none of the images looked at can be read, e.g. .*4.jpg is empty", message)


def damage(folder):
    """Put unusable files among the photos; return their names."""
    whole = (folder / "00.jpg").read_bytes()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bad = {
        "empty.jpg": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"dear grandmother",
        "bomb.png": b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""),
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    return [*bad, "tiny.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_skipped_named_once_and_counted(tiny, photos, tmp_path, capfd, workers):
    names = damage(photos)
    options = tiny | {"data": photos, "out": tmp_path / "run", "batch_size": 11, "epochs": 3, "max_bad": 0.5}
    assert mirl.cli.main(["pretrain", *flags(options | {"workers": workers})]) == 0
    output, errors = capfd.readouterr()
    log = (tmp_path / "run" / "log.txt").read_text()
    for name in names:
        assert len(re.findall(rf"  ?skipped \S*/{name}: |\d skipped \S*/{name}: ", log)) == 1, f"{name}\n{log}"
    assert "skipped 5 unusable files so far" in output and not errors


def test_more_bad_files_than_the_budget_stop_the_run(mistake, photos):
    damage(photos)
    message = mistake(data=str(photos), batch_size=37, max_bad=0.01)
    assert re.search("of 45 files cannot be used, more than --max_bad 0.01; mend the files listed in ", message)


def test_a_switch_whose_default_is_chosen_needs_no_value():
    parser = mirl.cli.build_parser("pretrain")
    chosen = [parser.parse_args(mirl.cli._spell_out(parser, a)).compile for a in ([], ["--compile", "--resume"])]
    assert chosen == [None, True]
    assert parser.parse_args(mirl.cli._spell_out(parser, ["--compile", "false"])).compile is False
