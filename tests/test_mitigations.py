"""Mitigations and detectors of earlier work against their authors' definitions and other implementations."""

import copy
import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import close
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from diffusers.models.attention_processor import AttnProcessor
from sklearn.metrics import roc_auc_score

import basinlab
from basinlab import detection
from basinlab import mitigations as p
from basinlab.guidance import describe

PROMPTS = ["a picture of a tomato", "dream second top hat found first"]


class Onlooker(basinlab.Mitigation):
    """Keeps what the mitigations before it made of the samples."""

    def begin(self, state):
        self.state = copy.copy(state)

    def condition(self, conditional, state, timestep):
        self.seen = getattr(self, "seen", {}) | {timestep: conditional}
        return conditional


def start(denoiser, *mitigations, prompts=PROMPTS, seeds=(0, 1, 2), steps=1, **options):
    """The samples before their first step, the embeddings over the steps, and the trajectory."""
    onlooker = Onlooker()
    mitigations = [*mitigations, onlooker, basinlab.ConstantGuidance(2.0)]
    run = basinlab.sample(denoiser, prompts, seeds, mitigations, steps=steps, progress=False, **options)
    return onlooker.state, onlooker.seen, run


def difference(denoiser, state, x):
    """eps_c - eps_u at the first step, of the network itself."""
    t = state.scheduler.timesteps[0]
    embeddings = torch.cat([state.conditional, state.unconditional.expand(len(x), -1, -1)])
    with torch.no_grad():
        c, u = denoiser.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=embeddings).sample.chunk(2)
    return (c - u) * denoiser.scheduler.alphas_cumprod[t] ** 0.5


def norm(x):
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def length(x):
    return norm(x).flatten()


def magnitude(denoiser, state):
    return length(difference(denoiser, state, state.latents))


@pytest.mark.parametrize("kind, allowed", [
    (p.RandomNumbers, lambda word: 0 <= int(word) < 100_000),
    (p.RandomTokens, lambda word: True),
    (p.RepeatedWords, lambda word: word in PROMPTS[1].split()),
])  # fmt: skip
def test_inserted_words_leave_the_prompt_in_order_and_differ_by_seed(tiny, kind, allowed):
    texts = [kind(4).text(PROMPTS[1], seed, tiny) for seed in (0, 1, 2, 0)]
    assert len(set(texts)) == 3 and texts[3] == texts[0] and kind(0).text(PROMPTS[1], 0, tiny) == PROMPTS[1]
    for words in map(str.split, texts):
        rest = iter(words)
        assert all(word in rest for word in PROMPTS[1].split())  # in this order
        added = Counter(words) - Counter(PROMPTS[1].split())
        assert added.total() == 4 and all(map(allowed, added))


def test_embedding_noise_has_the_stated_deviation_independent_of_the_initial_noise_after_other_mitigations(tiny):
    clean, _, _ = start(tiny, seeds=range(8))
    noisy, _, _ = start(tiny, p.EmbeddingNoise(0.3), seeds=range(8))
    noise = noisy.conditional - clean.conditional
    assert noise.std().item() == pytest.approx(0.3, abs=4 * 0.3 / (2 * noise.numel()) ** 0.5)
    assert abs(noise.mean().item()) < 4 * 0.3 / noise.numel() ** 0.5
    latents = noisy.latents[0].flatten()
    assert abs(np.corrcoef(noise[0].flatten()[: len(latents)], latents)[0, 1]) < 4 / len(latents) ** 0.5
    torch.testing.assert_close(noisy.latents, clean.latents)
    # mitigations apply in order and describe themselves
    state, _, run = start(tiny, p.RepeatedWords(1), p.EmbeddingNoise(0.1), seeds=[0])
    assert state.texts == [p.RepeatedWords(1).text(prompt, 0, tiny) for prompt in PROMPTS] and run.prompts == PROMPTS
    assert (state.conditional - tiny.embed(state.texts)).std().item() == pytest.approx(0.1, abs=0.01)
    assert describe(p.RepeatedWords(1)) == {"name": "RepeatedWords", "count": 1}


