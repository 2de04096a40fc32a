"""Methods as data: what each constructor promises, and what it refuses."""

import pytest

from mirl.errors import UserError
from mirl.methods import (
    Method,
    Term,
    coarse_to_fine,
    default_segments,
    explicit_residual,
    fine_to_coarse,
    is_term,
    mae,
    mirl,
    multi_decoder,
    truncated_mae,
)


def test_mirl_pairs_shallow_with_deep():
    method = mirl(54, 6)
    assert method.taps == (9, 18, 27, 36, 45, 54)
    assert [term.decoders for term in method.terms] == [(1, 6), (2, 5), (3, 4)]
    assert all(term.weight == pytest.approx(1 / 3) for term in method.terms)  # lambda = 2 / G


def test_one_segment_has_nothing_to_pair():
    method = mirl(24, 1)
    assert method.taps == (24,)
    assert method.terms == (Term((1,), 1.0),)


@pytest.mark.parametrize(("depth", "segments"), [(12, 2), (24, 4), (48, 6), (54, 6), (10, 2)])
def test_default_segments_are_the_papers_by_depth(depth, segments):
    assert default_segments(depth) == segments
    assert len(mirl(depth).taps) == segments


def test_dense_context_is_every_earlier_segment_and_the_input():
    method = mirl(12, 4)
    assert [method.memory(g) for g in (1, 2, 3, 4)] == [(0,), (1, 0), (2, 1, 0), (3, 2, 1, 0)]
    assert mirl(12, 4, context="none").memory(4) == ()


def test_mae_has_one_decoder_after_the_last_block():
    assert mae(12) == Method("mae", (12,), "none", (Term((1,), 1.0),))


def test_context_may_end_at_the_segment_before():
    assert [mirl(12, 4, context="previous").memory(g) for g in (1, 2, 3, 4)] == [(0,), (1,), (2,), (3,)]


def test_a_truncated_mae_has_fewer_blocks():
    method = truncated_mae(12, 9)
    assert (method.depth, method.taps, method.terms) == (9, (9,), mae(9).terms)


def test_simple_decoders_each_reconstruct_the_image():
    method = multi_decoder(12, 3)  # nothing is paired, so three will do
    assert method.taps == (4, 8, 12)
    assert method.terms == tuple(Term((g,), 1 / 3) for g in (1, 2, 3))


def test_parts_of_the_image_go_to_shallow_and_deep():
    forth, back = coarse_to_fine(24, 4), fine_to_coarse(24, 4)
    parts = {method.name: {term.decoders: term.target for term in method.terms} for method in (forth, back)}
    assert parts["coarse_to_fine"] == {(1,): "coarse", (2,): "coarse", (3,): "fine", (4,): "fine"}
    assert parts["fine_to_coarse"] == {(1,): "fine", (2,): "fine", (3,): "coarse", (4,): "coarse"}
    assert [t.decoders for t in forth.reconstructions] == [(1, 4), (2, 3)]
    assert [t.decoders for t in back.reconstructions] == [(4, 1), (3, 2)]


def test_an_explicit_residual_takes_the_main_component_as_it_is():
    method = explicit_residual(12, 4)
    assert [(t.decoders, t.detached) for t in method.terms] == [
        ((1,), ()), ((2,), ()), ((1, 4), (1,)), ((2, 3), (2,))
    ]  # fmt: skip
    assert [t.decoders for t in method.reconstructions] == [(1, 4), (2, 3)]


@pytest.mark.parametrize("make", [mirl, multi_decoder, coarse_to_fine, fine_to_coarse, explicit_residual])
def test_weights_of_terms_sum_to_one_and_names_differ(make):
    for segments in (2, 4, 6):
        terms = make(12, segments).terms
        assert sum(term.weight for term in terms) == pytest.approx(1)
        names = [term.name for term in terms]
        assert len(set(names)) == len(names) and all(map(is_term, names))
    assert [t.name for t in explicit_residual(12, 2).terms] == ["decoder_1", "residual_1"]
    assert not is_term("loss") and not is_term("decoder")


def test_uneven_segments_are_given_as_taps():
    assert mirl(13, taps=(4, 13)).taps == (4, 13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mirl(54, 4), "choose 1, 2, 6, 18, 54 or give --taps"),
        (lambda: mirl(13), "depth 13 does not divide into 2 segments; choose 1 or"),
        (lambda: mirl(12, 3), "3 segments cannot be paired"),
        (lambda: mirl(12, taps=(4, 8)), "do not end at depth 12"),
        (lambda: mirl(12, taps=(8, 4, 6, 12)), "ascending"),
        (lambda: mirl(12, 4, taps=(6, 12)), "give one of the two"),
        (lambda: mirl(12, 0), "choose 1, 2, 4, 6, 12"),
        (lambda: multi_decoder(12, 5), "choose 1, 2, 3, 4, 6, 12 or"),
        (lambda: coarse_to_fine(12, 1), "one segment cannot be paired; choose an even number"),
        (lambda: explicit_residual(12, 3), "choose an even number"),
        (lambda: truncated_mae(12, 12), "give --taps with one number below 12"),
        (lambda: truncated_mae(12, 0), "give --taps with one number below 12"),
    ],
)
def test_refusals_name_what_is_allowed(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("decoders", [[], [(1,)], [(0, 1, 2)], [(1, 3), (2,)]])
def test_terms_of_an_own_method_must_train_its_decoders(decoders):
    with pytest.raises(UserError, match="at 2 taps: name 1 to 2 alone, and train each"):
        Method("own", (6, 12), "dense", tuple(Term(each, 1.0) for each in decoders))
    with pytest.raises(UserError, match=r"terms of decoders \(1, 2\) at 2 taps"):
        Method("own", (6, 12), "dense", (Term((1, 2), 1.0, detached=(1,)),))
