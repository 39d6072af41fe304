import numpy as np
import pytest
import torch

from basinlab import projection

TIMES = torch.tensor([900, 500, 100])


def states(count=20, spread=1.0):
    return spread * torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_projection_is_reproducible_and_keeps_its_order():
    found, again = (projection.project(states(), TIMES, neighbours=5) for _ in range(2))
    assert found.coordinates.shape == (20, 3, 2) and np.array_equal(found.coordinates, again.coordinates)
    first, rest = found.split([5, 15])
    assert np.array_equal(first.coordinates, found.coordinates[:5]) and rest.coordinates.shape == (15, 3, 2)
    row = found.table().iloc[3 * 7 + 1]
    assert (row.trajectory, row.t) == (7, 500) and (row.x, row.y) == tuple(found.coordinates[7, 1])


def test_densmap_keeps_a_crowd_narrower_than_a_scatter():
    together = torch.cat([states(20, 0.1), 5 + states(20)])
    crowd, scatter = projection.project(together, TIMES).split([20, 20])
    assert crowd.coordinates.std(axis=(0, 1)).mean() < 0.7 * scatter.coordinates.std(axis=(0, 1)).mean()


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(ValueError, match="3 points, 3 of them finite"):
        projection.project(states(1), TIMES)
    bad = states()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="60 points, 59 of them finite"):
        projection.project(bad, TIMES)
