"""The mitigations of earlier work, each from its paper, through one interface.

A `Mitigation` changes prompt, embedding, attention or initial noise of every sample by itself. What it draws at random
depends on the seed, apart from the initial noise. Constants are the authors', for Stable Diffusion's 4x64x64 latents:
lengths scale with the square root of the latent's size, guidance magnitudes at T with sqrt(alpha_bar_T) as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .guidance import ConstantGuidance
from .models import Denoiser
from .sampling import Mitigation, State, sample
from .store import kept, output_folder


def _random(mitigation: Mitigation, seed: int, *more: int) -> np.random.Generator:  # of one sample
    return np.random.default_rng([seed, crc32(type(mitigation).__name__.encode()), *more])


def _noise(mitigation: Mitigation, state: State, *more: int) -> Tensor:
    """Unit Gaussian noise of the embeddings' shape, [B, L, E], one stream a sample."""
    streams = [_random(mitigation, seed, *more) for seed in state.seeds]
    drawn = [rng.standard_normal(state.conditional.shape[1:], np.float32) for rng in streams]
    return torch.from_numpy(np.stack(drawn)).to(state.conditional)


@dataclass(frozen=True)
class _Insertion(Mitigation):
    """``count`` words at random places of the prompt (Somepalli et al., NeurIPS 2023, arXiv 2305.20086; theirs: 4)."""

    count: int = 4

    def text(self, prompt: str, seed: int, denoiser: Denoiser) -> str:
        rng, words = _random(self, seed, crc32(prompt.encode())), prompt.split()
        for _ in range(self.count):
            words.insert(int(rng.integers(len(words) + 1)), self._word(prompt, rng, denoiser))
        return " ".join(words)


class RandomNumbers(_Insertion):
    """RNA: random numbers below 100,000 in the prompt (Somepalli et al. 2023; theirs: 4)."""

    def _word(self, prompt, rng, denoiser):
        return str(rng.integers(100_000))


class RandomTokens(_Insertion):
    """RTA: random tokens of the vocabulary in the prompt (Somepalli et al. 2023; theirs: 4)."""

    def _word(self, prompt, rng, denoiser):
        usual = sorted({*range(len(denoiser.tokenizer))} - {*denoiser.tokenizer.all_special_ids})
        return denoiser.tokenizer.decode([int(rng.choice(usual))]).strip()


class RepeatedWords(_Insertion):
    """CWR: words of the caption once more (Somepalli et al. 2023; theirs: 4)."""

    def _word(self, prompt, rng, denoiser):
        return str(rng.choice(prompt.split()))


@dataclass(frozen=True)
class EmbeddingNoise(Mitigation):
    """GNI: Gaussian noise of deviation ``scale`` on the prompt's embedding (Somepalli et al. 2023; theirs: 0.1)."""

    scale: float = 0.1

    def begin(self, state):
        state.conditional = state.conditional + self.scale * _noise(self, state)


@dataclass(frozen=True)
class ConditionAnnealing(Mitigation):
    """CADS: noise on the embedding that fades while sampling goes on (Sadat et al., ICLR 2024, arXiv 2310.17347).

    y_t = sqrt(gamma) y + scale sqrt(1 - gamma) n, brought back to mean and deviation of y; gamma rises from 0 at
    ``first`` (tau_2) to 1 at ``last`` (tau_1); ``mixing`` (psi) is 1 for full rescaling. Defaults: Jain et al.'s code.
    """

    scale: float = 0.1
    first: int = 800
    last: int = 500
    mixing: float = 1.0

    def __post_init__(self):
        if self.first <= self.last:
            raise ValueError(f"first is {self.first}, last {self.last}: sampling goes down, give first > last")

    def condition(self, conditional, state, timestep):
        gamma = min(1.0, max(0.0, (self.first - timestep) / (self.first - self.last)))
        if gamma == 1:
            return conditional
        noisy = gamma**0.5 * conditional + self.scale * (1 - gamma) ** 0.5 * _noise(self, state, timestep)
        over = {"dim": (1, 2), "keepdim": True}
        rescaled = (noisy - noisy.mean(**over)) / noisy.std(**over) * conditional.std(**over) + conditional.mean(**over)
        return self.mixing * rescaled + (1 - self.mixing) * noisy


