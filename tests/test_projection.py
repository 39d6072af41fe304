import numpy as np
import pytest
import torch

from basinlab import projection

TIMES = torch.tensor([900, 500, 100])


def states(count, spread, seed=0):
    """Trajectories [count, 3, 4, 2, 2] whose spread at each time is ``spread``."""
    noise = torch.randn(count, 1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(spread).view(1, 3, 1, 1, 1) * noise + 0.01 * torch.randn(count, 3, 4, 2, 2)


BUNDLES = {"memorized, CFG": states(8, [1.0, 0.5, 0.05]), "ordinary, CFG": states(8, [1.0, 1.0, 1.0], seed=1)}


def test_each_bundle_has_its_true_width_at_each_time():
    found = projection.umap(BUNDLES, TIMES, neighbours=5)
    assert found.columns.tolist() == ["name", "trajectory", "t", "x", "y"] and len(found) == 16 * 3
    assert found["trajectory"].nunique() == 16 and found["t"].tolist()[:3] == TIMES.tolist()
    for name, bundle in BUNDLES.items():
        for step, t in enumerate(TIMES.tolist()):
            place = found[(found["name"] == name) & (found["t"] == t)][["x", "y"]].to_numpy()
            drawn = np.sqrt(np.square(place).sum(axis=1).mean())
            true = float((bundle[:, step] - bundle[:, step].mean(dim=0)).square().mean().sqrt())
            assert drawn == pytest.approx(true, rel=1e-3)
            assert np.abs(place.mean(axis=0)).max() < 1e-4  # centred


def test_the_linear_view_is_the_direction_of_most_spread_and_what_cannot_be_projected_is_refused():
    bundle = torch.zeros(5, 3, 1, 2, 2)
    bundle[:, :, 0, 0, 1] = torch.arange(-2.0, 3)[:, None]
    found = projection.linear({"a": bundle + 7}, TIMES, torch.full((3, 1, 2, 2), 7.0))
    across = found[found["t"] == 500]["x"].to_numpy()
    assert np.abs(across).tolist() == pytest.approx([2, 1, 0, 1, 2], abs=1e-5)
    assert found["y"].abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 trajectories of 3 states"):
        projection.umap({"a": states(1, [1.0, 1.0, 1.0])}, TIMES)
    bad = states(6, [1.0, 1.0, 1.0])
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="all finite"):
        projection.umap({"a": bad}, TIMES)
