"""A world in the plane whose denoiser is known in closed form: what sampling finds can be checked exactly.

Pictures are points (x, y); a prompt weighs Gaussian components, of which a very narrow one is the duplicated picture.
The noised density is again a mixture, so its score, hence epsilon, is exact.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from .models import Denoiser


class MixtureDenoiser(Denoiser):
    """The exact epsilon of a Gaussian mixture in the plane, by default on Stable Diffusion's noise schedule.

    ``centres`` [K, 2] and ``deviations`` [K] are of the components; a prompt, "" for none, has K weights.

    >>> MixtureDenoiser.with_duplicate().draw(5, "memorized").shape
    torch.Size([5, 2, 1, 1])
    """

    latent_shape = (2, 1, 1)

    def __init__(self, centres, deviations, prompts: Mapping[str, Sequence], scheduler=None, dtype=torch.float32):
        self.name, self.device, self.dtype = "mixture", torch.device("cpu"), dtype
        self.centres, self.deviations = (torch.tensor(np.asarray(x), dtype=dtype) for x in (centres, deviations))
        self.weights = {prompt: torch.tensor(np.asarray(w), dtype=dtype) for prompt, w in prompts.items()}
        if "" not in self.weights:
            raise ValueError(f"the prompts {list(prompts)} have no '': give the unconditional weights under it")
        for prompt, weights in self.weights.items():
            if weights.shape != self.deviations.shape or abs(float(weights.sum()) - 1) > 1e-5:
                raise ValueError(f"weights of {prompt!r} are {weights.tolist()}: give {len(self.deviations)}, of sum 1")
        betas = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}
        self.scheduler = scheduler or DPMSolverMultistepScheduler(**betas)

    @classmethod
    def with_duplicate(cls, share: float = 0.8, **options) -> "MixtureDenoiser":
        """Six broad modes on a ring and one duplicated point, which is drawn once in a hundred without a prompt.

        "memorized" means the duplicate in ``share`` of its uses and else the first mode, "ordinary" always that one.
        """
        angles = np.pi / 3 * np.arange(6)
        ring = 6 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        prompts = {"": [*[0.99 / 6] * 6, 0.01], "ordinary": [1, *[0] * 6], "memorized": [1 - share, *[0] * 5, share]}
        return cls([*ring, (2.0, -2.5)], [*[0.9] * 6, 0.05], prompts, **options)

    @property
    def duplicate(self) -> Tensor:
        """The last component's centre as a picture, [2, 1, 1]."""
        return self.centres[-1].view(self.latent_shape)

    def fingerprint(self) -> str:
        numbers = torch.cat([self.centres.flatten(), self.deviations, *self.weights.values()])
        return hashlib.sha256(numbers.double().numpy().tobytes() + "\n".join(self.weights).encode()).hexdigest()[:16]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Weights over the components, [B, 1, K]."""
        if missing := [p for p in prompts if p not in self.weights]:
            raise ValueError(f"no prompt {missing[0]!r} in this world; it has {list(self.weights)}")
        return torch.stack([self.weights[p] for p in prompts])[:, None]

    def __call__(self, latents: Tensor, timestep: int | Tensor, embedding: Tensor) -> Tensor:
        """epsilon = -sqrt(1 - alpha_bar) grad log p_t(x), [B, 2, 1, 1]."""
        log_parts, away, variance = self._parts(latents, timestep, embedding)
        pull = (log_parts.softmax(dim=1) / variance)[:, :, None] * away
        return (-(1 - self.alpha_bar(timestep).to(latents)).sqrt() * pull.sum(dim=1)).view_as(latents)

    def _parts(self, latents: Tensor, timestep: int | Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component at x_t: log density [B, K], the way to its centre [B, K, 2], its variance [K]."""
        alpha_bar = self.alpha_bar(timestep).to(latents)
        variance = alpha_bar * self.deviations**2 + 1 - alpha_bar
        away = alpha_bar.sqrt() * self.centres - latents.flatten(1)[:, None]
        return embedding[:, 0].log() - variance.log() - away.square().sum(dim=2) / (2 * variance), away, variance

    def log_density(self, latents: Tensor, timestep: int | Tensor, prompt: str) -> Tensor:
        """log p_t(x | prompt) without its constant, [B]."""
        return self._parts(latents, timestep, self.embed([prompt]))[0].logsumexp(dim=1)

    def classifier_gradient(self, latents: Tensor, timestep: int, prompt: str) -> Tensor:
        """The gradient of a perfect noise-aware classifier, grad_x log p_t(prompt | x): [B, 2, 1, 1]."""
        x, of = latents.clone().requires_grad_(), self.log_density
        return torch.autograd.grad((of(x, timestep, prompt) - of(x, timestep, "")).sum(), x)[0]

    def draw(self, count: int, prompt: str, seed: int = 0) -> Tensor:
        """Clean points of a prompt, [count, 2, 1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.embed([prompt])[0, 0], count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator).to(self.dtype)
        return (self.centres[which] + self.deviations[which, None] * noise).view(count, *self.latent_shape)

    def decode(self, latents: Tensor) -> Tensor:  # points are their own pictures
        return latents.cpu()


class PlaneDistance:
    """Euclidean distance as D.

    >>> PlaneDistance()(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).tolist()
    [5.0]
    """

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:  # [A, B]
        return torch.cdist(a.flatten(1).double(), b.flatten(1).double())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:  # [B]
        return (a.double() - b.double()).flatten(1).norm(dim=1)