@dataclass(frozen=True)
class CrossAttentionMask(Mitigation):
    """Cross-attention without the tokens after the prompt, and more of it to the begin token.

    Ren et al., ECCV 2024 (arXiv 2403.11052). The padding, which repeats the end token and sums the prompt up, is
    masked, with ``keep_end=False`` the first end token too. Logits of the begin token are times ``begin_scale``, 1.25.
    """

    begin_scale: float = 1.25
    keep_end: bool = True

    def begin(self, state):
        lengths = [len(ids) for ids in state.denoiser.tokenizer(state.texts, truncation=True).input_ids]
        kept = torch.tensor(lengths)[:, None] - int(not self.keep_end)
        scale = (torch.arange(state.conditional.shape[1]) < kept).to(state.conditional)
        scale[:, 0] = self.begin_scale
        state.token_scale = scale


def _difference(state: State, latents: Tensor, conditional: Tensor) -> Tensor:
    """eps_c - eps_u, [B, C, H, W], at the first step."""
    t = state.scheduler.timesteps[0]
    inputs = state.scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
    first, second = state.denoiser(inputs, t, torch.cat([conditional, state.unconditional])).chunk(2)
    return (first - second) * state.denoiser.epsilon_scale(t)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class _Descent(Mitigation):
    """Gradient steps until ``loss(state, x)`` [B] is at most ``target`` for a sample, or ``iterations`` are over."""

    calls, optimizer = 2, torch.optim.AdamW

    def most_predictions(self):
        return self.calls * (3 * self.iterations + 1)

    def begin(self, state):
        state.latents = self._descend(state, state.latents)

    def _descend(self, state: State, start: Tensor) -> Tensor:
        """``start`` [B, ...], changed. Steps are made in float32, where the optimizer's squares do not underflow."""
        with torch.inference_mode(False), torch.enable_grad():
            variable = start.detach().float().clone().requires_grad_()
            steps, reached = self.optimizer([variable], lr=self.rate), torch.zeros(len(start), dtype=torch.bool)
            for iteration in range(self.iterations + 1):
                losses = self.loss(state, variable.to(start.dtype))
                state.calls = state.calls + self.calls * ~reached
                reached = reached | (losses.detach() <= self.target).cpu()
                if reached.all() or iteration == self.iterations:
                    break
                state.gradient_passes = state.gradient_passes + self.calls * ~reached
                before = variable.detach().clone()
                (variable.grad,) = torch.autograd.grad(losses.sum(), [variable])
                steps.step()
                with torch.no_grad():
                    variable[reached] = before[reached]
            return variable.detach().to(start.dtype)


@dataclass(frozen=True)
class PromptOptimization(_Descent):
    """The embedding moved until the guidance magnitude at the first step is at most ``target``.

    Wen et al., ICLR 2024 (arXiv 2407.21720, their aug_prompt): min over e of ||eps(x_T, e) - eps(x_T, e_empty)||, by
    AdamW on all tokens but the begin token. Defaults are theirs for Stable Diffusion 1.4.
    """

    target: float = 3.0
    rate: float = 0.05
    iterations: int = 10

    def loss(self, state, tokens):
        return _norm(_difference(state, state.latents, torch.cat([state.conditional[:, :1], tokens], 1)))

    def begin(self, state):
        moved = self._descend(state, state.conditional[:, 1:])
        state.conditional = torch.cat([state.conditional[:, :1], moved], 1)


@dataclass(frozen=True)
class NoiseDescent(_Descent):
    """Initial noise moved by AdamW until the guidance magnitude at T is at most ``target``.

    Han et al., NeurIPS 2025 (arXiv 2510.08625), per sample: min over x_T of ||eps_c - eps_u||. Defaults are theirs.
    """

    target: float = 0.9
    rate: float = 0.01
    iterations: int = 1000

    def loss(self, state, latents):
        return _norm(_difference(state, latents, state.conditional))


@dataclass(frozen=True)
class NoiseAscent(Mitigation):
    """Initial noise moved away from where the guidance grows, without gradients.

    Han et al., NeurIPS 2025 (arXiv 2510.08625), batch-wise: with g = eps_c - eps_u, each iteration replaces x_T by
    x_T - gamma (g(x_T + rho g / ||g||) - g(x_T)). Theirs samples with CFG from the fifth step on. Defaults are theirs.
    """

    calls = 4
    rho: float = 50.0
    gamma: float = 0.7
    iterations: int = 2

    def begin(self, state):
        for _ in range(self.iterations):
            here = _difference(state, state.latents, state.conditional)
            ahead = state.latents + self.rho * here / _norm(here)[:, None, None, None]
            there = _difference(state, ahead, state.conditional)
            state.latents = state.latents - self.gamma * (there - here)
            state.calls = state.calls + self.calls