def test_annealed_condition_is_noise_at_first_and_the_prompt_at_last(tiny):
    annealing = p.ConditionAnnealing(0.5, first=800, last=400, mixing=1.0)
    state, seen, _ = start(tiny, annealing, steps=10)
    for t, embedding in seen.items():
        assert ((embedding - state.conditional).abs().amax() == 0) == (t <= 400)
        torch.testing.assert_close(embedding.mean((1, 2)), state.conditional.mean((1, 2)), atol=1e-4, rtol=0)
        torch.testing.assert_close(embedding.std((1, 2)), state.conditional.std((1, 2)), atol=1e-4, rtol=0)
    prompt = state.conditional.flatten(1)
    over = [torch.cosine_similarity(seen[t].flatten(1), prompt).mean().item() for t in sorted(seen, reverse=True)]
    assert max(over[:2]) < 0.1 and over[2:] == sorted(over[2:])  # all noise at the two steps before 800
    with pytest.raises(ValueError, match="first is 500, last 500"):
        p.ConditionAnnealing(0.1, 500, 500)
    # without rescaling it follows its formula
    state, seen, _ = start(tiny, p.ConditionAnnealing(0.5, first=1000, last=0, mixing=0.0), steps=4)
    for t, embedding in seen.items():
        gamma = 1 - t / 1000
        noise = (embedding - gamma**0.5 * state.conditional) / (0.5 * (1 - gamma) ** 0.5)
        assert noise.std().item() == pytest.approx(1, abs=0.03)


def predict(denoiser, embedding, **attention):
    latents = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser(latents, 500, embedding, **attention)


def test_masking_is_that_of_diffusers_own_attention_mask(tiny):
    lengths = [len(ids) for ids in tiny.tokenizer(PROMPTS).input_ids]
    for keep_end in (True, False):
        state, _, _ = start(tiny, p.CrossAttentionMask(1.0, keep_end=keep_end), seeds=[0])
        assert [(row != 0).sum().item() for row in state.token_scale] == [n - (not keep_end) for n in lengths]
        latents = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = tiny.unet(latents, 500, state.conditional, encoder_attention_mask=state.token_scale != 0).sample
        found = predict(tiny, state.conditional, token_scale=state.token_scale)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert (found - predict(tiny, state.conditional)).abs().max() > 1e-2


def test_the_begin_tokens_logits_are_multiplied(tiny):
    state, _, _ = start(tiny, p.CrossAttentionMask(1.25), seeds=[0])
    assert state.token_scale[:, 0].eq(1.25).all() and state.token_scale[:, 1:].le(1).all()
    usual, scale = predict(tiny, state.conditional), torch.ones(2, state.conditional.shape[1])
    torch.testing.assert_close(predict(tiny, state.conditional, token_scale=scale), usual, atol=1e-5, rtol=0)
    scale[:, 0] = 1.25

    def key_times(module, inputs, output):  # the logit of a token is linear in its key
        return torch.cat([1.25 * output[:, :1], output[:, 1:]], 1)

    layers = [m for name, m in tiny.unet.named_modules() if name.endswith("attn2.to_k")]
    hooks = [layer.register_forward_hook(key_times) for layer in layers]
    wanted = predict(tiny, state.conditional)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(predict(tiny, state.conditional, token_scale=scale), wanted, atol=1e-5, rtol=0)
    assert (wanted - usual).abs().max() > 1e-4
    assert predict(tiny, state.conditional).equal(usual)  # attention is as before after a masked run


