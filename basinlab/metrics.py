"""Numbers about pictures: copies, perceptual distance, alignment, quality, diversity, colour.

Every metric takes tensors and returns tensors on the CPU; pictures are [B, 3, height, width]
float in 0..1. A distance D (paper, Definition 2) is an object with ``features(pictures)``,
[B, F] of unit length, and ``pairs(a, b)``, [A, B]; the bundled one is a copy-detection
descriptor. Judges carry ``name``, which says what was used. Nothing is downloaded: where weights
are missing, a judge raises an error, and `perceptual_distance` and `frechet_distance`, whose
weights cannot be bundled, warn and give None, each saying how to fetch them.
"""

import hashlib
import importlib.util
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from scipy import stats
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import get_model_weights
from torchvision.transforms.functional import normalize, resize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification

from .models import HUB_ID, RESTORE, data_folder, without_bars

_SSCD_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/"
_SSCD_SHA256 = {  # its authors give none; this one is pinned alike by several projects that fetched the file
    "sscd_disc_mixup.torchscript.pt": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
}
_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
_CLIP_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _checked(pictures: Tensor) -> Tensor:
    """The same pictures; ValueError, with the cure, if they are no [B, 3, height, width] floats in 0..1."""
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures have shape {list(pictures.shape)}: give [B, 3, height, width]")
    if not pictures.is_floating_point():
        raise ValueError(f"pictures are {pictures.dtype}: give floats in 0..1, such as pictures / 255")
    broken = (~pictures.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(pictures)} pictures hold NaN or infinity, the first at index {broken[0]}: "
            "leave them out, or sample them again in float32"
        )
    if ((pictures < -1e-3) | (pictures > 1 + 1e-3)).any():
        low, high = (float(x) for x in pictures.aminmax())
        raise ValueError(f"pictures range from {low:.3g} to {high:.3g}: give 0..1, such as pictures / 2 + 0.5 of -1..1")
    return pictures


def _one_each(a: Sequence, b: Sequence, what: str) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} pictures and {len(b)} {what}: give one for each")


@contextmanager
def _reading(path: Path, cure: str):
    """Turns what the libraries say of a damaged file into an OSError that names it."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        # torch's own words advise to read the file without care, so they stay in the traceback
        raise OSError(f"the weights in {path} are missing, truncated, corrupt or of another kind; {cure}") from error


def _downloaded(what: str, url: str, path: str | Path | None = None) -> Path:
    """Where the file of ``url`` lies, ``path`` or torch hub's cache; FileNotFoundError says how to fetch it."""
    path = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(url).name))
    if not path.is_file():
        raise FileNotFoundError(f"{what} are not at {path}: fetch them with `curl -L --create-dirs -o {path} {url}`")
    return path


def _check_sha256(path: Path, expected: str | None) -> None:
    """ValueError unless the file's checksum is the expected one: TorchScript is code, and runs when it is opened."""
    if expected is None:
        known = ", ".join(_SSCD_SHA256)
        raise ValueError(
            f"no checksum is known for {path}, which is TorchScript, that is code: give it as sha256=..., "
            f"from a source that you trust, or give {known}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} has the SHA-256 {found}, not {expected}: it is not opened; fetch it again")


def _hub_folder(name: str) -> Path:
    """The folder of the CLIP ``name`` in the local Hugging Face cache; says which files are missing otherwise."""
    found = {file: try_to_load_from_cache(name, file) for file in _CLIP_FILES}
    missing = [file for file, path in found.items() if not isinstance(path, str)]
    if missing:
        raise ValueError(
            f"no CLIP in {name!r} or {data_folder() / name}, and the Hugging Face cache {constants.HF_HUB_CACHE} "
            f"lacks {', '.join(missing)} of it: fetch them with `hf download {name} {' '.join(_CLIP_FILES)}`"
        )
    return Path(found["config.json"]).parent


def _model_folder(name: str, wants: str, hub: bool = False) -> Path:
    """A bundled or given model folder, or one of the Hugging Face cache; says what is missing otherwise."""
    for folder in (Path(name), data_folder() / name):
        if (folder / "config.json").exists():
            return folder
    if hub and re.fullmatch(HUB_ID, name):
        return _hub_folder(name)
    raise ValueError(f"no {wants} in {name!r} or {data_folder() / name}: restore it with `git checkout -- data`")


