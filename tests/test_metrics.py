import hashlib
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import lpips
import numpy as np
import pytest
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torchmetrics.image.kid import poly_mmd
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
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = models.tokenizer()
    models.clip(words).save_pretrained(folder)
    words.save_pretrained(folder)
    half, side = [0.5] * 3, {"height": 64, "width": 64}
    CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alignment(clip_folder):
    return metrics.Alignment(str(clip_folder))


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty torch hub cache; gives the folder where it keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    checkpoints = tmp_path / "home/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


class Runs:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


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


class Descriptor(torch.nn.Module):
    """Stands for SSCD: sixteen pixels of a picture, which ones depends on its size."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, :, ::80, ::80].flatten(1)


def test_sscd_file_sees_pictures_as_its_readme_prepares_them(tmp_path):
    pictures = torch.rand(3, 3, 420, 340, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "sscd_tiny.torchscript.pt"
    torch.jit.script(Descriptor()).save(path)
    images = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in pictures]
    prepare = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize([320, 320]),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.nn.functional.normalize(Descriptor()(torch.stack([prepare(i) for i in images])))
    distance = metrics.CopyDistance(str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    torch.testing.assert_close(distance.features(pictures), expected, atol=5e-3, rtol=0)
    assert distance(pictures, pictures).abs().max() < 1e-5 and distance.name == str(path)


def test_missing_sscd_file_is_named_with_its_source(tmp_path):
    path = tmp_path / "sscd_disc_mixup.torchscript.pt"
    source = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
    with pytest.raises(FileNotFoundError, match=f"facebookresearch/sscd-copy-detection.*curl.*-o {path} {source}"):
        metrics.CopyDistance(str(path))


@pytest.mark.parametrize("damage", ["bytes", "state dict"])
def test_damaged_sscd_file_is_named(damage, tmp_path):
    path = tmp_path / "sscd.torchscript.pt"
    path.write_bytes(b"<html>404</html>" * 99) if damage == "bytes" else torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(OSError, match=f"{path} are missing, truncated, corrupt or of another kind.*torchscript"):
        metrics.CopyDistance(str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_sscd_file_is_code_and_not_opened_before_its_checksum_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    known, other = tmp_path / "sscd_disc_mixup.torchscript.pt", tmp_path / "sscd_other.torchscript.pt"
    for path in (known, other):
        torch.jit.script(Descriptor()).save(path)
    with pytest.raises(ValueError, match=f"{known} has the SHA-256 .*not 9f26bd4c.* fetch it again"):
        metrics.CopyDistance(str(known))
    with pytest.raises(ValueError, match=f"no checksum is known for {other}.*sha256="):
        metrics.CopyDistance(str(other))


BACKBONES = {
    "alex": (torchvision.models.alexnet, "alexnet-owt-7be5be79.pth"),
    "squeeze": (torchvision.models.squeezenet1_1, "squeezenet1_1-b8a52dc0.pth"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
@pytest.mark.parametrize("net", BACKBONES)
def test_perceptual_distance_is_that_of_lpips_with_the_same_weights(net, torch_home, pictures):
    make, file = BACKBONES[net]
    torch.manual_seed(1)
    torch.save(make().state_dict(), torch_home / file)
    other = pictures.roll(1, 0)
    with torch.no_grad():
        expected = lpips.LPIPS(net=net, verbose=False)(pictures * 2 - 1, other * 2 - 1).flatten()
    distance = metrics.perceptual_distance(net)
    torch.testing.assert_close(distance(pictures, other), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(distance(pictures, other, batch_size=3), expected, atol=1e-6, rtol=1e-4)
    assert (expected > 1e-3).all() and distance(pictures, pictures).abs().max() < 1e-6
    assert distance.name == f"lpips-{net}"


def test_perceptual_distance_without_backbone_is_a_notice_and_no_number(torch_home):
    path = torch_home / "alexnet-owt-7be5be79.pth"
    cure = f"{path}: fetch them with `curl .*-o {path} https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    with pytest.warns(UserWarning, match=f"LPIPS: not measured.*{cure}"):
        assert metrics.perceptual_distance() is None
    with pytest.raises(FileNotFoundError, match=cure):
        metrics.PerceptualDistance()
    assert not list(torch_home.iterdir())  # nothing was downloaded


def test_unknown_perceptual_net_is_refused():
    with pytest.raises(ValueError, match=r"no net 'resnet'.*\['alex', 'vgg', 'squeeze'\]"):
        metrics.PerceptualDistance("resnet")


def lpips_of(path):
    return metrics.PerceptualDistance("squeeze", path)


def fid_of(path):
    return metrics.frechet_distance(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), path, layer=64)


@pytest.mark.parametrize("judge", [lpips_of, fid_of])
@pytest.mark.parametrize("damage", ["bytes", "another network", "code"])
def test_damaged_weights_are_named_and_code_in_them_never_runs(judge, damage, tmp_path):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    if damage == "bytes":
        path.write_bytes(b"<html>404</html>" * 99)
    else:
        torch.save({"features.0.weight": Runs(made) if damage == "code" else torch.zeros(2)}, path)
    with pytest.raises(OSError, match=f"{path} are missing, truncated, corrupt or of another kind.*https://"):
        judge(path)
    assert not made.exists()


@pytest.fixture
def hub_clip(clip_folder, tmp_path, monkeypatch):
    """A Hugging Face cache with a small CLIP called openai/clip-tiny; gives its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--openai--clip-tiny/snapshots/abc"
    shutil.copytree(clip_folder, snapshot)
    reference = snapshot.parents[1] / "refs/main"
    reference.parent.mkdir()
    reference.write_text("abc")
    return snapshot