@pytest.mark.parametrize("kind, what", [(p.PromptOptimization, "conditional"), (p.NoiseDescent, "latents")])
def test_descent_ends_at_or_below_the_target_and_leaves_alone_what_is_there(tiny, kind, what):
    before, _, _ = start(tiny)
    found = magnitude(tiny, before)
    target = found.sort().values[2:4].mean().item()  # between the third and the fourth of six
    after, _, run = start(tiny, kind(target, rate=0.05, iterations=60))
    assert (magnitude(tiny, after) <= target * 1.001).all()
    there = found <= target
    for name in ("latents", "conditional"):
        kept = getattr(after, name)[there].equal(getattr(before, name)[there])
        moved = not getattr(after, name)[~there].equal(getattr(before, name)[~there])
        assert kept and moved == (name == what)
    assert after.conditional[:, 0].equal(before.conditional[:, 0])
    # one look at the magnitude costs two predictions; so does each step, differentiated
    assert run.gradient_passes[there].eq(0).all() and run.gradient_passes[~there].gt(0).all()
    assert run.network_calls.tolist() == (run.gradient_passes + 2 + 2).tolist()
    _, _, run = start(tiny, kind(0.0, iterations=3))
    assert run.gradient_passes.eq(6).all() and run.network_calls.eq(6 + 2 + 2).all()  # it stops after its iterations


def test_noise_ascent_is_the_authors_formula_and_sharpness_aware_noise_descends(tiny):
    before, _, _ = start(tiny)
    after, _, run = start(tiny, p.NoiseAscent(rho=10, gamma=0.7, iterations=2))
    x = before.latents
    for _ in range(2):
        here = difference(tiny, before, x)
        x = x - 0.7 * (difference(tiny, before, x + 10 * here / norm(here)) - here)
    close(after.latents, x)
    assert run.gradient_passes.eq(0).all() and run.network_calls.eq(8 + 2).all()

    # and sharpness-aware noise lowers the magnitude ahead
    def ahead(state):
        here = difference(tiny, state, state.latents)
        return norm(difference(tiny, state, state.latents + 0.25 * here / norm(here)))

    after, _, _ = start(tiny, p.SharpnessAwareNoise(0.0, radius=0.25, pull=0.0, rate=0.02, iterations=10))
    assert (ahead(after) < ahead(before)).all()


