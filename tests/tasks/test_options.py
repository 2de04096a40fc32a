"""Options are held to their types in Python as on the command line, so that no misspelt one trains something else."""

import numpy as np
import pytest

import mirl
from mirl.errors import UserError

RUN = {"weights": "runs/a"}


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (mirl.Pretraining, {"target": "pixels"}, "--target pixels is not allowed; give normalised or raw"),
        (mirl.Pretraining, {"schedule": "Cosine"}, "--schedule Cosine is not allowed; give step or cosine"),
        (mirl.Pretraining, {"epochs": "3"}, "--epochs '3' is not allowed; give a whole number"),
        (mirl.Pretraining, {"epochs": 2.5}, "--epochs 2.5 is not allowed; give a whole number"),
        (mirl.Pretraining, {"seed": True}, "--seed True is not allowed; give a whole number"),
        (mirl.Pretraining, {"flip": "no"}, "--flip 'no' is not allowed; give true or false"),
        (mirl.Pretraining, {"data": ["a", "b"]}, "--data ['a', 'b'] is not allowed; give text"),
        (mirl.Pretraining, {"precision": 32}, "--precision 32 is not allowed; give auto or 32 or bf16 or 16, as text"),
        (mirl.Pretraining, {"taps": [4, "12"]}, "--taps [4, '12'] is not allowed; give numbers such as 4 12"),
        (
            mirl.Pretraining, {"image_size": (32, 48, 64)},
            "--image_size (32, 48, 64) is not allowed; give a whole number or [height,width]",
        ),
        (mirl.Finetuning, RUN | {"pool": "max"}, "--pool max is not allowed; give mean or cls"),
        (mirl.EmbedOptions, RUN | {"table": "xlsx"}, "--table xlsx is not allowed; give csv or parquet"),
        (mirl.Detection, RUN | {"protocol": "coco"}, "--protocol coco is not allowed; give coco_1x or vitdet"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_one_line(options, given, message):
    with pytest.raises(UserError) as caught:
        options(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (mirl.Pretraining, {"image_size": [32, 48], "patch_size": 8, "taps": (4, 12), "max_bad": "1%"}),
        (mirl.Pretraining, {"epochs": np.int64(3), "base_lr": 1, "mask_ratio": np.float32(0.5), "clip_grad": None}),
        (mirl.Pretraining, {"devices": 2}),
        (mirl.KNNOptions, RUN | {"k": 5}),
        (mirl.KNNOptions, RUN | {"k": [5, 7]}),
        (mirl.DiagnoseOptions, {"weights": ["a", "b"]}),
    ],
    ids=str,
)
def test_what_means_the_same_is_of_the_type(options, given):
    kept = vars(options(**given))
    assert not any(isinstance(value, np.generic) for value in kept.values())  # which config.yaml cannot hold
