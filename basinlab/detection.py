"""Detectors: does a sample look memorized, before, while or after it is made? A score [B] each, larger for memorized.

They read a recorded `Trajectory` under CFG from T with the model's own scheduler. Constants are the authors', rescaled.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .mitigations import SharpnessAwareNoise
from .sampling import BOTH, State, Trajectory, begin, predict
from .statistics import roc, wilson_interval


def _at(run: Trajectory, step: int) -> State:
    pairs, latents = list(zip(run.prompts, run.seeds, strict=True)), run.recorded("latents")[:, step]
    return begin(run.denoiser, pairs, len(run.timesteps), None, latents=latents)


def anisotropy(run: Trajectory) -> Tensor:
    """||c - u|| at T, plus twice the cosine of u and c - u near 0, both on pure noise (Asthana et al., ICLR 2026)."""
    state, alpha_bar = _at(run, 0), run.denoiser.alpha_bar(run.timesteps[0]).cpu()
    c, u = predict(state, run.timesteps[-3], BOTH).values()
    weight = 2 * (state.latents[0].numel() / 2**14 * alpha_bar / 0.0047) ** 0.5
    return run.guidance_magnitude[:, 0] + weight * F.cosine_similarity(u, c - u, dim=1).mean(dim=(1, 2)).cpu()


def sharpness(run: Trajectory) -> Tensor:
    """The guidance magnitude at T a step of 1 ahead along the guidance, which stands for the sharpness in SAIL."""
    state, radius = _at(run, 0), (run.latents[0, 0].numel() / 2**14) ** 0.5
    return SharpnessAwareNoise(radius=radius, pull=0.0).loss(state, state.latents).cpu()


def end_attention(run: Trajectory) -> Tensor:
    """Bright Ending (Chen et al., ICLR 2025): ||c - u|| at T under the last step's attention to the end token."""
    caught, size = [], run.latents.shape[-2:]
    layer = next(part for name, part in run.denoiser.unet.named_modules() if name.endswith("attn2"))
    hooks = [x.register_forward_hook(lambda *given: caught.append(given[2])) for x in (layer.to_q, layer.to_k)]
    predict(_at(run, -2), run.timesteps[-1], ["pred_cond"])
    for hook in hooks:
        hook.remove()
    query, key = (x.unflatten(2, (layer.heads, -1)).transpose(1, 2) for x in caught)
    ends = [len(ids) - 1 for ids in run.denoiser.tokenizer(run.prompts, truncation=True).input_ids]
    seen = (query @ key.mT * layer.scale).softmax(dim=3).mean(dim=1)[range(len(run)), :, ends]
    share = (seen.shape[1] / size.numel()) ** 0.5  # of the latents' sides
    mask = F.interpolate(seen.view(len(run), 1, *(round(side * share) for side in size)), size)
    c, u = predict(_at(run, 0), run.timesteps[0], BOTH).values()
    return (((c - u) * mask).flatten(1).norm(dim=1) / mask.mean(dim=(1, 2, 3))).cpu()


def picture_weight(run: Trajectory) -> Tensor:
    """w0 / sqrt(alpha_bar) of x_t = w0 x + wT x_T, a mean over the first third ("How Diffusion Models Memorize")."""
    x, early = run.recorded("latents").flatten(2), slice(1, max(2, len(run.timesteps) // 3))
    weights = torch.linalg.lstsq(x[:, [-1, 0]].mT, x[:, early].mT).solution[:, 0]
    return (weights / run.denoiser.scheduler.alphas_cumprod[run.timesteps[early].long()].sqrt()).mean(dim=1)


def stability(run: Trajectory, norms: Tensor) -> Tensor:
    """The largest z-score of an update's norm, by those at ordinary prompts, `mitigations.ordinary_norms`."""
    return ((run.recorded("latents").diff(dim=1).flatten(2).norm(dim=2) - norms[0, :, 1]) / norms[1, :, 1]).amax(dim=1)


def critical_scale(run: Trajectory, scales: int = 16, iterations: int = 8, within: float = 0.25) -> Tensor:
    """The largest sigma at which denoising again and again stays near the picture, or 0 ("From Modes to Memories")."""
    denoiser, state, start = run.denoiser, _at(run, -1), _at(run, -1).latents
    found, times = start.new_zeros(len(run)), run.timesteps.flip(0)
    for t in times[np.unique(np.linspace(0, len(times) - 1, scales).round().astype(int))].tolist():
        x, stays, alpha_bar = start, True, denoiser.alpha_bar(t)
        for _ in range(iterations):
            state.latents = alpha_bar.sqrt() * x
            output = predict(state, t, ["pred_cond"])["pred_cond"] / denoiser.epsilon_scale(t)
            x = denoiser.predicted_clean(state.latents, output, t)
            stays = stays & ((x - start).flatten(1).norm(dim=1) <= within * start.flatten(1).norm(dim=1))
        found = torch.where(stays, (1 / alpha_bar - 1).sqrt().to(found), found)
    return found.cpu()


def separation(table: pd.DataFrame, score: str, truth: str) -> pd.DataFrame:
    """How well column ``score`` tells ``truth``: AUC and the share found at 1% false positives, a row each.

    Intervals are bootstraps over prompts, or Wilson's, of the rarer kind's prompts, where all resamples agree.
    """
    parts = [part[[score, truth]].to_numpy(float) for _, part in table.dropna(subset=score).groupby("prompt")]

    def measured(prompts) -> list[float]:
        values, true = np.concatenate([parts[i] for i in prompts]).T
        if true.min() == true.max():
            return [np.nan, np.nan]
        curve = roc(torch.from_numpy(-values[true == 1]), torch.from_numpy(-values[true == 0]))
        false, hits = (np.concatenate([[0], curve[name]]) for name in ("false_positive", "true_positive"))
        return [np.trapezoid(hits, false), hits[false <= 0.01].max()]

    value, drawn = measured(range(len(parts))), np.random.default_rng(0).integers(len(parts), size=(300, len(parts)))
    drawn = [x for x in map(measured, drawn) if np.isfinite(x).all()] or [[np.nan, np.nan]]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    fewest = table.groupby(truth)["prompt"].nunique().min()
    low, high = np.where(low == high, wilson_interval(np.array(value) * fewest, fewest), (low, high))
    rows = {"method": score, "measure": ["AUC", "found at 1% false"], "value": value, "low": low, "high": high}
    return pd.DataFrame(rows).assign(n=sum(map(len, parts)), prompts=len(parts))