def test_alignment_reads_a_named_model_from_the_hub_cache(hub_clip, alignment, pictures):
    named = metrics.Alignment("openai/clip-tiny")
    assert named.name == "openai/clip-tiny"
    torch.testing.assert_close(named.score(pictures[:3], TEXTS), alignment.score(pictures[:3], TEXTS))


def test_what_the_hub_cache_lacks_is_named_with_the_command(hub_clip, tmp_path):
    with pytest.raises(
        ValueError, match=f"{tmp_path} lacks config.json, model.safe.*hf download openai/clip-other con"
    ):
        metrics.Alignment("openai/clip-other")
    (hub_clip / "model.safetensors").rename(hub_clip / "pytorch_model.bin")  # not read: it can hold code
    with pytest.raises(ValueError, match=r"lacks model.safetensors of it.*`hf download openai/clip-tiny .*safetensors"):
        metrics.Alignment("openai/clip-tiny")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_incomplete_clip_folder_is_named(file, clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / file).unlink()
    with pytest.raises(OSError, match=f"{folder}.*restore that folder"):
        metrics.Alignment(str(folder))


def test_pictures_of_another_size_and_aspect_fill_clips_square(alignment):
    small = torch.rand(2, 3, 1, 1).expand(-1, -1, 64, 64)
    wide = small[:, :, :48].repeat(1, 1, 1, 2)
    whole = alignment.picture_features(small)
    torch.testing.assert_close(alignment.picture_features(wide), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(alignment.picture_features(small.half()), whole, atol=1e-2, rtol=0)


TAKES_PICTURES = {
    "descriptor": lambda p, request: request.getfixturevalue("distance").features(p),
    "clip": lambda p, request: request.getfixturevalue("alignment").picture_features(p),
    "psnr": lambda p, request: metrics.psnr(p, p),
    "fid": lambda p, request: metrics.frechet_distance(p, p),
    "saturated": lambda p, request: metrics.saturated_share(p),
    "background": lambda p, request: metrics.background_colour(p),
    "layout": lambda p, request: metrics.layout_similarity(p, p, [BOX] * len(p)),
}


@pytest.mark.parametrize("metric", TAKES_PICTURES)
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p[:, :1], r"shape \[7, 1, 64, 64\]: give \[B, 3, height, width\]"),
        (lambda p: p.permute(0, 2, 3, 1), r"shape \[7, 64, 64, 3\]: give"),
        (lambda p: (p * 255).byte(), "uint8: give floats in 0..1"),
        (lambda p: p * 2 - 1, "range from -1 to 1: give 0..1"),
        (lambda p: p.index_fill(0, torch.tensor([2, 5]), torch.nan), "2 of 7 pictures hold NaN.*index 2: leave"),
    ],
    ids=["grey", "channels last", "uint8", "-1..1", "nan"],
)
def test_bad_pictures_are_refused_with_cause_and_cure(metric, spoil, message, pictures, request):
    with pytest.raises(ValueError, match=message):
        TAKES_PICTURES[metric](spoil(pictures), request)


