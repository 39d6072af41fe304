"""Trajectories on a sheet of paper.

UMAP equalises local density: a crowd and a scatter of points come out about equally wide, so
a funnel drawn by plain UMAP could be an artefact, and a real one could be flattened. densMAP
(Narayan, Berger and Cho 2021) adds a term that keeps local radii in proportion, which is what
a funnel is about; it is the default here. PCA, a linear map that cannot invent structure,
stands beside it as a check.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

METHODS = ("densmap", "umap", "pca")


@dataclass(frozen=True)
class Projection:
    """Coordinates [B, S, 2] of B trajectories at S timesteps, and how they were made."""

    coordinates: np.ndarray
    timesteps: np.ndarray
    method: str

    def split(self, counts: Sequence[int]) -> list["Projection"]:
        """The projections of the first ``counts[0]`` trajectories, of the next ``counts[1]``, and so on."""
        parts = np.split(self.coordinates, np.cumsum(counts)[:-1])
        return [Projection(part, self.timesteps, self.method) for part in parts]

    def table(self) -> pd.DataFrame:
        """One row a point: trajectory, t, x, y."""
        count, steps = self.coordinates.shape[:2]
        flat = self.coordinates.reshape(-1, 2)
        trajectory = np.repeat(np.arange(count), steps)
        times = np.tile(self.timesteps, count)
        return pd.DataFrame({"trajectory": trajectory, "t": times, "x": flat[:, 0], "y": flat[:, 1]})


def project(
    states: Tensor, timesteps: Tensor, method: str = "densmap", *, neighbours: int = 30, seed: int = 0
) -> Projection:
    """Project the states of several trajectories together into two dimensions.

    Args:
        states: [B, S, ...], such as `Trajectory.predicted`; B S points of any shape.
        timesteps: [S].
        method: "densmap", "umap" or "pca".
        neighbours: of UMAP's graph; large enough to reach across trajectories, not only along them.
        seed: of UMAP's layout; the same seed gives the same picture.

    Raises ValueError for an unknown method or states that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: give one of {METHODS}")
    points = states.flatten(2).flatten(0, 1).numpy()
    if not np.isfinite(points).all():
        raise ValueError("states hold NaN or infinite values: nothing to project")
    if method == "pca":
        from sklearn.decomposition import PCA

        flat = PCA(2, random_state=seed).fit_transform(points)
    else:
        from umap import UMAP

        mapper = UMAP(
            n_neighbors=min(neighbours, len(points) - 1), densmap=method == "densmap", random_state=seed, n_jobs=1
        )
        flat = mapper.fit_transform(points)
    return Projection(flat.reshape(*states.shape[:2], 2), timesteps.numpy(), method)
