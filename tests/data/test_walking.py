"""A folder is searched for images; what this project writes into it is not among them."""

from mirl.data.walking import walk


def test_runs_and_reports_inside_the_data_are_none(tmp_path):
    for name in (
        "a.png", "runs/one/config.yaml", "runs/one/log.txt", "runs/one/metrics.jsonl", "runs/one/pictures/curves.png",
        "runs/data_doctor/doctor.json", "runs/data_doctor/sizes.png",
        "photos/sizes.png", "photos/log.txt",  # without the others these are the user's
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = walk(str(tmp_path), {".png"})
    assert (list(found.paths), found.ignored) == (["a.png", "photos/sizes.png"], 1)
    (tmp_path / "doctor.json").touch()  # beside images, it hides none of them
    assert list(walk(str(tmp_path), {".png"}).paths) == ["a.png", "photos/sizes.png"]