def _load(kind, folder: Path):
    """A model in float32 for judging, or an error that names the damaged folder."""
    with _reading(folder, RESTORE), without_bars():
        return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True).eval()


class CopyDistance:
    """1 - cosine similarity of copy-detection descriptors (SSCD; Pizzi et al. 2022): 0 for a copy.

    Args:
        name: folder of the descriptor (default the bundled one, made by SSCD's recipe), or the path of
            an SSCD TorchScript file (``*.pt``), such as ``sscd_disc_mixup.torchscript.pt``. TorchScript
            is code: only the file that you name is opened, and only once its checksum is right.
        device: where it runs.
        sha256: of a TorchScript file; that of ``sscd_disc_mixup.torchscript.pt`` is known.

    An SSCD file sees pictures as its README recommends for batches: resized to 320 x 320 (bilinear,
    antialiased), whatever their aspect, and normalized with ImageNet's mean and deviation.

    Raises:
        ValueError: no such folder, or a TorchScript file without a checksum, or with another one.
        OSError: a weight file is missing, truncated or corrupt.
    """

    def __init__(self, name: str = "descriptor", device: str | torch.device = "cpu", sha256: str | None = None):
        self.name, self.device = str(name), torch.device(device)
        self._scripted = self.name.endswith(".pt")
        if self._scripted:
            path = _downloaded("SSCD weights (facebookresearch/sscd-copy-detection)", _SSCD_URL + Path(name).name, name)
            _check_sha256(path, sha256 or _SSCD_SHA256.get(path.name))
            with _reading(path, "give one of SSCD's files named *.torchscript.pt, fetched again"):
                self.network = torch.jit.load(path, map_location=self.device).eval()
        else:
            folder = _model_folder(self.name, "copy-detection descriptor")
            self.network = _load(ResNetForImageClassification, folder).to(self.device)

    def _describe(self, pictures: Tensor) -> Tensor:
        if not self._scripted:
            return self.network(pictures * 2 - 1).logits
        pixels = resize(pictures, [320, 320], antialias=True)
        return self.network(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(self, pictures: Tensor, batch_size: int | None = None) -> Tensor:
        """Unit descriptors [B, F]; ``batch_size`` is 256, for SSCD's larger pictures 32, by default."""
        size = batch_size or (32 if self._scripted else 256)
        with torch.inference_mode():
            parts = [self._describe(p.to(self.device, torch.float32)) for p in _checked(pictures).split(size)]
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of every picture of ``a`` to every one of ``b``, [A, B]."""
        return 1 - self.features(a) @ self.features(b).T

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]."""
        _one_each(a, b, "references")
        return 1 - (self.features(a) * self.features(b)).sum(dim=1)


class PerceptualDistance:
    """LPIPS 0.1 (Zhang et al. 2018; package lpips): 0 for the same picture.

    Args:
        net: "alex" (its authors' choice for comparing), "vgg" or "squeeze".
        weights: file of the torchvision backbone (default: where torch hub's cache keeps it).
        device: where it runs.

    Raises:
        ValueError: no such net.
        FileNotFoundError: the backbone's weights are missing; the message has the command that fetches them.
        OSError: they are truncated, corrupt or another network's.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None, device: str | torch.device = "cpu"):
        import lpips  # half a second that only this class needs

        if net not in _LPIPS_BACKBONES:
            raise ValueError(f"LPIPS has no net {net!r}: give one of {list(_LPIPS_BACKBONES)}")
        self.name, self.device = f"lpips-{net}", torch.device(device)
        url = get_model_weights(_LPIPS_BACKBONES[net]).IMAGENET1K_V1.url
        path = _downloaded(f"the weights of LPIPS's backbone {_LPIPS_BACKBONES[net]}", url, weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, that lpips calls it in an old way
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        with _reading(path, f"fetch them again from {url}"):
            given = torch.load(path, map_location="cpu", weights_only=True)
            # lpips cuts torchvision's ``features`` into slices: slice1.0.weight is features.0.weight
            names = network.net.state_dict()
            network.net.load_state_dict({name: given["features." + name.split(".", 1)[1]] for name in names})
        self.network = network.to(self.device)

    def __call__(self, a: Tensor, b: Tensor, batch_size: int = 64) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]; 64 x 64 pixels or more."""
        _one_each(a, b, "references")
        batches = zip(_checked(a).split(batch_size), _checked(b).split(batch_size), strict=True)
        with torch.inference_mode():
            parts = [
                self.network(*(x.to(self.device, torch.float32) for x in pair), normalize=True).flatten()
                for pair in batches
            ]
        return torch.cat(parts).cpu()


def perceptual_distance(
    net: str = "alex", weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> PerceptualDistance | None:
    """A `PerceptualDistance`; where its backbone's weights are missing, None and a warning that says so."""
    try:
        return PerceptualDistance(net, weights, device)
    except FileNotFoundError as missing:
        warnings.warn(f"LPIPS: not measured; {missing}", stacklevel=2)
        return None


class Alignment:
    """How well pictures fit words, by a CLIP (Radford et al. 2021).

    Args:
        name: the bundled one, any local CLIPModel folder, or a name such as "openai/clip-vit-large-patch14"
            of a model that is in the local Hugging Face cache. Weights are read from safetensors only.
        device: where it runs.

    Pictures are resized to CLIP's square, not cropped.

    Raises:
        ValueError: no such folder, or files that are missing from the cache, with the command that fetches them.
        OSError: a file of the folder is missing, truncated or corrupt.
    """

    def __init__(self, name: str = "clip", device: str | torch.device = "cpu"):
        self.name = str(name)
        folder = _model_folder(self.name, "CLIP", hub=True)
        self.model = _load(CLIPModel, folder).to(device)
        if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
            # transformers would go on with an empty vocabulary
            raise OSError(f"{folder} has no tokenizer.json: restore that folder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def picture_features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Unit image embeddings [B, F]."""
        side = self.model.config.vision_config.image_size
        parts = []
        with torch.inference_mode():
            for part in _checked(pictures).split(batch_size):
                pixels = part.to(self.model.device, torch.float32)
                if pixels.shape[-2:] != (side, side):
                    pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
                pixels = normalize(pixels, self.processor.image_mean, self.processor.image_std)
                parts.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings [B, F]."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            return F.normalize(self.model.text_projection(states), dim=1).cpu()

    def score(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score: cosine of each picture with the text in its place, [B]."""
        _one_each(pictures, texts, "texts")
        return (self.picture_features(pictures) * self.text_features(texts)).sum(dim=1)

    def classify(self, pictures: Tensor, names: Sequence[str], phrase: str = "a picture of a {}") -> Tensor:
        """Index into ``names`` of the name that fits best, [B] (zero-shot, top 1)."""
        texts = self.text_features([phrase.format(name) for name in names])
        return (self.picture_features(pictures) @ texts.T).argmax(dim=1)


def object_right(alignment: Alignment, pictures: Tensor, wanted: Sequence[str], names: Sequence[str]) -> Tensor:
    """Whether the object named ``wanted`` is, of all ``names``, the one that CLIP sees, [B] bool."""
    found = alignment.classify(pictures, names).tolist()
    return torch.tensor([names[i] == name for i, name in zip(found, wanted, strict=True)])


def _checked_features(features: Tensor) -> Tensor:
    """The same features in float64 on the CPU; ValueError if they are not finite [N, F] with N of 2 or more."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {list(features.shape)}: give [N, F] of at least 2 pictures")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity: leave those pictures out")
    return features.cpu().double()


def diversity(features: Tensor) -> Tensor:
    """How unlike one prompt's seeds are: mean over all pairs of 1 - cosine of ``features`` [N, F], a scalar.

    0 where all are copies of one picture. Features of `CopyDistance` or `Alignment`. Raises ValueError for N < 2.
    """
    unit = F.normalize(_checked_features(features), dim=1)
    return F.pdist(unit).square().mean() / 2  # |a - b|^2 = 2 (1 - cosine), exact where a is nearly b


def cmmd_kernel(a: Tensor, b: Tensor, bandwidth: float = 10.0) -> Tensor:
    """CMMD's kernel, [A, B]: Gaussian, times 1000."""
    return 1000 * torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2))


def kid_kernel(a: Tensor, b: Tensor) -> Tensor:
    """KID's kernel, [A, B]: cubic."""
    return (a @ b.T / a.shape[1] + 1) ** 3


Kernel = Callable[[Tensor, Tensor], Tensor]


def _mean_between(sums: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over all pairs of different groups, and the same without each group in turn, [G].

    Args:
        sums: [G, G], kernel summed over the pairs of two groups.
        pairs: [G, G], how many those are.
    """
    sums, pairs = (x.clone().fill_diagonal_(0) for x in (sums, pairs))
    without = (sums.sum() - 2 * sums.sum(dim=1)) / (pairs.sum() - 2 * pairs.sum(dim=1))
    return sums.sum() / pairs.sum(), without


def _squared_mmd(
    features: Tensor, references: Tensor, kernel: Kernel, groups: Sequence | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3), without each group [G], and without each reference [B]."""
    a, b = _checked_features(features), _checked_features(references)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape[1]} wide, references {b.shape[1]}: take both from one network")
    groups = range(len(a)) if groups is None else groups
    _one_each(a, groups, "groups")
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all pictures are of group {names[0]!r}: an unbiased estimate needs pairs of two groups")
    code = torch.as_tensor(code)
    sizes = torch.bincount(code).double()

    def by_group(values: Tensor) -> Tensor:
        return values.new_zeros(len(names), values.shape[1]).index_add_(0, code, values)

    own, own_without = _mean_between(by_group(by_group(kernel(a, a)).T), torch.outer(sizes, sizes))
    real, real_without = _mean_between(kernel(b, b), torch.ones(len(b), len(b), dtype=b.dtype))
    cross = by_group(kernel(a, b))
    rest, rest_real = cross.sum() - cross.sum(dim=1), cross.sum() - cross.sum(dim=0)
    return (
        own + real - 2 * cross.sum() / (len(a) * len(b)),
        own_without + real - 2 * rest / ((len(a) - sizes) * len(b)),
        own + real_without - 2 * rest_real / (len(a) * (len(b) - 1)),
    )


def cmmd(
    features: Tensor, references: Tensor, bandwidth: float = 10.0, groups: Sequence | Tensor | None = None
) -> Tensor:
    """CMMD (Jayasumana et al. 2024): unbiased squared MMD with a Gaussian kernel, times 1000, a scalar.

    About 0, on either side, where both come from one distribution.

    Args:
        features, references: [A, F] and [B, F], unit image features of `Alignment` for pictures made and real.
        bandwidth: 10 is the authors', for unit features of ViT-L/14 at 336 pixels (their CLIP returns unit
            length). On any unit features it is wide: 1000 exp(-d^2 / 200) is nearly linear in d^2, and CMMD nearly
            10 times the squared distance of the two mean features. It is kept so that the number has the
            authors' unit, but one CLIP's values do not compare with another's. About 0.5 sees more than means.
        groups: [A], such as the prompt of each picture. Pictures of one prompt are not independent, so their
            pairs are left out, as a picture's pair with itself always is (the authors' code keeps the latter).

    Raises ValueError for fewer than 2 pictures or groups, widths that differ, or NaN.
    """
    return _squared_mmd(features, references, lambda a, b: cmmd_kernel(a, b, bandwidth), groups)[0]


def kid(features: Tensor, references: Tensor, groups: Sequence | Tensor | None = None) -> Tensor:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (a.b / F + 1)^3, a scalar.

    Theirs takes Inception features; the features of any network will do. Arguments and errors as of `cmmd`.
    """
    return _squared_mmd(features, references, kid_kernel, groups)[0]


def mmd_interval(
    features: Tensor,
    groups: Sequence | Tensor,
    references: Tensor,
    kernel: Kernel = cmmd_kernel,
    confidence: float = 0.95,
) -> Tensor:
    """Interval of `cmmd` or, with ``kernel=kid_kernel``, of `kid`, both with the same ``groups``: [low, high].

    A delete-one jackknife of the two-sample U-statistic over whole prompts and over single references
    (Arvesen 1969), with Student's t. A bootstrap would draw pictures twice, whose pairs look like copies.
    Where both distributions are one, it is too wide rather than too narrow.

    Raises ValueError for fewer than 3 groups or 3 references, and as `cmmd` does.
    """
    value, *without = _squared_mmd(features, references, kernel, groups)
    fewest = min(len(w) for w in without)
    if fewest < 3:
        raise ValueError(f"{len(without[0])} groups and {len(without[1])} references: an interval needs 3 of each")
    variance = sum((len(w) - 1) * w.var(correction=0) for w in without)
    half = stats.t.ppf(0.5 + confidence / 2, fewest - 1) * variance.sqrt()
    return torch.stack([value - half, value + half])


def _inception_distance(layer: int, weights: str | Path | None) -> FrechetInceptionDistance:
    """torchmetrics' metric with the weights given, or an error that says what is missing."""
    if layer not in (64, 192, 768, 2048):
        raise ValueError(f"Inception has no layer {layer}: give 64, 192, 768 or 2048")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModuleNotFoundError("the package torch-fidelity is missing: `pip install torch-fidelity==0.4.0`")
    path = _downloaded("Inception's weights", _INCEPTION_URL, weights)
    with _reading(path, f"fetch them again from {_INCEPTION_URL}"):
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run code in it
        return FrechetInceptionDistance(layer, feature_extractor_weights_path=str(path))


def frechet_distance(
    pictures: Tensor,
    references: Tensor,
    weights: str | Path | None = None,
    *,
    layer: int | torch.nn.Module = 2048,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> Tensor | None:
    """FID (Heusel et al. 2017) by torchmetrics, a scalar; None, and a warning, where Inception is not at hand.

    Args:
        pictures, references: [A, 3, height, width] and [B, 3, height, width]; rounded to 8 bits. Biased upwards
            for few pictures, and 2048 features want well over 2048 of them: compare equal counts only.
        weights: file of torch-fidelity's Inception (default: where torch hub's cache keeps it).
        layer: 64, 192, 768 or 2048, the features of Inception, or a module from uint8 pictures to [B, F].
        device: where it runs; its sums are float64, so not on mps.

    Raises:
        ValueError: fewer than 2 pictures or references, or bad ones.
        OSError: the weights are truncated, corrupt or another network's.
    """
    if min(len(pictures), len(references)) < 2:
        raise ValueError(f"{len(pictures)} pictures and {len(references)} references: a covariance needs 2 of each")
    sets = {True: _checked(references), False: _checked(pictures)}
    try:
        if isinstance(layer, torch.nn.Module):
            metric = FrechetInceptionDistance(layer, input_img_size=tuple(pictures.shape[1:]))
        else:
            metric = _inception_distance(layer, weights)
    except (FileNotFoundError, ModuleNotFoundError) as missing:
        warnings.warn(f"FID: not measured; {missing}", stacklevel=2)
        return None
    metric.to(device)
    for real, batch in ((real, batch) for real, whole in sets.items() for batch in whole.split(batch_size)):
        metric.update((batch * 255).round().byte().to(device), real=real)
    return metric.compute().cpu()


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B] (torchmetrics)."""
    return peak_signal_noise_ratio(
        _checked(pictures), _checked(references), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


def saturated_share(pictures: Tensor, beyond: float = 0.98) -> Tensor:
    """Share of RGB values beyond ``beyond`` of the range -1..1 on either side, [B]."""
    return ((_checked(pictures) * 2 - 1).abs() > beyond).float().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Box:
    """Where an object stands in a picture, in pixels."""

    left: int
    top: int
    size: int


def layout_similarity(pictures: Tensor, references: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Masked similarity: centred correlation with the reference outside the object's box, [B] in -1..1.

    High when background and placement came back, whatever object stands in the box.
    """
    results = []
    for picture, reference, box in zip(_checked(pictures), _checked(references), boxes, strict=True):
        outside = torch.ones(picture.shape[-2:], dtype=torch.bool)
        outside[box.top : box.top + box.size, box.left : box.left + box.size] = False
        a, b = (x[:, outside].flatten() - x[:, outside].mean() for x in (picture, reference))
        results.append(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-8))
    return torch.stack(results)


def background_colour(pictures: Tensor, border: int = 2) -> Tensor:
    """Median colour of the outermost ``border`` pixels, [B, 3]."""
    edge = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    edge[border:-border, border:-border] = False
    return _checked(pictures)[:, :, edge].median(dim=2).values


def mean_pairwise_distance(states: Tensor) -> Tensor:
    """Mean Euclidean distance between the B states at each step, [S], for ``states`` [B, S, ...].

    Divided by the square root of the state's length: 1.41 for unit Gaussian noise.
    """
    flat = states.flatten(2).transpose(0, 1).float()
    return torch.stack([F.pdist(step).mean() for step in flat]) / flat.shape[2] ** 0.5
