import numpy as np
import pytest
import torch

from basinlab import projection

TIMES = torch.tensor([900, 500, 100])


def states():
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_pca_is_the_projection_on_the_leading_singular_vectors():
    points = states().reshape(15, 16).double().numpy()
    centred = points - points.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = projection.project(states(), TIMES, "pca")
    assert found.coordinates.shape == (5, 3, 2)
    np.testing.assert_allclose(np.abs(found.coordinates.reshape(15, 2)), np.abs(u * s)[:, :2], atol=1e-4)
    assert found.timesteps.tolist() == TIMES.tolist()


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tsne'.*densmap.*umap.*pca"):
        projection.project(states(), TIMES, "tsne")


def test_states_that_are_not_finite_are_refused():
    bad = states()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        projection.project(bad, TIMES, "pca")
