import numpy as np
import pytest
import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance

from basinlab import guidance as g

BOTH = ["pred_cond", "pred_uncond"]
THREE = ["pred_positive", *BOTH]


def at(guidance, timestep):
    """The guidance in the state of ``timestep``."""
    guidance.set_state(0, 50, torch.tensor(timestep))
    return guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_constant_guidance_combines_as_diffusers_does(scale):
    conditional, unconditional = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = at(g.ConstantGuidance(scale), 999), at(ClassifierFreeGuidance(scale), 999)
    # diffusers takes a scale of 0 for no guidance
    expected = unconditional if scale == 0 else theirs.forward(conditional, unconditional).pred
    torch.testing.assert_close(ours.forward(conditional, unconditional).pred, expected)


@pytest.mark.parametrize("guidance, timestep, names", [
    (g.ConstantGuidance(7.5), 999, BOTH),
    (g.ConstantGuidance(0), 999, ["pred_uncond"]),
    (g.ConstantGuidance(1), 999, ["pred_cond"]),
    (g.StaticTransitionPoint(500), 501, ["pred_uncond"]),
    (g.StaticTransitionPoint(500), 500, BOTH),
    (g.StaticTransitionPoint(500, before=-2.0), 501, BOTH),
    (g.AttractRepel(7.5, 2.0), 999, THREE),
    (g.AttractRepel(7.5, 0.0), 999, ["pred_positive", "pred_uncond"]),
    (g.AttractRepel(0.0, 2.0), 999, BOTH),
    (g.AttractRepel(7.5, 6.5, fading=False), 500, ["pred_positive", "pred_cond"]),
    (g.AttractRepel(7.5, 6.5), 500, THREE),
    (g.AttractRepel(7.5, 2.0), 0, ["pred_positive", "pred_uncond"]),
    (g.Gated(1.0, g.StaticTransitionPoint(500)), 999, BOTH),
])  # fmt: skip
def test_only_predictions_with_weight_are_asked_for(guidance, timestep, names):
    batches = at(guidance, timestep).prepare_inputs({"embedding": (torch.ones(1), torch.zeros(1))})
    found = {getattr(b, BaseGuidance._identifier_key): float(b.embedding) for b in batches}
    assert list(found) == names and guidance.num_conditions == len(names)
    assert found == {name: float(name != "pred_uncond") for name in names}
    for name in names:
        guidance.prepare_models(None)
        assert guidance.is_conditional == (name != "pred_uncond")
    assert guidance.num_conditions == len(guidance._input_predictions)  # a run broken off here may begin again


def test_what_a_class_of_your_own_does_is_in_its_description():
    ones, twos = (type("Mine", (g.ConstantGuidance,), {"weight": of}) for of in (lambda s, t: 1.0, lambda s, t: 2.0))
    first, other, again = (g.describe(kind(3.0)) for kind in (ones, twos, ones))
    assert first == again != other and first["name"] == other["name"] == "Mine" and first["guidance_scale"] == 3.0
    gate = g.Gated(0.5, twos(3.0)).new(limit=1.0)  # and so is the remedy, as it is now
    gate.remedy.guidance_scale = 9.0
    assert gate.limit == 1.0 and g.describe(gate)["remedy"] == other | {"guidance_scale": 9.0}


GUIDERS = [
    g.ConstantGuidance(3.0),
    g.StaticTransitionPoint(321, guidance_scale=4.0, before=1.0),
    g.DynamicTransitionPoint(4.0, before=1.0, latest=321),
    g.OppositeGuidance(None, 4.0, opposite_scale=1.0, latest=321),
    g.OppositeGuidance(321, 4.0),
    g.GuidanceInterval(700, 300, 4.0),
    g.ScheduledGuidance("cosine", 4.0),
    g.AttractRepel(4.0, 1.0),
    *(g.Gated(0.5, of, 4.0) for of in (g.StaticTransitionPoint(321, 4.0, before=-1.0), ClassifierFreeGuidance(3.0))),
]


@pytest.mark.parametrize("guidance", GUIDERS, ids=lambda guidance: type(guidance).__name__)
def test_guider_survives_saving_and_copying_and_is_usable_before_the_first_step(guidance, tmp_path):
    """A modular pipeline asks for num_conditions, and a notebook for the repr, before any set_state."""
    new = guidance.new()
    assert new.num_conditions == len(guidance._input_predictions) and type(guidance).__name__ in repr(new)
    guidance.save_pretrained(tmp_path)
    for again in (type(guidance).from_pretrained(tmp_path), guidance.new()):
        assert [again.weight(t) for t in range(1000)] == [guidance.weight(t) for t in range(1000)]
        assert g.describe(again) == g.describe(guidance)
    new.guidance_scale = 9.0  # what was changed is what a record says
    assert g.describe(new)["guidance_scale"] == guidance.new(guidance_scale=9.0).config["guidance_scale"] == 9.0


def run_rule(guidance, magnitudes, timesteps):
    """Feed predictions whose difference has the given magnitudes [S, B]; the weight of each sample at each step."""
    weights = []
    for step, (row, t) in enumerate(zip(magnitudes, timesteps, strict=True)):
        guidance.set_state(step, len(timesteps), torch.tensor(t))
        difference = torch.tensor(row, dtype=torch.float32).view(-1, 1, 1, 1)
        combined = guidance.forward(torch.ones_like(difference) + difference, torch.ones_like(difference))[0]
        weights.append(((combined - 1) / difference).flatten().round(decimals=4).tolist())
    return np.array(weights).T.tolist()


