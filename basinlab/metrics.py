"""Numbers about pictures: copies, perceptual distance, alignment, quality, diversity, colour.

Pictures are [B, 3, height, width] floats in 0..1; every metric returns tensors on the CPU. A copy distance D (paper,
Definition 2) has ``features(pictures)``, [B, F] of unit length, and ``pairs(a, b)``, [A, B]. Nothing is downloaded: a
judge whose weights are missing raises FileNotFoundError, which says how to fetch them.
"""

import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from scipy import stats
from torch import Tensor
from torchvision.models import AlexNet_Weights
from torchvision.transforms.functional import normalize, resize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification

from .models import data_folder, without_bars

SSCD = "sscd_disc_mixup.torchscript.pt"
SSCD_URL = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{SSCD}"
SSCD_SHA256 = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"  # pinned alike by several projects


def _checked(pictures: Tensor) -> Tensor:
    """The same pictures; ValueError for what would give a wrong number in silence."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}: give floats [B, 3, height, width]")
    low, high = pictures.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"pictures range from {low:.3g} to {high:.3g}: give 0..1, without NaN")
    return pictures


def _one_each(a: Sequence, b: Sequence) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} pictures and {len(b)} references: give one for each")


def _downloaded(url: str, path: str | Path | None = None) -> Path:
    """Where the file of ``url`` lies: ``path``, or torch hub's cache."""
    path = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(url).name))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fetch it with `curl -L --create-dirs -o {path} {url}`")
    return path


def _model_folder(name: str) -> Path:
    """A bundled or given model folder, or one of the Hugging Face cache."""
    on_hub = name.count("/") == 1 and name[0] not in "./"
    cached = try_to_load_from_cache(name, "config.json") if on_hub else None
    for folder in [Path(name), data_folder() / name, *([Path(cached).parent] if isinstance(cached, str) else [])]:
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(f"no model in {name!r} or {data_folder() / name}: if it is a hub id, `hf download {name}`")


def _load(kind, name: str, device):
    """A model in float32 for judging, and its folder; weights come from safetensors only."""
    folder = _model_folder(name)
    with without_bars():
        model = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return model.eval().to(device), folder


