from types import SimpleNamespace

import pytest
import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance

from basinlab import ConstantGuidance, StaticTransitionPoint

BOTH = ["pred_cond", "pred_uncond"]


def prepared(guidance, timestep, step=0):
    """Names of the predictions asked for at ``timestep``, with the input that each gets."""
    guidance.set_state(step, 50, torch.tensor(timestep))
    inputs = {"embedding": (torch.ones(1), torch.zeros(1))}
    return {b.__dict__[BaseGuidance._identifier_key]: float(b.embedding) for b in guidance.prepare_inputs(inputs)}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_constant_guidance_combines_as_diffusers_does(scale):
    conditional, unconditional = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = ConstantGuidance(scale), ClassifierFreeGuidance(scale)
    for guidance in (ours, theirs):
        guidance.set_state(0, 50, torch.tensor(999))
    # diffusers takes a scale of 1 for no guidance, and of 0 likewise: compare with its formula elsewhere
    expected = unconditional if scale == 0 else theirs.forward(conditional, unconditional).pred
    torch.testing.assert_close(ours.forward(conditional, unconditional).pred, expected)


@pytest.mark.parametrize(
    "guidance, timestep, names",
    [
        (ConstantGuidance(7.5), 999, BOTH),
        (ConstantGuidance(0), 999, ["pred_uncond"]),
        (ConstantGuidance(1), 999, ["pred_cond"]),
        (StaticTransitionPoint(500), 501, ["pred_uncond"]),
        (StaticTransitionPoint(500), 500, BOTH),
        (StaticTransitionPoint(500, before=1.0), 501, ["pred_cond"]),
        (StaticTransitionPoint(500, before=-2.0), 501, BOTH),
        (StaticTransitionPoint(500, guidance_scale=1.0), 500, ["pred_cond"]),
    ],
)
def test_only_predictions_with_weight_are_asked_for(guidance, timestep, names):
    found = prepared(guidance, timestep)
    assert list(found) == names
    assert found == {name: {"pred_cond": 1.0, "pred_uncond": 0.0}[name] for name in names}
    assert guidance.num_conditions == len(names)
    for name in names:
        guidance.prepare_models(None)
        assert guidance.is_conditional == (name == "pred_cond")


@pytest.mark.parametrize("timestep, before", [(700, 0.0), (500, 7.5), (0, 7.5)])
def test_transition_point_switches_the_weight(timestep, before):
    guidance = StaticTransitionPoint(500, guidance_scale=7.5)
    guidance.set_state(0, 50, torch.tensor(timestep))
    conditional, unconditional = torch.ones(1, 4), torch.full((1, 4), 3.0)
    expected = unconditional + before * (conditional - unconditional)
    torch.testing.assert_close(guidance.forward(conditional, unconditional)[0], expected)


def test_start_at_the_first_timestep_is_constant_guidance():
    late, constant = StaticTransitionPoint(999, 3.0), ConstantGuidance(3.0)
    assert [late.weight(t) for t in range(1000)] == [constant.weight(t) for t in range(1000)]


GUIDERS = [ConstantGuidance(3.0), StaticTransitionPoint(321, guidance_scale=4.0, before=1.0)]


@pytest.mark.parametrize("guidance", GUIDERS, ids=lambda g: type(g).__name__)
def test_guider_survives_saving_and_copying(guidance, tmp_path):
    guidance.save_pretrained(tmp_path)
    for again in (type(guidance).from_pretrained(tmp_path), guidance.new()):
        assert [again.weight(t) for t in range(1000)] == [guidance.weight(t) for t in range(1000)]
    assert guidance.new(guidance_scale=9.0).weight(0) == 9.0


@pytest.mark.parametrize("guidance", GUIDERS, ids=lambda g: type(g).__name__)
def test_guider_is_usable_before_the_first_step(guidance):
    """A modular pipeline asks for num_conditions, and a notebook for the repr, before any set_state."""
    fresh = guidance.new()
    assert isinstance(fresh, BaseGuidance)
    assert fresh.num_conditions == 2
    assert type(guidance).__name__ in repr(fresh)


def test_guider_is_called_as_modular_pipelines_call_it():
    guidance = StaticTransitionPoint(500, guidance_scale=2.0)
    state = SimpleNamespace(text=torch.ones(1), empty=torch.zeros(1))
    for timestep, expected in ((600, 0.0), (400, 2.0)):
        guidance.set_state(0, 50, torch.tensor(timestep))
        batches = guidance.prepare_inputs_from_block_state(state, {"embedding": ("text", "empty")})
        for batch in batches:
            batch.noise_pred = batch.embedding
        assert float(guidance(batches).pred) == expected
