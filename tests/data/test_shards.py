"""Shards are read by index: webdataset's and our own, whole and damaged, from strangers too."""

import io
import os
import pickle
import tarfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

import mirl
from mirl.data import reading
from mirl.data.decode import BadImage
from mirl.data.loading import Views
from mirl.data.shards.images import ShardImages
from mirl.data.shards.names import expand, names_shards
from mirl.data.shards.tar_index import FORMAT, Index, scan
from mirl.data.sources import open_source, opened
from mirl.errors import UserError


def encoded(seed, kind="JPEG", size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, members, **options):
    """Write (name or TarInfo, bytes) of each member."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make tmp_path the current folder and the cache's, with three shards of 4 images each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "s").mkdir()
    for number in range(3):
        write_tar(
            tmp_path / "s" / f"{number:03d}.tar",
            [(f"{i:04d}.jpg", encoded(i)) for i in range(4 * number, 4 * number + 4)],
        )
    return tmp_path / "s"


def names(source):
    return [source.name_of(index) for index in range(len(source))]


def error(data, **options):
    with pytest.raises(UserError) as caught:
        open_source(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_braces_globs_and_lists_of_alternatives_name_shards(folder):
    assert expand("a{0..2}") == ["a0", "a1", "a2"]
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{x,y/z}-{1..0}") == ["x-1", "x-0", "y/z-1", "y/z-0"]
    assert expand("s/*.tar") == [f"s/00{i}.tar" for i in range(3)]
    with pytest.raises(UserError, match="1,000,000,000 shards; give at most 1,000,000"):
        expand("{0..999999999}.tar")
    with pytest.raises(UserError, match="100,000,000 shards"):
        expand("{0..9999}{0..9999}.tar")
    assert "matches no shards" in error("s/*x.tar")


def test_images_of_shards_are_those_of_files(folder):
    source = open_source("s/{000..002}.tar")
    assert isinstance(source, ShardImages) and len(source) == 12
    assert names(source) == [f"s/00{i // 4}.tar/{i:04d}.jpg" for i in range(12)]
    (folder / "file.jpg").write_bytes(encoded(7))
    files = open_source("s/*.jpg")
    assert torch.equal(source.read(7), files.read(0))
    box, size = (2, 3, 24, 32), (6, 8)
    assert torch.equal(opened(source, 7).region(box, size), opened(files, 0).region(box, size))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(11), source.read(11)) and names(copy) == names(source)


def test_images_are_read_together_as_far_as_their_shards_are_open(folder, monkeypatch):
    shares = []
    together = reading._read_together
    monkeypatch.setattr(reading, "_read_together", lambda *share: (shares.append(len(share[1])), together(*share)))
    source = open_source("s/{000..002}.tar")
    views = Views(source, np.arange(12), lambda image: image)
    keys = [(0, index) for index in (0, 1, 4, 2, 5, 6)]
    samples = views.__getitems__(keys)
    assert shares == [1, 1, 1, 1, 1, 3]  # opened and read; the next of it; the other shard; from then on together
    assert all(torch.equal(one.images[0], source.read(index)) for one, (_, index) in zip(samples, keys, strict=True))
    shares.clear()
    assert [len(sample.images) for sample in views.__getitems__(keys)] == [1] * 6 and shares == [6]
    (folder / "001.tar").write_bytes(b"")
    assert [len(sample.images) for sample in views.__getitems__(keys)] == [1, 1, 0, 1, 0, 0]


def test_many_shards_need_few_open_files(folder, monkeypatch):
    monkeypatch.setattr("mirl.data.shards.images.OPEN_FILES", 2)
    source = open_source("s/*.tar")
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for index in (0, 4, 8, 0, 4, 8):
        assert source.read(index).shape == (3, 30, 40)
    assert len(source._files) == 2
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) == open_before + 2


def test_other_members_are_left_out_and_counted(folder):
    write_tar(
        folder / "mixed.tar",
        [
            ("a/b.JPG", encoded(1)), ("a/b.json", b"{}"), ("a/b.cls", b"3"), ("a/._b.jpg", b"x"),
            ("__MACOSX/b.jpg", b"x"), ("c" * 150 + "/long.png", encoded(2, "PNG")),
            ("é\udcff.webp", encoded(3, "WEBP")), ("wide.npy", npy(np.zeros((4, 5, 3), np.uint8))),
        ],
        errors="surrogateescape",
    )  # fmt: skip
    source = open_source("s/mixed.tar")
    assert [name.rpartition("/")[2] for name in names(source)] == ["b.JPG", "long.png", "é\\xff.webp", "wide.npy"]
    assert source.ignored == 4
    assert [source.read(index).shape[1:] for index in range(4)] == [(30, 40)] * 3 + [(4, 5)]
    write_tar(folder / "none.tar", [("a.txt", b"x")])
    assert error("s/none.tar").startswith("'s/none.tar' has no images, but 1 other member; give shards with .jpg")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_arrays_of_many_channels(folder):
    array = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    lying = npy(array).replace(b"(4, 6, 5)", b"(9, 9, 5)")
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    write_tar(folder / "arrays.tar", [("a.npy", npy(array)), ("b.npy", lying), ("c.npy", objects.getvalue())])
    source = open_source("s/arrays.tar", channels=5)
    np.testing.assert_array_equal(source.read(0).numpy(), array.transpose(2, 0, 1))
    for index in (1, 2):
        with pytest.raises(BadImage):
            source.read(index)


def test_links_devices_and_names_that_escape_are_only_names(folder, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(5))
    members = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
        member = tarfile.TarInfo(f"x{kind.decode()}.jpg")
        member.type, member.linkname = kind, str(secret)
        members.append((member, b""))
    for size in (512, 2**62):
        sparse = tarfile.TarInfo("sparse.jpg")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
        members.append((sparse, b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)))
    members.append(("../../up.jpg", encoded(1)))
    members += [("/etc/root.jpg", encoded(2))]
    write_tar(folder / "evil.tar", members, format=tarfile.PAX_FORMAT)
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    source = open_source("s/evil.tar")
    assert names(source) == ["s/evil.tar/../../up.jpg", "s/evil.tar//etc/root.jpg"]
    assert torch.equal(source.read(0), open_source("s/000.tar").read(1))
    assert before == sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)


@pytest.mark.parametrize("size", [2**62, 2**40, 10**6])
def test_a_size_that_is_not_there_costs_nothing(folder, size):
    long_name, huge = tarfile.TarInfo("name"), tarfile.TarInfo("x.jpg")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, size
    huge.size = size
    for member in (long_name, huge):
        path = folder / "huge.tar"
        good = tarfile.TarInfo("good.jpg")
        good.size = len(encoded(1))
        padding = bytes(-good.size % 512)
        path.write_bytes(good.tobuf() + encoded(1) + padding + member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        source = open_source("s/huge.tar")
        assert names(source) == ["s/huge.tar/good.jpg"]
        assert source.warnings == ("1 of 1 shards cannot be read to the end: s/huge.tar is cut short or damaged",)


def test_a_damaged_or_missing_shard_is_named_and_the_others_are_read(folder):
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "002.tar").unlink()
    (folder / "003.tar").write_bytes(b"\x1f\x8b" + bytes(99))
    (folder / "004.tar").write_text("nothing of the kind" * 99)
    (folder / "005.tar").touch()
    source = open_source("s/{000..005}.tar")
    assert source.warnings == (
        "5 of 6 shards cannot be read to the end: s/001.tar is cut short or damaged, s/002.tar is missing, "
        "s/003.tar is compressed; unpack it and 2 more",
    )
    assert 4 < len(source) < 8 and all(len(source.read(index)) == 3 for index in range(len(source)))
    assert error("s/00{2..4}.tar") == (
        "'s/002.tar' is missing (3 of 3 shards are like that); give tar files of images, as mirl shard writes them"
    )
    assert "is not a tar" in error("s/004.tar")


def test_a_shard_that_is_lost_later_keeps_its_images_which_are_skipped(folder):
    before = names(open_source("s/*.tar"))
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(whole[:3000])
    (folder / "002.tar").unlink()
    source = open_source("s/{000..002}.tar")
    assert names(source) == before  # so a run can be resumed
    assert "s/002.tar is missing" in source.warnings[0]
    for index, reason in ((7, "its shard is cut short"), (8, "is missing")):
        with pytest.raises(BadImage, match=reason):
            source.read(index)
    assert source.read(3).shape == (3, 30, 40)
    write_tar(folder / "001.tar", [("new.jpg", encoded(50))])  # another shard of that name is read anew
    assert [name for name in names(open_source("s/{000..002}.tar")) if "s/001" in name] == ["s/001.tar/new.jpg"]


def test_an_index_is_made_once(folder, monkeypatch):
    scanned = []
    monkeypatch.setattr(
        "mirl.data.shards.opening.scan", lambda path, channels: scanned.append(path) or scan(path, channels)
    )
    first = names(open_source("s/*.tar"))
    assert len(scanned) == 3
    assert names(open_source("s/*.tar")) == first and len(scanned) == 3
    os.utime(folder / "001.tar", (1, 1))
    assert names(open_source("s/*.tar")) == first and scanned[3:] == ["s/001.tar"]
    for index in (folder.parent / "cache").rglob("*.index"):
        index.write_bytes(index.read_bytes()[:-9])
    assert names(open_source("s/*.tar")) == first and len(scanned) == 7


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch, capsys):
    (folder.parent / "cache").write_text("a file where the folder should be")
    assert len(open_source("s/*.tar")) == 12
    assert "is not kept" in capsys.readouterr().out


def test_an_index_of_a_stranger_is_checked(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", encoded(i)) for i in range(3)])
    good = Index.joined([scan(str(path), 3)], {})
    good.save(tmp_path / "index")
    assert list(Index.load(tmp_path / "index").members.rows()) == list(good.members.rows())

    def broken(shard=good.shards[0], about=None, **changed):
        values = {name: getattr(good.members, name) for name in ("blocks", "sizes", "letters", "name_ends")}
        Index((shard,), type(good.members)(**values | changed), {} if about is None else about).save(tmp_path / "index")
        with pytest.raises(ValueError):
            Index.load(tmp_path / "index")

    broken(blocks=good.members.blocks + np.uint32(2**20))
    broken(sizes=good.members.sizes + np.uint32(2**31))
    broken(sizes=good.members.sizes[:2])
    broken(blocks=good.members.blocks.astype(np.float32))
    broken(name_ends=good.members.name_ends[::-1].copy())
    broken(name_ends=good.members.name_ends + 99)
    broken(about=[])
    broken(shard=replace(good.shards[0], size=2**70))
    broken(shard=replace(good.shards[0], name="a\0.tar"))
    (tmp_path / "index").write_bytes(save({"x": np.zeros(1)}, {FORMAT: "[" * 100_000}))
    with pytest.raises(ValueError):
        Index.load(tmp_path / "index")
    good.save(tmp_path / "index")
    bytes_of = (tmp_path / "index").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(bytes_of)
        for place in generator.integers(0, len(changed), 4):
            changed[place] = generator.integers(256)
        (tmp_path / "index").write_bytes(changed[: generator.integers(1, len(changed) + 1)])
        with suppress(ValueError):
            Index.load(tmp_path / "index")


def test_mutated_tars_never_stop_the_reader(folder):
    path = write_tar(folder / "m.tar", [("n" * 120 + f"{i}.jpg", encoded(i, size=(9, 9))) for i in range(3)])
    content, generator = path.read_bytes(), np.random.default_rng(1)
    headers = np.concatenate([np.arange(512) + start for start in range(0, len(content) - 2048, 512)])
    for _ in range(300):
        changed = bytearray(content)
        for place in generator.choice(headers, 3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed[: generator.integers(1, len(changed) + 1)] if generator.random() < 0.3 else changed)
        shard, members = scan(str(path), 3)
        assert all(offset + size <= shard.size for offset, size, _ in members.rows())


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:Exception ignored")  # webdataset's
def test_webdataset_and_we_read_each_others_shards(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(folder / "theirs.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"sample{i}", "jpg": encoded(i), "cls": i})
    theirs = open_source("s/theirs.tar")
    assert names(theirs) == [f"s/theirs.tar/sample{i}.jpg" for i in range(3)] and theirs.ignored == 3
    assert torch.equal(theirs.read(2), open_source("s/000.tar").read(2))
    ours = list(webdataset.WebDataset(str(folder / "000.tar"), shardshuffle=False))
    assert [sample["jpg"] for sample in ours] == [encoded(i) for i in range(4)]


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:Exception ignored")  # webdataset's
def test_each_image_is_a_sample_of_webdatasets(folder, tmp_path):
    """Whose samples are neighbours with the same name up to the first dot; the index keeps the files' names."""
    webdataset = pytest.importorskip("webdataset")
    files = [f"frame.{i:04d}.jpg" for i in range(3)] + ["a.jpg", "a.png", "a_2.jpg", "v1.0/b.c/x.y.JPG"]
    for i, name in enumerate(files):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, "PNG" if name.endswith("png") else "JPEG"))
    source = open_source(mirl.shard("files", "out", workers=0, shuffle=False))
    assert [name.partition(".tar/")[2] for name in names(source)] == sorted(files)
    samples = list(webdataset.WebDataset("out/000000.tar", shardshuffle=False))
    assert [(s["__key__"], *(key for key in s if not key.startswith("__"))) for s in samples] == [
        ("a", "jpg"), ("a_2", "png"), ("a_2_2", "jpg"), *((f"frame_{i:04d}", "jpg") for i in range(3)),
        ("v1.0/b.c/x_y", "jpg"),
    ]  # fmt: skip
    write_tar(folder / "001.tar", [(f"{i:04d}.jpg", encoded(i + 4)) for i in range(4)])  # names of 000.tar again
    mirl.shard("s/00{0..1}.tar", "again", workers=0, shuffle=False)
    again = list(webdataset.WebDataset("again/000000.tar", shardshuffle=False))
    assert [sample["jpg"] for sample in again] == [encoded(i) for i in range(8)]


def test_a_folder_of_shards_needs_no_index(folder):
    assert names(open_source("s")) == names(open_source("s/{000..002}.tar"))
    (folder / "x.jpg").write_bytes(encoded(1))  # an archive beside images is none
    assert names(open_source("s")) == ["s/x.jpg"]


def test_shards_are_named_among_what_data_may_be(folder):
    assert "tar shards ('shards/{000000..000127}.tar'" in error("s/nothing/there")
    assert names_shards("s3://bucket/{0..9}.tar") and not names_shards("s")
    assert "address of another kind" in error("ftp+exec://x/y.tar")
