"""Figures against cases whose answer is known."""

import numpy as np
import pytest

from unclip_jax.metrics.prior_cosines import prior_cosines
from unclip_jax.metrics.retrieval import image_text_retrieval, own_caption, ranks


def test_perfect_and_collapsed_embeddings():
    perfect = image_text_retrieval(np.eye(10), np.eye(10))
    assert perfect["image_to_text_r1"] == perfect["text_to_image_r5"] == 1.0
    collapsed = image_text_retrieval(np.ones((10, 4)), np.ones((10, 4)))
    assert collapsed["image_to_text_r5"] == 0.0  # ties never count as found
    assert collapsed["chance_r1"] == 0.1 and collapsed["chance_r5"] == 0.5


def test_a_perfect_clip_of_repeated_captions_is_right():
    """Chance is over the captions that differ; with numbers of them as by the embeddings."""
    z, own = np.eye(4)[np.arange(40) % 4], np.arange(40) % 4
    for told in ((), (own, own), (np.arange(40), own)):
        found = image_text_retrieval(z, z, *told)
        assert [v for n, v in found.items() if n.endswith(("image_r1", "text_r1"))] == [1.0, 1.0]
        assert (found["chance_r1"], found["chance_r5"], found["captions"]) == (0.25, 1.0, 4.0)
        pictures = found["pictures"]
        assert found["text_to_image_chance_r1"] == pytest.approx(0.25) and pictures in (4, 40)
    figures = own_caption(z, z, z, np.arange(40))
    assert figures["real_r1"] == figures["generated_r1"] == 1.0 and figures["chance_r1"] == 0.25


def test_a_collapsed_clip_finds_nothing_among_captions_that_are_told():
    found = image_text_retrieval(np.ones((40, 4)), np.ones((40, 4)), range(40), np.arange(40) % 4)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 0.0


def test_pictures_drawn_alike_are_not_each_other_s():
    """A decoder that draws one picture for two captions is right for one of them."""
    z_t, real = np.eye(4), np.eye(4)
    figures = own_caption(np.eye(4)[[0, 0, 2, 3]], real, z_t, np.arange(4))
    assert figures["generated_r1"] == 0.75 and figures["real_r1"] == 1.0


def test_chance_of_several_own_candidates_is_that_of_drawing_them():
    """Pictures of five captions each: any of them will do."""
    rng = np.random.default_rng(5)
    pictures, z = np.arange(60) // 5, rng.normal(size=(2, 60, 32))
    found = image_text_retrieval(z[0][pictures], z[1], pictures, np.arange(60))
    drawn = [np.isin(rng.permutation(60)[:5], np.arange(5)).any() for _ in range(20_000)]
    assert found["chance_r5"] == pytest.approx(np.mean(drawn), abs=0.02)
    assert found["text_to_image_chance_r5"] == 5 / 12 and found["chance_r1"] == pytest.approx(
        5 / 60
    )


def test_ranks_against_sorting():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(7, 3)), rng.normal(size=(20, 3))
    own = rng.integers(0, 20, 7)
    order = np.argsort(-(queries @ candidates.T), axis=1)
    expected = [int(np.where(row == j)[0][0]) for row, j in zip(order, own, strict=True)]
    np.testing.assert_array_equal(ranks(queries, candidates, own), expected)


def test_random_embeddings_are_at_chance():
    rng = np.random.default_rng(1)
    figures = image_text_retrieval(rng.normal(size=(2000, 16)), rng.normal(size=(2000, 16)))
    assert figures["image_to_text_r5"] < 0.01


def test_prior_cosines_tell_listening_from_ignoring():
    rng = np.random.default_rng(2)
    z_i, z_t = rng.normal(size=(2, 50, 64))
    listens = prior_cosines(3.0 * z_i, z_i, z_t)  # scale does not matter
    assert listens["cosine_z_i"] == pytest.approx(1.0)
    assert abs(listens["cosine_z_i_shuffled"]) < 0.05
    ignores = prior_cosines(np.repeat(z_i[:1], 50, axis=0), z_i, z_t)
    assert ignores["cosine_z_i"] == pytest.approx(ignores["cosine_z_i_shuffled"], abs=0.05)
    said = prior_cosines(z_t, z_i, z_t)
    assert said["cosine_z_t"] == pytest.approx(1.0)


def test_shuffled_cosine_is_the_mean_over_all_wrong_pairs():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6, 5))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    wrong = [a[i] @ b[j] for i in range(6) for j in range(6) if i != j]
    assert prior_cosines(a, b, a)["cosine_z_i_shuffled"] == pytest.approx(np.mean(wrong))


def test_shuffled_cosine_leaves_out_the_own_caption_s_other_pictures():
    z = np.eye(4)[np.arange(40) % 4]
    perfect = prior_cosines(z, z, z)
    assert perfect["cosine_z_i"] == 1.0 and perfect["cosine_z_i_shuffled"] == 0.0
    assert np.isnan(prior_cosines(z, z, z, ["the same"] * 40)["cosine_z_i_shuffled"])


def test_own_caption_counts():
    z_t = np.eye(8)
    own = np.array([0, 3, 5])
    figures = own_caption(z_t[[0, 3, 6]], z_t[own], z_t, own)
    assert figures["generated_r1"] == pytest.approx(2 / 3)
    assert figures["real_r1"] == 1.0 and figures["chance_r1"] == 1 / 8
