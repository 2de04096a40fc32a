"""What a source says of its own form is not overruled; options that would are one line."""

import pytest
from tiny_runs import mistake

from mirl.tasks.convert import convert


@pytest.mark.parametrize(
    "to, given, said",
    [
        ("timm", {"heads": 4}, "--heads 4 is not what {run} says, 3; leave it out"),
        ("safetensors", {"decoder_heads": 2}, "--decoder_heads 2 is not what {run} says, 1; leave it out"),
        ("safetensors", {"taps": [1, 4]}, "--taps [1, 4] is not what {run} says, [2, 4]; leave it out"),
        ("onnx", {"decoder_heads": 1}, "--decoder_heads 1 is of decoders, and only the encoder is converted here; "
         "leave it out"),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_has_another_form_is_one_line(finished, tmp_path, to, given, said):
    suffix = {"timm": "", "safetensors": ".safetensors", "onnx": ".onnx"}[to]
    assert mistake(convert, str(finished), str(tmp_path / f"out{suffix}"), to, **given) == said.format(run=finished)
    assert list(tmp_path.iterdir()) == []


def test_what_agrees_with_the_source_is_no_mistake(finished, tmp_path):
    given = {"heads": 3, "decoder_heads": 1, "taps": [2, 4]}
    assert convert(str(finished), str(tmp_path / "out.safetensors"), "safetensors", **given).difference < 1e-5
