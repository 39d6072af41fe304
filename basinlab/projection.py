"""Trajectories on a sheet of paper.

UMAP equalises local density: a crowd and a scatter of points come out about equally wide, so that a funnel drawn by
plain UMAP could be an artefact, and a real one could be flattened. densMAP (Narayan, Berger and Cho 2021) keeps local
radii in proportion, which is what a funnel is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """Coordinates [B, S, 2] of B trajectories at S timesteps, and how they were made."""

    coordinates: np.ndarray
    timesteps: np.ndarray
    method: str = "densMAP"

    def split(self, counts: Sequence[int]) -> list["Projection"]:
        """The projections of the first ``counts[0]`` trajectories, of the next ``counts[1]``, and so on."""
        parts = np.split(self.coordinates, np.cumsum(counts)[:-1])
        return [Projection(part, self.timesteps) for part in parts]

    def table(self) -> pd.DataFrame:
        """One row a point: trajectory, t, x, y."""
        count, steps = self.coordinates.shape[:2]
        flat = self.coordinates.reshape(-1, 2)
        trajectory = np.repeat(np.arange(count), steps)
        times = np.tile(self.timesteps, count)
        return pd.DataFrame({"trajectory": trajectory, "t": times, "x": flat[:, 0], "y": flat[:, 1]})


def project(states: Tensor, timesteps: Tensor, neighbours: int = 30) -> Projection:
    """Project states [B, S, ...] of several trajectories, such as `Trajectory.predicted`, into two dimensions together.

    ``neighbours`` in its graph are enough to reach across trajectories. The picture is the same at every call.
    """
    from umap import UMAP  # takes seconds to import

    points = states.flatten(2).flatten(0, 1).numpy()
    finite = np.isfinite(points).all(axis=1).sum()
    if len(points) < 5 or finite < len(points):
        raise ValueError(f"{len(points)} points, {finite} of them finite: give 5 or more")
    mapper = UMAP(n_neighbors=min(neighbours, len(points) - 1), densmap=True, random_state=0, n_jobs=1)
    return Projection(mapper.fit_transform(points).reshape(*states.shape[:2], 2), timesteps.numpy())