def test_one_picture_is_not_silently_compared_with_many(distance, alignment, pictures):
    with pytest.raises(ValueError, match="7 pictures and 1 references: give one for each"):
        distance(pictures, pictures[:1])
    with pytest.raises(ValueError, match="7 pictures and 1 texts: give one for each"):
        alignment.score(pictures, ["an owl"])


def unit_features(count, seed, shift=0.0):
    draw = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) + shift
    return torch.nn.functional.normalize(draw, dim=1)


def by_hand(kernel, a, b, groups):
    """Squared MMD, pair by pair."""
    own = [kernel(x, y) for x, g in zip(a, groups, strict=True) for y, h in zip(a, groups, strict=True) if g != h]
    real = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
    return np.mean(own) + np.mean(real) - 2 * np.mean([kernel(x, y) for x in a for y in b])


@pytest.mark.parametrize("groups", [None, ["owl", "owl", "fox", "bus", "owl", "bus", "fox", "crab", "crab"]])
@pytest.mark.parametrize("bandwidth", [10.0, 0.5])
def test_cmmd_is_the_sum_over_pairs_of_different_groups(bandwidth, groups):
    a, b = unit_features(9, 0, shift=0.5), unit_features(7, 1)
    gauss = lambda x, y: 1000 * np.exp(-np.sum((x - y) ** 2) / (2 * bandwidth**2))  # noqa: E731
    expected = by_hand(gauss, a.double().numpy(), b.double().numpy(), groups or range(9))
    assert float(metrics.cmmd(a, b, bandwidth, groups)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_kid_is_that_of_torchmetrics():
    a, b = unit_features(20, 0, shift=0.3).double(), unit_features(20, 1).double()
    assert float(metrics.kid(a, b)) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


@pytest.mark.parametrize("metric", [metrics.cmmd, metrics.kid])
def test_mmd_of_one_distribution_is_zero_on_average_and_grows_with_the_shift(metric):
    draws = torch.stack([metric(unit_features(8, 2 * i), unit_features(8, 2 * i + 1)) for i in range(300)])
    assert abs(float(draws.mean())) < 4 * float(draws.std()) / 300**0.5
    near, far = (float(metric(unit_features(100, 0, shift), unit_features(100, 1))) for shift in (0.2, 0.6))
    assert far > near > float(draws.std()) / 8


def test_mmd_interval_is_the_jackknife_by_deleting_and_measuring_again():
    a, b = unit_features(9, 0, shift=0.5), unit_features(7, 1)
    groups = np.array([0, 0, 1, 2, 0, 2, 1, 3, 3])
    measure = lambda rows, real: float(metrics.cmmd(a[rows], b[real], groups=groups[rows]))  # noqa: E731
    everything = np.arange(9), np.arange(7)
    deleted = [
        [measure(np.flatnonzero(groups != g), everything[1]) for g in range(4)],
        [measure(everything[0], np.delete(everything[1], i)) for i in range(7)],
    ]
    variance = sum((len(d) - 1) / len(d) * np.sum((np.array(d) - np.mean(d)) ** 2) for d in deleted)
    half = 3.1824463 * np.sqrt(variance)  # Student's t, 97.5%, 3 degrees of freedom
    value = measure(*everything)
    np.testing.assert_allclose(metrics.mmd_interval(a, groups, b), [value - half, value + half], rtol=1e-6)


def test_mmd_interval_covers_the_truth_when_pictures_of_a_prompt_are_alike():
    prompts, seeds, width, bandwidth, spread = 20, 6, 6, 10.0, 1.5
    # features ~ N(1, 1 + spread^2), references ~ N(0, 1): the kernel's mean is a Gaussian integral
    mean = lambda variance, shift: (  # noqa: E731
        1000
        * (bandwidth**2 / (bandwidth**2 + variance)) ** (width / 2)
        * np.exp(-width * shift**2 / (2 * (bandwidth**2 + variance)))
    )
    truth = mean(2 * (1 + spread**2), 0) + mean(2, 0) - 2 * mean(2 + spread**2, 1)
    groups = np.repeat(np.arange(prompts), seeds)
    generator = torch.Generator().manual_seed(0)
    covered = np.zeros(2)
    for _ in range(150):
        centres = 1 + spread * torch.randn(prompts, width, generator=generator)
        a = centres[groups] + torch.randn(len(groups), width, generator=generator)
        b = torch.randn(40, width, generator=generator)
        for i, by in enumerate([groups, np.arange(len(a))]):
            low, high = metrics.mmd_interval(a, by, b)
            covered[i] += bool(low <= truth <= high) / 150
    assert 0.91 <= covered[0] <= 0.99
    assert covered[1] < 0.86  # as if pictures of one prompt were independent


def test_too_little_for_an_unbiased_estimate_is_refused():
    a, b = unit_features(4, 0), unit_features(4, 1)
    with pytest.raises(ValueError, match=r"shape \[1, 12\]: give \[N, F\] of at least 2"):
        metrics.cmmd(a[:1], b)
    with pytest.raises(ValueError, match=r"shape \[1, 12\]: give"):
        metrics.kid(a, b[:1])
    with pytest.raises(ValueError, match=r"shape \[1, 12\]: give"):
        metrics.diversity(a[:1])
    with pytest.raises(ValueError, match="all pictures are of group"):
        metrics.cmmd(a, b, groups=["owl"] * 4)
    with pytest.raises(ValueError, match="2 groups and 4 references: an interval needs 3 of each"):
        metrics.mmd_interval(a, [0, 0, 1, 1], b)
    with pytest.raises(ValueError, match="1 pictures and 2 references: a covariance needs 2 of each"):
        metrics.frechet_distance(torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8))