TIMES = [900, 800, 700, 600, 500, 400]
# three samples: a minimum at 800, one at 600, none (it only rises)
COURSES = np.array([[3, 1, 2, 3, 4, 5], [5, 4, 3, 2, 3, 1], [1, 2, 3, 4, 5, 6]], dtype=float).T


def test_dynamic_point_is_where_the_magnitude_has_risen_after_a_fall_and_ends_opposite_guidance():
    guidance = g.DynamicTransitionPoint(5.0, latest=450)
    weights = run_rule(guidance, COURSES, TIMES)
    assert weights == [[0, 0, 5, 5, 5, 5], [0, 0, 0, 0, 5, 5], [0, 0, 0, 0, 0, 5]]
    assert str(guidance.transition_point.tolist()) == "[700.0, 500.0, nan]"  # nothing was seen: from ``latest`` on
    assert run_rule(guidance, COURSES[:, :2], TIMES) == weights[:2]  # another batch: it begins anew
    # opposite guidance turns the pull round until its point
    static, dynamic = g.OppositeGuidance(650, 5.0), g.OppositeGuidance(None, 5.0, opposite_scale=3.0, latest=450)
    assert run_rule(static, COURSES, TIMES) == [[-2, -2, -2, 5, 5, 5]] * 3
    assert run_rule(dynamic, COURSES, TIMES)[1] == [-3, -3, -3, -3, 5, 5]
    assert (static.transition_point, dynamic.transition_point[1]) == (600, 500)
    with pytest.raises(ValueError, match="opposite_scale is -2"):
        g.OppositeGuidance(650, opposite_scale=-2)
    with pytest.raises(ValueError, match="NaN"):  # as the table of points has where no copy ends
        g.StaticTransitionPoint(float("nan"))


@pytest.mark.parametrize("schedule, rising", [("linear", (1, 1)), ("cosine", (1, 1)), ("v", (-1, 1)), ("a", (1, -1))])
def test_schedules_have_the_asked_mean_and_shape_and_intervals_run_down(schedule, rising):
    weights = np.array([g.ScheduledGuidance(schedule, 3.0).weight(t) for t in range(1001)])
    assert abs(weights.mean() - 3) < 0.01 and (weights >= -1e-9).all()
    early, late = np.diff(weights[::-1])[:500], np.diff(weights[::-1])[500:]  # as sampling goes on
    assert (np.sign(early.sum()), np.sign(late.sum())) == rising
    with pytest.raises(ValueError, match="from 300 down to 700"):
        g.GuidanceInterval(300, 700)


def test_attraction_is_its_formula_and_its_special_cases_are_exact():
    p, n, u = torch.randn(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def combined(s, r, fading=False, t=500, **given):
        return at(g.AttractRepel(s, r, fading), t).forward(**given).pred

    def weighted(weight, cond, uncond):
        return at(g.ConstantGuidance(weight), 500).forward(cond, uncond).pred

    every = {"pred_positive": p, "pred_cond": n, "pred_uncond": u}
    for t in (999, 500, 0):
        r = 2 * np.cos(np.pi / 2 * (1 - t / 1000))
        expected = (1 - 7.5 + r) * u + 7.5 * p - r * n
        torch.testing.assert_close(combined(7.5, 2.0, True, t, **every), expected.float(), atol=1e-4, rtol=0)
    assert combined(7.5, 0.0, pred_positive=p, pred_uncond=u).equal(weighted(7.5, p, u))  # CFG on p
    assert combined(1.0, 0.0, pred_positive=p).equal(p)
    assert combined(0.0, 2.0, pred_cond=n, pred_uncond=u).equal(weighted(-2.0, n, u))  # opposite guidance
    assert combined(7.5, 6.5, pred_positive=p, pred_cond=n).equal(weighted(7.5, p, n))  # re-anchoring
    torch.testing.assert_close(combined(7.5, 6.5, **every), weighted(7.5, p, n), atol=1e-4, rtol=0)


def test_the_gate_lets_pass_below_its_limit_and_is_the_remedy_above():
    gated = g.Gated(2.0, g.OppositeGuidance(650, 5.0), guidance_scale=5.0)
    opposed, plain = [-2, -2, -2, 5, 5, 5], [5] * 6
    assert run_rule(gated, COURSES, TIMES) == [opposed, opposed, plain]  # at the first step 3, 5 and 1
    assert str(gated.transition_point.tolist()) == "[600.0, 600.0, nan]"
    assert run_rule(gated, COURSES[:, [2, 1]], TIMES) == [plain, opposed]  # another batch: it decides anew
    dynamic = g.DynamicTransitionPoint(5.0, latest=450)
    assert run_rule(g.Gated(0.0, dynamic, 5.0), COURSES, TIMES) == run_rule(dynamic.new(), COURSES, TIMES)
    assert run_rule(g.Gated(2.0, ClassifierFreeGuidance(4.0), 5.0), COURSES, TIMES)[1:] == [[4] * 6, plain]
    with pytest.raises(ValueError, match="AttractRepel needs other predictions"):
        g.Gated(2.0, g.AttractRepel())