class _Judge:
    @cached_property
    def weights(self) -> str:
        """Which weights these are: the first 16 digits of their SHA-256."""
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class CopyDistance(_Judge):
    """1 - cosine similarity of copy-detection descriptors (SSCD; Pizzi et al. 2022): 0 for a copy.

    Args:
        name: "descriptor", the bundled one made by SSCD's recipe; another such folder; "sscd", the authors' TorchScript
            file in torch hub's cache; or the path of such a file (``*.pt``).
        sha256: checksum of the TorchScript file. TorchScript is code, so no other file is opened.

    SSCD sees pictures as its README recommends for batches: resized to 320 x 320, whatever their aspect.
    """

    def __init__(self, name: str = "descriptor", device: str | torch.device = "cpu", sha256: str = SSCD_SHA256):
        self.name, self.device, self._batch = str(name), torch.device(device), 256
        self._scripted = self.name == "sscd" or self.name.endswith(".pt")
        if self._scripted:
            path, self._batch = _downloaded(SSCD_URL, None if self.name == "sscd" else name), 32
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(f"{path} has the SHA-256 {found}, not {sha256}: it is not opened; fetch it again")
            self.network = torch.jit.load(path, map_location=self.device).eval()
        else:
            self.network, _ = _load(ResNetForImageClassification, self.name, self.device)

    def _describe(self, pictures: Tensor) -> Tensor:
        if not self._scripted:
            return self.network(pictures * 2 - 1).logits
        pixels = resize(pictures, [320, 320], antialias=True)
        return self.network(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(self, pictures: Tensor, batch_size: int | None = None) -> Tensor:
        """Unit descriptors [B, F]."""
        parts = _checked(pictures).split(batch_size or self._batch)
        with torch.inference_mode():
            found = torch.cat([self._describe(part.to(self.device, torch.float32)) for part in parts])
        return F.normalize(found, dim=1).cpu()

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of every picture of ``a`` to every one of ``b``, [A, B]."""
        return 1 - self.features(a) @ self.features(b).T

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]."""
        _one_each(a, b)
        return 1 - (self.features(a) * self.features(b)).sum(dim=1)


class PerceptualDistance:
    """LPIPS 0.1 (Zhang et al. 2018; package lpips) on AlexNet, its authors' choice: 0 for the same picture.

    ``weights`` is torchvision's file of AlexNet, by default where torch hub's cache keeps it.
    """

    def __init__(self, device: str | torch.device = "cpu", weights: str | Path | None = None):
        import lpips  # half a second that only this class needs

        path = _downloaded(AlexNet_Weights.IMAGENET1K_V1.url, weights)
        given = torch.load(path, map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, that lpips calls it in an old way
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        # lpips cuts torchvision's ``features`` into slices: slice1.0.weight is features.0.weight
        names = network.net.state_dict()
        network.net.load_state_dict({name: given["features." + name.split(".", 1)[1]] for name in names})
        self.network, self.device = network.to(device), device

    def __call__(self, a: Tensor, b: Tensor, batch_size: int = 64) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]; 64 x 64 pixels or more."""
        _one_each(a, b)
        batches = zip(_checked(a).split(batch_size), _checked(b).split(batch_size), strict=True)
        with torch.inference_mode():
            pairs = ((x.to(self.device, torch.float32) for x in pair) for pair in batches)
            return torch.cat([self.network(*pair, normalize=True).flatten() for pair in pairs]).cpu()


class Alignment(_Judge):
    """How well pictures fit words, by a CLIP (Radford et al. 2021).

    ``name`` is "clip", the bundled one; another CLIPModel folder; or a hub id such as "openai/clip-vit-large-patch14"
    that is in the local Hugging Face cache. Pictures are resized to CLIP's square, not cropped.
    """

    def __init__(self, name: str = "clip", device: str | torch.device = "cpu"):
        self.name = str(name)
        self.network, folder = _load(CLIPModel, self.name, device)
        if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
            raise OSError(f"{folder} has no tokenizer.json: transformers would go on with an empty vocabulary")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def picture_features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Unit image embeddings [B, F]."""
        side, parts = self.network.config.vision_config.image_size, []
        for part in _checked(pictures).split(batch_size):
            pixels = part.to(self.network.device, torch.float32)
            if pixels.shape[-2:] != (side, side):
                pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
            pixels = normalize(pixels, self.processor.image_mean, self.processor.image_std)
            with torch.inference_mode():
                parts.append(self.network.visual_projection(self.network.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings [B, F]."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.network.text_model(**tokens.to(self.network.device)).pooler_output
            return F.normalize(self.network.text_projection(states), dim=1).cpu()

    def score(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score: cosine of each picture with the text in its place, [B]."""
        _one_each(pictures, texts)
        return (self.picture_features(pictures) * self.text_features(texts)).sum(dim=1)

    def classify(self, features: Tensor, names: Sequence[str], phrase: str = "a picture of a {}") -> list[str]:
        """The one of ``names`` that fits each picture best, by `picture_features` [B, F] (zero-shot, top 1)."""
        texts = self.text_features([phrase.format(name) for name in names])
        return [names[i] for i in (features @ texts.T).argmax(dim=1).tolist()]


def diversity(features: Tensor) -> Tensor:
    """How unlike one prompt's seeds are: mean over all pairs of 1 - cosine of ``features`` [N, F], a scalar.

    0 where all are copies of one picture, NaN for one picture. Features of `CopyDistance` or `Alignment`.
    """
    unit = F.normalize(features.cpu().double(), dim=1)
    return F.pdist(unit).square().mean() / 2  # |a - b|^2 = 2 (1 - cosine), exact where a is nearly b


def _kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    return 1000 * torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2))


def _mean_between(sums: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over all pairs of different groups, and the same without each group in turn, [G].

    ``sums`` [G, G] is the kernel summed over the pairs of two groups, ``pairs`` [G, G] how many those are.
    """
    sums, pairs = (x.clone().fill_diagonal_(0) for x in (sums, pairs))
    without = (sums.sum() - 2 * sums.sum(dim=1)) / (pairs.sum() - 2 * pairs.sum(dim=1))
    return sums.sum() / pairs.sum(), without


def _squared_mmd(features: Tensor, references: Tensor, bandwidth: float, groups) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3), without each group [G], and without each reference [B]."""
    a, b = features.cpu().double(), references.cpu().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: leave those pictures out")
    names, code = np.unique(np.asarray(range(len(a)) if groups is None else groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all pictures are of group {names[0]!r}: an unbiased estimate needs pairs of two groups")
    member = F.one_hot(torch.as_tensor(code)).double()  # [A, G]
    sizes = member.sum(dim=0)
    own, own_without = _mean_between(member.T @ _kernel(a, a, bandwidth) @ member, torch.outer(sizes, sizes))
    real, real_without = _mean_between(_kernel(b, b, bandwidth), torch.ones(len(b), len(b)))
    cross = member.T @ _kernel(a, b, bandwidth)
    rest, rest_real = cross.sum() - cross.sum(dim=1), cross.sum() - cross.sum(dim=0)
    value = own + real - 2 * cross.sum() / (len(a) * len(b))
    without_group = own_without + real - 2 * rest / ((len(a) - sizes) * len(b))
    return value, without_group, own + real_without - 2 * rest_real / (len(a) * (len(b) - 1))


def cmmd(features: Tensor, references: Tensor, bandwidth: float = 10.0, groups: Sequence | None = None) -> Tensor:
    """CMMD (Jayasumana et al. 2024): unbiased squared MMD with a Gaussian kernel, times 1000, a scalar.

    About 0, on either side, where both come from one distribution.

    Args:
        features, references: [A, F] and [B, F], unit image features of `Alignment` for generated and real pictures.
        bandwidth: 10 is the authors', and wide: CMMD is nearly 10 times the squared distance of the mean features. One
            CLIP's values do not compare with another's.
        groups: [A], such as the prompt of each picture. Pictures of one prompt are not independent, so their
            pairs are left out, as a picture's pair with itself always is (the authors' code keeps the latter).
    """
    return _squared_mmd(features, references, bandwidth, groups)[0]


def cmmd_interval(features: Tensor, references: Tensor, groups: Sequence, bandwidth: float = 10.0):
    """95% interval of `cmmd`: low, high; NaN for fewer than 3 groups or references.

    A delete-one jackknife of the two-sample U-statistic over whole groups and over single references (Arvesen 1969),
    with Student's t. A bootstrap would draw pictures twice, whose pairs look like copies.
    """
    value, *without = _squared_mmd(features, references, bandwidth, groups)
    fewest = min(len(w) for w in without)
    variance = sum((len(w) - 1) * w.var(correction=0) for w in without)
    half = stats.t.ppf(0.975, fewest - 1) * variance.sqrt() if fewest > 2 else float("nan")
    return float(value - half), float(value + half)


def saturated_share(pictures: Tensor, beyond: float = 0.98) -> Tensor:
    """Share of RGB values beyond ``beyond`` of the range -1..1 on either side, [B]."""
    return ((_checked(pictures) * 2 - 1).abs() > beyond).float().flatten(1).mean(dim=1)


def layout_similarity(pictures: Tensor, references: Tensor, boxes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Centred correlation with the reference outside the object's box, [B] in -1..1.

    High when background and placement are the reference's, whatever object stands in the box. ``boxes`` are left, top
    and size in pixels.
    """
    results = []
    for picture, reference, (left, top, size) in zip(_checked(pictures), _checked(references), boxes, strict=True):
        outside = torch.ones(picture.shape[-2:], dtype=torch.bool)
        outside[top : top + size, left : left + size] = False
        a, b = (x[:, outside].flatten() - x[:, outside].mean() for x in (picture, reference))
        results.append(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-8))
    return torch.stack(results)


def mean_pairwise_distance(states: Tensor) -> Tensor:
    """Mean Euclidean distance between the B states at each step, [S], for ``states`` [B, S, ...].

    Divided by the square root of the state's length: 1.41 for unit Gaussian noise.
    """
    flat = states.flatten(2).transpose(0, 1).float()
    return torch.stack([F.pdist(step).mean() for step in flat]) / flat.shape[2] ** 0.5