def test_bad_features_are_refused():
    a, b = unit_features(4, 0), unit_features(4, 1)
    with pytest.raises(ValueError, match="12 wide, references 11: take both from one network"):
        metrics.cmmd(a, b[:, 1:])
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.cmmd(a, b / 0)
    with pytest.raises(ValueError, match="4 pictures and 3 groups"):
        metrics.cmmd(a, b, groups=[0, 1, 2])


def test_diversity_is_the_mean_cosine_distance_of_pairs():
    features = unit_features(9, 3)
    assert float(metrics.diversity(features)) == pytest.approx(pdist(features.double().numpy(), "cosine").mean())
    assert float(metrics.diversity(features[:1].expand(5, -1))) == pytest.approx(0, abs=1e-12)


class MeanColour(torch.nn.Module):
    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        return pictures.double().mean(dim=(2, 3)) / 255


def test_frechet_distance_is_the_closed_form_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(2, 60, 3, generator=generator) * torch.tensor([[[0.5]], [[1.0]]])
    made, real = ((c * 255).round() / 255 for c in colours)  # what 8 bits hold, so that rounding changes nothing
    a, b = made.double().numpy(), real.double().numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    mixed = sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * mixed)
    made, real = (c[:, :, None, None].expand(-1, -1, 8, 8) for c in (made, real))
    found = metrics.frechet_distance(made - 0.2 / 255, real, layer=MeanColour(), batch_size=7)  # rounded, not cut
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_uses_the_inception_weights_at_hand(torch_home):
    torch.manual_seed(0)
    kind = inception.FeatureExtractorInceptionV3
    with patch.object(inception, "load_state_dict_from_url"), patch.object(kind, "load_state_dict"):
        network = kind("inception-v3-compat", ["64"])  # random weights
    pictures = torch.randint(0, 256, (2, 4, 3, 299, 299), generator=torch.Generator().manual_seed(1)).byte()
    pictures[0] //= 2
    a, b = (network(p)[0].double().numpy() for p in pictures)
    spread = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    # the trace of the root of a product of two covariances is the nuclear norm of their factors' product
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + sum(np.sum(s**2) for s in spread)
    expected -= 2 * np.linalg.norm(spread[0] @ spread[1].T, "nuc")
    with pytest.warns(UserWarning, match=f"FID: not measured.*{torch_home}/weights-inception.*pth: fetch.*curl"):
        assert metrics.frechet_distance(*(pictures / 255), layer=64) is None
    torch.save(network.state_dict(), torch_home / Path(inception.URL_INCEPTION_V3).name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = metrics.frechet_distance(*(pictures / 255), layer=64, batch_size=3)
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_without_torch_fidelity_is_a_notice_and_no_number(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.warns(UserWarning, match="FID: not measured.*pip install torch-fidelity"):
        assert metrics.frechet_distance(pictures, pictures) is None


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
