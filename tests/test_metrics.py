from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from transformers import CLIPImageProcessor

from basinlab import metrics
from recipe import models

TEXTS = ["a picture of a tomato", "an owl", "here is jeans"]


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def distance(tmp_path_factory):
    folder = tmp_path_factory.mktemp("descriptor")
    torch.manual_seed(0)
    models.descriptor().save_pretrained(folder)
    return metrics.CopyDistance(str(folder))


@pytest.fixture(scope="module")
def alignment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = models.tokenizer()
    models.clip(words).save_pretrained(folder)
    words.save_pretrained(folder)
    half, side = [0.5] * 3, {"height": 64, "width": 64}
    CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(folder)
    return metrics.Alignment(str(folder))


def test_copy_distance_is_zero_for_the_same_picture_only(distance, pictures):
    assert distance(pictures, pictures).abs().max() < 1e-5
    assert (distance(pictures, pictures.roll(1, 0)) > 1e-4).all()


def test_copy_distance_is_symmetric_and_pairs_agree_with_single_distances(distance, pictures):
    pairs = distance.pairs(pictures, pictures[:4])
    assert pairs.shape == (7, 4)
    torch.testing.assert_close(pairs.T, distance.pairs(pictures[:4], pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(pairs.diagonal(), distance(pictures[:4], pictures[:4]), atol=1e-5, rtol=0)
    third = pictures[2:3].expand(3, -1, -1, -1)
    torch.testing.assert_close(pairs[4:, 2], distance(pictures[4:], third), atol=1e-5, rtol=0)


@pytest.mark.parametrize("features", ["distance", "alignment"])
def test_features_have_unit_length_in_any_batch(features, pictures, request):
    metric = request.getfixturevalue(features)
    extract = metric.features if features == "distance" else metric.picture_features
    whole, parts = extract(pictures), extract(pictures, batch_size=2)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_alignment_is_the_cosine_of_clips_own_logits(alignment, pictures):
    tokens = alignment.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    pixels = alignment.processor(list(pictures[:3]), do_rescale=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = alignment.model(pixel_values=pixels, **tokens)
    cosines = output.logits_per_image / alignment.model.logit_scale.exp()
    torch.testing.assert_close(alignment.score(pictures[:3], TEXTS), cosines.diagonal(), atol=1e-5, rtol=0)


def test_classification_picks_the_best_fitting_name(alignment, pictures):
    names = ["tomato", "owl", "taxi"]
    scores = [alignment.score(pictures, [f"an image of a {name}"] * 7) for name in names]
    found = alignment.classify(pictures, names, "an image of a {}")
    assert found.tolist() == torch.stack(scores).argmax(dim=0).tolist()


def test_object_is_right_where_clip_sees_the_wanted_one(pictures):
    sees = SimpleNamespace(classify=lambda pictures, names: torch.tensor([0, 1, 1]))
    found = metrics.object_right(sees, pictures[:3], ["owl", "owl", "taxi"], ["owl", "taxi"])
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "make, wanted", [(metrics.CopyDistance, "copy-detection descriptor"), (metrics.Alignment, "CLIP")]
)
def test_missing_model_folder_is_named_with_the_cure(make, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"no {wanted} in 'nowhere' or {tmp_path / 'nowhere'}.*git checkout"):
        make("nowhere")


def test_saturated_share_counts_values_at_either_end():
    pictures = torch.full((2, 3, 2, 2), 0.5)
    pictures[0, 0] = torch.tensor([[0.0, 1.0], [0.995, 0.985]])  # -1, 1, 0.99 and 0.97 of the range -1..1
    assert metrics.saturated_share(pictures).tolist() == [3 / 12, 0]


BOX = metrics.Box(left=4, top=10, size=30)


def outside():
    mask = np.ones((64, 64), bool)
    mask[10:40, 4:34] = False
    return mask


def test_layout_similarity_is_the_correlation_outside_the_box(pictures):
    found = metrics.layout_similarity(pictures[:3], pictures[3:6], [BOX] * 3)
    for value, a, b in zip(found, pictures[:3].numpy(), pictures[3:6].numpy(), strict=True):
        expected = np.corrcoef(a[:, outside()].ravel(), b[:, outside()].ravel())[0, 1]
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_layout_similarity_does_not_see_what_stands_in_the_box(pictures):
    same, other = pictures[:1].clone(), pictures[:1].clone()
    other[..., 10:40, 4:34] = 0
    moved = pictures[:1].clone()
    moved[..., 9, 4:34] = 0
    similarity = [float(metrics.layout_similarity(p, pictures[:1], [BOX])) for p in (same, other, moved)]
    assert similarity[:2] == pytest.approx([1, 1], abs=1e-5)
    assert similarity[2] < 0.999


def test_background_colour_ignores_the_middle_and_a_few_odd_pixels():
    colour = torch.tensor([0.2, 0.6, 0.9])
    pictures = colour[None, :, None, None].repeat(1, 1, 64, 64)
    pictures[..., 2:-2, 2:-2] = 0
    pictures[..., :2, :40] = 1
    torch.testing.assert_close(metrics.background_colour(pictures), colour[None])


@pytest.mark.parametrize("count, spread", [(2, 1.0), (8, 1.0), (40, 1.0), (40, 1e-4)])
def test_mean_pairwise_distance_agrees_with_scipy(count, spread):
    generator = torch.Generator().manual_seed(count)
    states = 1 + spread * torch.randn(count, 3, 4, 8, 8, generator=generator)
    expected = [pdist(states[:, s].flatten(1).double().numpy()).mean() / np.sqrt(256) for s in range(3)]
    np.testing.assert_allclose(metrics.mean_pairwise_distance(states), expected, rtol=1e-3)