@dataclass(frozen=True)
class SharpnessAwareNoise(_Descent):
    """SAIL: initial noise where the conditional density is flat.

    Jeon et al., ICML 2025 (arXiv 2412.04140, algorithm 2): Adam on the guidance magnitude ``radius`` ahead along the
    guidance (the sharpness) plus ``pull`` times the norm of the noise, until the sum is at most ``target``. Theirs
    draws new noise for a sample that misses it; here it keeps what it reached. Defaults are theirs.
    """

    calls, optimizer = 4, torch.optim.Adam
    target: float = 8.2
    radius: float = 1.0
    pull: float = 0.05
    rate: float = 0.05
    iterations: int = 10

    def loss(self, state, latents):
        here = _difference(state, latents, state.conditional)
        ahead = latents + self.radius * here / _norm(here)[:, None, None, None]
        return _norm(_difference(state, ahead, state.conditional)) + self.pull * _norm(latents)


@dataclass(frozen=True)
class SpikeDamping(Mitigation):
    """GUARD (Zhao et al., ICML 2026): logits of spike tokens times ``scale`` in what `AttractRepel` goes towards.

    A spike's largest logit has a z-score above ``limit``. Defaults are theirs; they choose heads, here are all of them.
    """

    scale: float = 0.3
    limit: float = 0.1

    def begin(self, state):
        if self.scale != 1:
            state.spikes = state.conditional.new_tensor([[self.scale, self.limit]]).expand(len(state.seeds), -1)


@dataclass(frozen=True)
class Reanchoring(Mitigation):
    """PRSS (Chen et al., CVPR 2025): n + s (p - n), from the prompt n to another phrasing p: CFG with n for the empty.

    It acts where the magnitude at T is above ``limit``, theirs 3; their weight grows with it. Their phrasings are of a
    language model; here p is the prompt's words in another order, which needs none but is less of a sentence.
    """

    calls = 2
    limit: float = 3.0

    def begin(self, state):
        above = (_norm(_difference(state, state.latents, state.conditional)) > self.limit)[:, None, None]
        of = zip(state.seeds, state.texts, strict=True)
        texts = [" ".join(_random(self, seed).permutation(text.split())) for seed, text in of]
        state.unconditional = torch.where(above, state.conditional, state.unconditional)
        state.conditional = torch.where(above, state.denoiser.embed(texts), state.conditional)
        state.calls = state.calls + self.calls


def ordinary_norms(denoiser: Denoiser, prompts: Sequence[str], guidance=None, steps=50, scheduler=None) -> Tensor:
    """Mean and deviation [2, S, 3] of the norms of prediction, update and latents, over ``prompts``, a seed each."""
    seen = []

    class Onlooker(Mitigation):
        def settle(self, x, state, step, kind):
            seen.append(_norm(x).cpu())
            return x

    options = {"steps": steps, "scheduler": scheduler, "record": False, "progress": False}
    sample(denoiser, prompts, 0, [Onlooker(), guidance or ConstantGuidance()], **options)
    norms = torch.stack([torch.cat(seen[k :: 3 * steps]) for k in range(3 * steps)])  # of all batches
    return torch.stack([norms.mean(dim=1), norms.std(dim=1)]).unflatten(1, (steps, 3))


@dataclass(frozen=True)
class StabilityRegion(Mitigation):
    """Norms of prediction, update and latents kept within ``gamma`` deviations of their mean over ordinary ``prompts``.

    Replicated from the description of "Broken Memories", KDD 2026 (arXiv 2605.22050), which has no published code.
    Norms are those of CFG at ``guidance_scale``, measured once for a model and kept in build/.
    """

    gamma: float
    prompts: tuple[str, ...]
    guidance_scale: float = 7.5

    def begin(self, state):
        scale, steps, scheduler = self.guidance_scale, len(state.scheduler.timesteps), type(state.scheduler).__name__
        settings = {"given": [self.prompts, scale, steps, scheduler], **state.denoiser.settings()}
        given = (state.denoiser, self.prompts, ConstantGuidance(scale), steps, scheduler)
        folder, make = output_folder() / "build" / "stability", lambda: {"norms": ordinary_norms(*given)}
        state.norms = kept(folder, "norms", settings, make, ".safetensors")["norms"]

    def settle(self, x, state, step, kind):
        (mean, deviation), norm = state.norms[:, step, kind].tolist(), _norm(x)
        half = self.gamma * max(deviation, 1e-12)
        return x * (norm.clamp(mean - half, mean + half) / norm).view(-1, 1, 1, 1)