@pytest.mark.parametrize("method", [
    p.RandomNumbers(2), p.EmbeddingNoise(0.2), p.ConditionAnnealing(0.1), p.CrossAttentionMask(2.0, keep_end=False),
    p.PromptOptimization(0.05, rate=0.01, iterations=3), p.NoiseDescent(0.05, rate=0.02, iterations=3),
    p.NoiseAscent(12.5, 3.0), p.SharpnessAwareNoise(0.1, 0.25, 0.01, 0.02, iterations=3), p.SpikeDamping(0.3),
    p.Reanchoring(0.0), p.StabilityRegion(0.5, ("an owl", "here is a tomato"), 2.0),
    AdaptiveProjectedGuidance(2.0, None, 1, None, 0), ClassifierFreeZeroStarGuidance(2.0, 0),
], ids=lambda method: type(method).__name__)  # fmt: skip
def test_a_sample_does_not_depend_on_the_batch_around_it(tiny, method, tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", str(tmp_path))
    changes, options = isinstance(method, basinlab.Mitigation), {"steps": 5, "progress": False}
    guidance = basinlab.AttractRepel(2.0, 0.5) if changes else basinlab.ConstantGuidance(2.0)
    setting = [method, guidance] if changes else method
    together = basinlab.sample(tiny, PROMPTS, range(3), setting, **options)
    alone = basinlab.sample(tiny, PROMPTS[1], 2, setting, **options)
    close(together.latents[-1:], alone.latents)
    plain = basinlab.sample(tiny, PROMPTS[1], 2, guidance, **options)
    assert (plain.latents - alone.latents).abs().max() > 1e-3


def test_descents_work_in_half_precision_and_where_no_gradients_are_kept(tiny_folder, tiny):
    half = basinlab.load(tiny_folder, dtype=torch.float16)
    methods = p.PromptOptimization(0.01, 0.01, 2), p.SharpnessAwareNoise(0.01, 0.5, 0.05, 0.02, 1)
    for method, context in itertools.product(methods, (torch.no_grad, torch.inference_mode)):
        wanted, _, _ = start(tiny, method, seeds=[0])
        with context():
            state, _, _ = start(half, method, seeds=[0])
        for name in ("latents", "conditional"):
            found, expected = (getattr(s, name).float() for s in (state, wanted))
            assert found.isfinite().all() and (found - expected).norm() < 0.02 * expected.norm()


ORDINARY = ("an owl", "here is a tomato", "a photo of a pretzel")


@pytest.mark.parametrize("neutral", [
    [p.SpikeDamping(1.0), basinlab.AttractRepel(2.0, 0.0)],
    [p.Reanchoring(np.inf), basinlab.ConstantGuidance(2.0)],
    [p.StabilityRegion(np.inf, ORDINARY, 2.0), basinlab.ConstantGuidance(2.0)],
    [basinlab.Gated(np.inf, basinlab.OppositeGuidance(500, 2.0), 2.0)],
], ids=lambda setting: type(setting[0]).__name__)  # fmt: skip
def test_neutral_settings_are_plain_guidance_bit_for_bit(tiny, neutral, tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", str(tmp_path))
    options = {"steps": 5, "progress": False}
    plain = basinlab.sample(tiny, PROMPTS, [0, 1], basinlab.ConstantGuidance(2.0), **options)
    found = basinlab.sample(tiny, PROMPTS, [0, 1], neutral, **options)
    assert found.latents.equal(plain.latents)
    assert found.network_calls.eq(plain.network_calls + 2 * isinstance(neutral[0], p.Reanchoring)).all()


def test_spike_tokens_are_damped_per_head_in_the_early_blocks(tiny):
    state, _, _ = start(tiny, seeds=[0])
    spikes, usual = torch.tensor([[0.3, 0.1], [1.0, 0.1]]), predict(tiny, state.conditional)
    found, queries, seen = predict(tiny, state.conditional, spikes=spikes), {}, []
    cross = {name: layer for name, layer in tiny.unet.named_modules() if name.endswith("attn2")}
    layers = {name: layer for name, layer in cross.items() if not name.startswith("up_blocks")}

    def damped(module, inputs, output, name):  # by loops, over the keys before they are used
        heads = layers[name].heads
        query, key = (x.unflatten(2, (heads, -1)) for x in (queries[name], output.clone()))
        for head in range(heads):
            highest = (query[0, :, head] @ key[0, :, head].T * layers[name].scale).max(dim=0).values
            rest = highest[1:].numpy()
            high = [k for k in range(1, len(highest)) if (highest[k] - rest.mean()) / (rest.std(ddof=1) + 1e-6) > 0.1]
            seen.append(len(high))
            key[0, high, head] *= 0.3
        return key.flatten(2)

    hooks = []
    for name, layer in layers.items():
        keep = layer.to_q.register_forward_hook(lambda m, i, output, name=name: queries.update({name: output}))
        hooks += [keep, layer.to_k.register_forward_hook(functools.partial(damped, name=name))]
    wanted = predict(tiny, state.conditional)
    for hook in hooks:
        hook.remove()
    assert len(layers) >= 3 and min(seen) > 0 and max(seen) < state.conditional.shape[1] - 1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - usual)[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], usual[1], atol=1e-5, rtol=0)  # a factor of 1


def test_reanchoring_is_attraction_to_the_other_phrasing_and_repulsion_from_the_prompt(tiny):
    before, _, _ = start(tiny, seeds=[0, 1])
    limit = float(magnitude(tiny, before).sort().values[1:3].mean())  # two of four are above it
    after, _, run = start(tiny, p.Reanchoring(limit), seeds=[0, 1])
    above = magnitude(tiny, before) > limit
    assert above.sum() == 2 and run.network_calls.eq(2 + 2).all()
    assert after.unconditional[above].equal(before.conditional[above])
    assert after.unconditional[~above].equal(before.unconditional[~above])
    assert after.conditional[~above].equal(before.conditional[~above])
    assert [before.texts[i].split() for i in range(4)] == [text.split() for text in after.texts]
    for moved, text in zip(after.conditional[above], np.array(before.texts)[above.numpy()], strict=True):
        orders = tiny.embed([" ".join(order) for order in itertools.permutations(text.split())])
        assert (orders - moved).abs().amax((1, 2)).min() < 1e-5


