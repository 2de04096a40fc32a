"""What is shown of each block is what the encoder does, and showing it does not change the training."""

import math
import threading

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_runs import assert_same_run, rows

import mirl
from mirl.data.shapes import Shapes
from mirl.data.transforms import fixed_view, normalise
from mirl.tasks.blocks import effective_rank, linear_accuracy, token_similarity
from mirl.tasks.pretrain import split_off_held_out


def test_effective_rank_counts_directions():
    orthogonal = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(orthogonal) == pytest.approx(8)
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1)
    values = np.array([3.0, 1.0])  # shares 3/4 and 1/4
    by_hand = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.from_numpy(np.diag(values))) == pytest.approx(by_hand)


def test_token_similarity_is_the_mean_over_pairs():
    tokens = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pairs = [
        torch.nn.functional.cosine_similarity(tokens[:, i], tokens[:, j], dim=-1)
        for i in range(5) for j in range(5) if i != j
    ]  # fmt: skip
    torch.testing.assert_close(token_similarity(tokens), torch.stack(pairs).mean(0))
    assert token_similarity(torch.ones(1, 4, 3)).item() == pytest.approx(1)


def test_the_linear_read_out_finds_what_is_linear_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(900, 6, generator=generator), torch.arange(900) % 3
    told = features + 4 * torch.nn.functional.one_hot(labels, 6)
    assert linear_accuracy(told[:600], labels[:600], told[600:], labels[600:]) > 0.95
    assert linear_accuracy(features[:600], labels[:600], features[600:], labels[600:]) < 0.5


def test_every_evaluation_leaves_a_figure_for_every_block_and_a_picture(finished):
    recorded = rows(finished, "blocks")
    assert [row["step"] for row in recorded] == [row["step"] for row in rows(finished, "held_out")] == [0, 6]
    for row in recorded:
        for name in ("rank", "similarity", "linear", "knn"):
            assert len(row[name]) == 4 and all(math.isfinite(value) for value in row[name]), name
        assert all(1 <= value <= 192 for value in row["rank"]) and all(-1 <= value <= 1 for value in row["similarity"])
    picture = np.asarray(Image.open(finished / "pictures" / "blocks.png").convert("L"))
    assert picture.std() > 10


def test_the_last_figures_are_of_the_exported_encoder(finished):
    encoder = timm.create_model(f"local-dir:{finished / 'encoder'}", pretrained=True).eval()
    source = Shapes(106)
    images = torch.stack([fixed_view(source.read(int(i)), (32, 32)) for i in split_off_held_out(106)[1]])
    with torch.no_grad():
        blocks = encoder.forward_intermediates(normalise(images, 3), intermediates_only=True, output_fmt="NLC")
    tokens = [torch.nn.functional.layer_norm(block, (192,)) for block in blocks]
    expected = [token_similarity(block).mean().item() for block in tokens]
    assert rows(finished, "blocks")[-1]["similarity"] == pytest.approx(expected, abs=1e-5)
    ranks = [effective_rank(block.flatten(0, 1)) for block in tokens]
    assert rows(finished, "blocks")[-1]["rank"] == pytest.approx(ranks, rel=1e-4)


def test_looking_does_not_change_the_training(finished, tiny, tmp_path):
    unwatched = mirl.pretrain(**tiny | {"epochs": 1}, block_figures=False, out=str(tmp_path / "run"))
    assert_same_run(finished, unwatched)
    assert not rows(unwatched, "blocks") and not (unwatched / "pictures" / "blocks.png").exists()


def test_no_thread_stays_behind(tiny, tmp_path):
    """An idle thread that owns an OpenMP team slows every later step down."""
    before = threading.active_count()
    mirl.pretrain(**tiny | {"epochs": 1}, out=str(tmp_path / "run"))
    assert threading.active_count() == before


def test_blocks_are_read_out_on_class_folders_that_are_given(tiny, tmp_path):
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(level, level + 40, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "labelled" / name / f"{index}.png")
    data = tmp_path / "labelled" / "dark"
    run = mirl.pretrain(**tiny | {"data": str(data), "epochs": 1, "batch_size": 8}, out=str(tmp_path / "run"))
    assert "linear" not in rows(run, "blocks")[-1]
    options = tiny | {"data": str(data), "epochs": 1, "batch_size": 8, "labelled": str(tmp_path / "labelled")}
    run = mirl.pretrain(**options, out=str(tmp_path / "watched"))
    assert rows(run, "blocks")[-1]["linear"] == [100.0] * 4
