"""Trajectories on a sheet of paper, in two views. Each gives a table: name, trajectory, t, x, y.

UMAP has no scale of its own, so each bundle is given its true width afterwards. Its layout differs between processors,
even with a seed: widths and the order in time may be read off it, places may not.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def umap(bundles: Mapping[str, Tensor], timesteps: Tensor, neighbours: int = 15) -> pd.DataFrame:
    """Place the states [B, S, ...] of each bundle in the plane, slice by slice, by AlignedUMAP (McInnes et al. 2018).

    A trajectory is tied to where it was a slice before. Each bundle is centred, with its true root mean square radius;
    all are turned so that the ends spread most along x.
    """
    from umap import AlignedUMAP  # takes seconds to import

    states = torch.cat([*bundles.values()]).flatten(2).numpy()
    count, slices = states.shape[:2]
    if count < 5 or slices < 2 or not np.isfinite(states).all():
        raise ValueError(f"{count} trajectories of {slices} states: give 5 or more of 2 or more, all finite")
    options = {"n_neighbors": min(neighbours, count - 1), "alignment_regularisation": 0.1, "random_state": 0}
    same = [{i: i for i in range(count)}] * (slices - 1)
    places = np.stack(AlignedUMAP(**options).fit([*states.swapaxes(0, 1)], relations=same).embeddings_, 1)
    for rows in np.split(np.arange(count), np.cumsum([len(b) for b in bundles.values()])[:-1]):
        true = states[rows].std(axis=0)  # [S, F], over the bundle
        at = places[rows] - places[rows].mean(axis=0)
        scale = np.sqrt(np.square(true).mean(axis=1)) / np.sqrt(np.square(at).sum(axis=2).mean(axis=0)).clip(1e-9)
        places[rows] = at * scale[:, None]
    return _table(bundles, timesteps, places @ np.linalg.svd(places[:, -1], full_matrices=False)[2].T)


def linear(bundles: Mapping[str, Tensor], timesteps: Tensor, centres: Tensor) -> pd.DataFrame:
    """The states on one line: the first principal component of x_t - ``centres`` [S, ...]; y is the second."""
    states = (torch.cat([*bundles.values()]) - centres).flatten(2)
    axes = torch.linalg.svd(states.flatten(0, 1), full_matrices=False).Vh[:2]
    return _table(bundles, timesteps, (states @ axes.T).numpy())


def _table(bundles: Mapping[str, Tensor], timesteps: Tensor, places: np.ndarray) -> pd.DataFrame:
    names = np.repeat([*bundles], [len(b) * len(timesteps) for b in bundles.values()])
    found = {"name": names, "trajectory": np.repeat(np.arange(len(places)), len(timesteps))}
    flat = places.reshape(-1, 2)
    return pd.DataFrame(found | {"t": np.tile(timesteps, len(places)), "x": flat[:, 0], "y": flat[:, 1]})