def test_the_stability_region_holds_norms_within_its_bounds(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", str(tmp_path))
    options = {"steps": 4, "progress": False}
    plain = basinlab.sample(tiny, ORDINARY, 0, basinlab.ConstantGuidance(2.0), **options)
    norms = p.ordinary_norms(tiny, ORDINARY, basinlab.ConstantGuidance(2.0), steps=4)
    lengths = plain.latents.diff(dim=1).flatten(2).norm(dim=2), plain.latents[:, 1:].flatten(2).norm(dim=2)
    for kind, measured in enumerate(lengths, start=1):
        torch.testing.assert_close(norms[0, :, kind], measured.mean(0))
        torch.testing.assert_close(norms[1, :, kind], measured.std(0))
    region = [p.StabilityRegion(0.1, ORDINARY, 2.0), basinlab.ConstantGuidance(6.0)]
    found = basinlab.sample(tiny, PROMPTS, 0, region, **options).latents[:, 1:].flatten(2).norm(dim=2)
    assert ((found - norms[0, :, 2]).abs() / norms[1, :, 2]).max() < 0.101
    basinlab.sample(tiny, PROMPTS, 0, p.StabilityRegion(3.0, ORDINARY, 2.0), **options)
    assert len([*tmp_path.rglob("*.safetensors")]) == 1  # measured once, for all gammas


@pytest.fixture(scope="module")
def run(tiny):
    return basinlab.sample(tiny, PROMPTS, [0, 1], basinlab.ConstantGuidance(2.0), steps=6, progress=False)


def both(run, step, t):
    """The two predictions of the network itself at the states of ``step``."""
    denoiser, x = run.denoiser, run.latents[:, step]
    with torch.no_grad():
        return [denoiser.unet(x, t, denoiser.embed(texts)).sample for texts in (run.prompts, [""] * len(run))]


def test_first_step_detectors_are_their_formulas_whatever_the_batch(tiny, run):
    c, u = both(run, 0, run.timesteps[0])
    alpha_bar = tiny.scheduler.alphas_cumprod[run.timesteps[0]]
    ahead = replace(run, latents=run.latents + 3 / 16 * ((c - u) / norm(c - u))[:, None])
    c2, u2 = both(ahead, 0, run.timesteps[0])
    assert run.latents[0, 0].numel() == 576  # so that a radius of 1 is 3 / 16 here
    torch.testing.assert_close(detection.sharpness(run), alpha_bar.sqrt() * length(c2 - u2), atol=1e-5, rtol=1e-4)
    c, u = both(run, 0, run.timesteps[-3])
    cosine = torch.cosine_similarity(u, c - u, dim=1).mean((1, 2))
    expected = run.guidance_magnitude[:, 0] + 2 * 3 / 16 * (alpha_bar / 0.0047).sqrt() * cosine
    torch.testing.assert_close(detection.anisotropy(run), expected, atol=1e-5, rtol=1e-4)
    # and no detector's score depends on the batch
    of = "sharpness anisotropy picture_weight end_attention critical_scale"
    for score in (getattr(detection, name) for name in of.split()):
        torch.testing.assert_close(score(run)[2:3], score(run[2]), atol=1e-4, rtol=1e-4)


def test_end_attention_looks_where_diffusers_own_attention_does(tiny, run):
    layer = next(part for name, part in tiny.unet.named_modules() if name.endswith("attn2"))
    before, seen = layer.processor, []
    scores = layer.get_attention_scores
    layer.get_attention_scores = lambda *given: seen.append(scores(*given)) or seen[-1]
    layer.set_processor(AttnProcessor())
    both(run, -2, run.timesteps[-1])
    layer.set_processor(before)
    del layer.get_attention_scores
    ends = [len(ids) - 1 for ids in tiny.tokenizer(run.prompts).input_ids]
    heads = seen[0].unflatten(0, (4, -1)).mean(1)
    side = int(heads.shape[1] ** 0.5)
    small = torch.stack([heads[i, :, end].view(side, side) for i, end in enumerate(ends)])
    mask = torch.kron(small, torch.ones(16 // side, 16 // side))[:, None]
    c, u = both(run, 0, run.timesteps[0])
    expected = tiny.scheduler.alphas_cumprod[run.timesteps[0]].sqrt() * length((c - u) * mask) / mask.mean((1, 2, 3))
    torch.testing.assert_close(detection.end_attention(run), expected, atol=1e-5, rtol=1e-4)
    assert layer.processor is before and not layer.to_q._forward_hooks


def test_the_pictures_weight_is_that_of_a_mixed_trajectory_and_stability_a_z_score(tiny, run):
    w = torch.linspace(0, 1, 7)[None, :, None, None, None]
    x, noise = run.latents[:, -1:], run.latents[:, :1]
    mixed = replace(run, latents=w * x + (1 - w) * noise)
    expected = w.flatten()[1] / run.denoiser.scheduler.alphas_cumprod[run.timesteps[1]].sqrt()
    torch.testing.assert_close(detection.picture_weight(mixed), expected.expand(4), atol=1e-3, rtol=1e-3)
    # and stability is the largest z-score of an update
    norms = p.ordinary_norms(tiny, ["an owl", "here is a tomato"], basinlab.ConstantGuidance(2.0), steps=6)
    z = (length(run.latents.diff(dim=1).flatten(0, 1)).view(4, 6) - norms[0, :, 1]) / norms[1, :, 1]
    torch.testing.assert_close(detection.stability(run, norms), z.max(dim=1).values)


def test_the_critical_scale_is_the_width_of_the_basin_where_that_is_known():
    """A Gaussian of deviation 1 takes x to x / (1 + sigma^2): a step that may be a quarter of x at most."""
    centre, wide = torch.tensor([3.0, 0.0]), basinlab.MixtureDenoiser([(0.0, 0.0)], [1.0], {"": [1.0], "point": [1.0]})
    run = basinlab.sample(wide, "point", [0, 1], basinlab.ConstantGuidance(1.0), progress=False)
    run.latents[:, -1] = centre.view(2, 1, 1)
    found = detection.critical_scale(run, scales=50, iterations=1)
    sigmas = (1 / wide.scheduler.alphas_cumprod[run.timesteps] - 1).sqrt()
    torch.testing.assert_close(found, sigmas[1 - 1 / (1 + sigmas**2) <= 0.25].max().expand(2))
    world = basinlab.MixtureDenoiser.with_duplicate()
    run = basinlab.sample(world, "memorized", [0, 1], basinlab.ConstantGuidance(1.0), progress=False)
    run.latents[0, -1], run.latents[1, -1] = world.duplicate, torch.tensor([-5.0, 3.0]).view(2, 1, 1)
    duplicate, elsewhere = detection.critical_scale(run)
    assert duplicate > 1 > elsewhere


def test_separation_is_that_of_scikit_learn_and_of_counting():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": np.repeat(np.arange(40), 5), "truth": np.repeat(np.arange(40) < 20, 5)})
    table["score"] = (rng.normal(size=200) + table["truth"]).round(1)  # with ties
    area, found = detection.separation(table, "score", "truth").itertuples()
    assert area.value == pytest.approx(roc_auc_score(table["truth"], table["score"]))
    assert area.low < area.value < area.high and (area.n, area.prompts) == (200, 40)
    limit = table.loc[~table["truth"], "score"].sort_values().iloc[-2]  # above it lies one of 100
    assert found.value == pytest.approx((table.loc[table["truth"], "score"] > limit).mean())
    perfect = detection.separation(table.assign(score=table["truth"] * 1.0), "score", "truth")
    assert perfect["value"].eq(1).all() and perfect["low"].between(0.8, 0.9).all()  # 20 prompts without exception
    assert detection.separation(table[table["truth"]], "score", "truth")[["value", "low", "high"]].isna().all(axis=None)
    holes, own = (pd.concat([table, table.assign(score=np.nan)]), detection.separation(table, "score", "truth"))
    pd.testing.assert_frame_equal(detection.separation(holes, "score", "truth"), own)  # what has no score is left out
