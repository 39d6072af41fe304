"""The guiders drive diffusers' modular pipelines unchanged: SDXL's blocks on a tiny random model."""

import checkpoints
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

from basinlab import guidance
from basinlab.guidance import ConstantGuidance, DynamicTransitionPoint, OppositeGuidance, StaticTransitionPoint

STEPS = 10
PROMPTS = ["a picture of a tomato", "a drawing of an owl"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = checkpoints.save("sdxl", tmp_path_factory.mktemp("xl"))
    parts = StableDiffusionXLPipeline.from_pretrained(folder).components
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    made.update_components(**{name: part for name, part in parts.items() if part is not None})
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipeline, guider):
    """What the pipeline ends with, and how many predictions each step made."""
    calls = []
    pipeline.update_components(guider=guider)
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append(float(inputs[1])))
    generators, options = [torch.Generator().manual_seed(s) for s in (0, 1)], {"height": 64, "width": 64}
    found = pipeline(prompt=PROMPTS, num_inference_steps=STEPS, generator=generators, **options, output="latents")
    hook.remove()
    return found, [calls.count(t) for t in dict.fromkeys(calls)]


def test_constant_guidance_is_diffusers_own(pipeline):
    ours, calls = latents(pipeline, ConstantGuidance(5.0))
    theirs, _ = latents(pipeline, ClassifierFreeGuidance(5.0))
    torch.testing.assert_close(ours, theirs)
    assert calls == [2] * STEPS


def test_static_point_makes_one_prediction_before_it(pipeline):
    guider = StaticTransitionPoint(500, 5.0)
    found, calls = latents(pipeline, guider)
    times = [int(t) for t in pipeline.scheduler.timesteps]
    assert calls == [1 if t > 500 else 2 for t in times]
    assert guider.transition_point == max(t for t in times if t <= 500)
    # the same again: a guider that was used is as good as new
    torch.testing.assert_close(latents(pipeline, guider)[0], found)


def test_dynamic_and_opposite_points_are_found_per_sample(pipeline):
    seen = []
    for guider in (DynamicTransitionPoint(5.0, latest=0), OppositeGuidance(None, 5.0, latest=0)):
        found, calls = latents(pipeline, guider)
        assert calls == [2] * STEPS and found.isfinite().all()
        assert guider.transition_point.shape == (2,)
        seen.append(found)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    # one that switches at once is plain CFG, whatever came before in this object
    guider = DynamicTransitionPoint(5.0, latest=999)
    torch.testing.assert_close(latents(pipeline, guider)[0], latents(pipeline, ClassifierFreeGuidance(5.0))[0])


@pytest.mark.parametrize("guider", [guidance.GuidanceInterval(800, 300, 5.0), guidance.ScheduledGuidance("v", 5.0)])
def test_guiders_can_be_used_twice(pipeline, guider):
    first, _ = latents(pipeline, guider)
    torch.testing.assert_close(latents(pipeline, guider)[0], first)
