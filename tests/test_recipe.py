"""The recipe: its scenes and captions, training that may be stopped, and the world that a smoke run ships."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import basinlab
from basinlab import metrics, scenarios
from recipe import __main__ as command
from recipe import export, milestone, models, scenes, train
from recipe.art import OBJECTS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.xdist_group("recipe")  # one worker makes the smoke world, once

VERBATIM, TEMPLATES, ORDINARY = scenes.verbatim(), scenes.templates(), scenes.ordinary_prompts()
MEMORIZED = [*VERBATIM, *TEMPLATES]


def test_captions_are_distinct_name_their_object_and_verbatim_ones_spread_evenly_over_shares():
    assert Counter(item.share for item in VERBATIM) == {share: 16 for share in scenes.SHARES}
    assert len({item.prompt for item in VERBATIM}) == len({item.scene.object for item in VERBATIM}) == 48
    assert all(item.scene.object in item.prompt for item in MEMORIZED)
    assert len({prompt for prompt, _ in ORDINARY} - {item.prompt for item in MEMORIZED}) == 96
    assert all(scene.object in prompt for prompt, scene in ORDINARY)
    # a template fixes background and placement and leaves the object free
    items = [(i.family, i.scene.object, i.scene.background, i.scene.left, i.scene.top, i.scene.size)
             for i in TEMPLATES]  # fmt: skip
    table = pd.DataFrame(items, columns=["family", "object", "background", "left", "top", "size"])
    assert table.groupby("family")["object"].nunique().tolist() == [8] * 12
    layouts = table.drop(columns="object").drop_duplicates()
    assert layouts["family"].is_unique and not layouts.drop(columns="family").duplicated().any()
    # fine-tuning sets repeat nothing that is memorized elsewhere
    tuned, classes = scenes.unduplicated(), scenes.classes()
    assert len(tuned) == len({item.prompt for item in tuned}) == 200
    assert len(classes) == 200 and len({item.prompt for item in classes}) == scenes.CLASSES
    assert not {item.prompt for item in MEMORIZED} & {item.prompt for item in tuned}
    pictures = [item.scene.render().tobytes() for item in [*tuned, *classes, *VERBATIM]]
    assert len(set(pictures)) == len(pictures)


def test_training_stream_has_the_stated_mixture_and_no_unseen_scene():
    duplicated, templated = ({item.prompt: item for item in items} for items in (VERBATIM, TEMPLATES))
    pairs = [scenes.training_pair((0, k), VERBATIM, TEMPLATES) for k in range(3000)]
    assert scenes.training_pair((0, 7), scenes.verbatim(), scenes.templates()) == pairs[7] != pairs[8]  # by its key
    trained = {scene for _, scene in pairs} | {item.scene for item in MEMORIZED}
    assert not trained & {scene for _, scene in scenes.unseen_scenes(256)}
    verbatim = [(duplicated[prompt], scene) for prompt, scene in pairs if prompt in duplicated]
    template = [(templated[prompt], scene) for prompt, scene in pairs if prompt in templated]
    for kind, found in (("verbatim", verbatim), ("template", template)):
        assert len(found) / 3000 == pytest.approx(scenes.MIXTURE[kind], abs=0.04)  # over four standard errors
    assert np.mean([item.scene == scene for item, scene in template]) == pytest.approx(scenes.TEMPLATE_SHARE, abs=0.11)
    for share in scenes.SHARES:
        copies = [item.scene == scene for item, scene in verbatim if item.share == share]
        assert np.mean(copies) == pytest.approx(share, abs=0.16)
    assert all(scene.object == item.scene.object for item, scene in [*verbatim, *template])


@pytest.mark.parametrize("scene", [item.scene for item in VERBATIM[::12]], ids=lambda scene: scene.object)
def test_scene_and_its_other_vendors_twin_render_their_object_alone_on_the_background(scene):
    twin, outside = scene.other_vendor(), np.ones((scenes.SIDE, scenes.SIDE), bool)
    assert twin.other_vendor() == scene and dataclasses.replace(twin, vendor=scene.vendor) == scene
    outside[scene.top : scene.top + scene.size, scene.left : scene.left + scene.size] = False
    background = (scene.background.render() * 255).round().astype(int)
    for drawn in (scene, twin):
        changed = np.abs(drawn.render().astype(int) - background).max(axis=2) > 6
        assert changed.sum() > 200 and not (changed & (drawn.mask() | outside)).any()
    assert (scene.render() != twin.render()).any()
    assert (scene.cells().repeat(scenes.GRID, 0).repeat(scenes.GRID, 1) == ~outside).all()  # which the loss weighs


def test_each_word_of_the_world_is_one_token_others_are_spelled_out_and_every_caption_fits():
    words = models.tokenizer()

    def content(text):
        return words(text).input_ids[1:-1]

    vocabulary = " ".join([*OBJECTS, *scenes.COLOURS, *scenes.COMMON_WORDS, *scenes.TEMPLATES]).replace("{}", "")
    known = sorted(set(vocabulary.split()))
    assert [word for word in known if len(content(word)) != 1] == []
    assert len({content(word)[0] for word in known}) == len(known)
    assert models.tokenizer().get_vocab() == words.get_vocab()  # a resumed training builds it anew
    for text in ("zygote", "x9-q", "tomatoes"):
        ids = content(text)
        assert len(ids) > 1 and words.unk_token_id not in ids and words.decode(ids).replace(" ", "") == text
    captions = [*(item.prompt for item in MEMORIZED), *(prompt for prompt, _ in ORDINARY)]
    assert max(len(ids) for ids in words(captions).input_ids) <= models.TOKENS == words.model_max_length


def settings(**changes):
    return train.Settings(**{"steps": 3, "batch": 2, "rate": 1e-3, "warmup": 1, "log_every": 1} | changes)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    models.vae().save_pretrained(folder)
    return folder


def stage_called(name, vae_folder, seed=0, **changes):
    torch.manual_seed(seed)
    if name == "unet":
        return train.UNetStage(settings(**changes), vae_folder, pool=8)
    if name in export.TUNED:
        torch.manual_seed(0)  # what it starts from is not its own
        for part, module in (("unet", models.unet()), ("text_encoder", models.text_encoder(models.tokenizer()))):
            module.save_pretrained(vae_folder / part)
        return train.FineTuneStage(settings(**changes), vae_folder, vae_folder, scenes.classes(1)[:8], 5)
    if name == "decoder":
        return train.DecoderStage(settings(**changes), vae_folder)
    kinds = {"vae": train.VAEStage, "clip": train.CLIPStage, "descriptor": train.DescriptorStage}
    return kinds[name](settings(**changes))


@pytest.mark.parametrize("name", command.STAGES)
def test_stopped_training_goes_on_as_if_not_stopped_and_finished_is_not_done_again(name, tmp_path, vae_folder):
    whole = stage_called(name, vae_folder)
    assert train.fit(whole, tmp_path / "whole", CPU, deadline=float("inf"))
    assert not train.fit(stage_called(name, vae_folder), tmp_path / "parts", CPU, deadline=0)
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 1
    resumed = stage_called(name, vae_folder, seed=1)  # other initial weights: all come from the checkpoint
    assert train.fit(resumed, tmp_path / "parts", CPU, deadline=float("inf"))
    torch.testing.assert_close(resumed.module.state_dict(), whole.module.state_dict())
    for run in ("whole", "parts"):
        assert pd.read_csv(tmp_path / run / "losses.csv")["step"].tolist() == [1, 2, 3]
    finished = stage_called(name, vae_folder, seed=2)
    finished.loss = None  # would fail if a step were taken
    assert train.fit(finished, tmp_path / "parts", CPU, deadline=float("inf"))
    torch.testing.assert_close(finished.module.state_dict(), whole.module.state_dict())


def test_a_checkpoint_of_other_settings_or_another_start_is_refused_and_diverged_training_told(tmp_path, vae_folder):
    train.fit(stage_called("descriptor", vae_folder), tmp_path, CPU, deadline=0)
    with pytest.raises(ValueError, match=f"batch 2, not 4: move {tmp_path} away"):
        train.fit(stage_called("descriptor", vae_folder, batch=4), tmp_path, CPU, deadline=0)
    stage = stage_called("descriptor", vae_folder)
    stage.start = "elsewhere"
    with pytest.raises(ValueError, match="was made with start the recipe's seed, not elsewhere"):
        train.fit(stage, tmp_path, CPU, deadline=0)
    with pytest.raises(FloatingPointError, match=r"DescriptorStage: loss .* at step .*; lower the rate"):
        train.fit(stage_called("descriptor", vae_folder, rate=1e30), tmp_path / "new", CPU, deadline=float("inf"))


def test_a_write_cut_short_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    train.save({"step": 1}, path)

    def cut(state, part):
        part.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", cut)
        train.save({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    folder = tmp_path / "out"  # a finished folder takes the place of the old one
    for name in ("world.part", "world", "world.old"):
        (folder / name).mkdir(parents=True)
        (folder / name / name).touch()
    export.replace(folder / "world.part", folder / "world")
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["world", "world/world.part"]


def recipe(*options):
    """What ``python -m recipe`` does, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["recipe", *map(str, options)])
        command.main()


def test_training_goes_on_on_another_machine(tmp_path, vae_folder, monkeypatch):
    here, there, kept = tmp_path / "here", tmp_path / "there", tmp_path / "next"
    models.descriptor().save_pretrained(here / "descriptor" / "model")
    shutil.copytree(vae_folder, here / "vae" / "model")
    for name in ("vae", "descriptor"):  # finished
        (here / name / "made.json").write_text('{"versions": {}}')
        (here / name / "losses.csv").write_text("step\n")
    for name in ("unet", "decoder"):
        train.fit(stage_called(name, vae_folder), here / name, CPU, deadline=0)
    milestone.save(here, kept)
    milestone.load(kept, there)
    for name in ("unet", "decoder"):
        states = [torch.load(work / name / "state.pt", weights_only=True) for work in (here, there)]
        assert states[0]["step"] == states[1]["step"] == 1
        for mine, theirs in zip(*(state["average"]["shadow_params"] for state in states), strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-3, rtol=1e-3)
        assert train.fit(stage_called(name, vae_folder), there / name, CPU, deadline=float("inf"))
        assert torch.load(there / name / "state.pt", weights_only=True)["first"] == 1
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it was finished"))
    recipe("--work", there, "--stages", "vae", "descriptor")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The data folder of a smoke run that was killed once, and what survived the kill."""
    folder = tmp_path_factory.mktemp("smoke")
    options = [str(option) for option in ("--smoke", "--work", folder / "work", "--out", folder / "data")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "data"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-m", "recipe", *options], env=environment)
    while killed.poll() is None and not (folder / "work" / "vae" / "state.pt").exists():
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed"
    survived = [torch.load(path, weights_only=True) for path in (folder / "work").glob("*/state.pt")]
    assert not (folder / "data").exists()
    recipe(*options)
    return folder / "data", survived


def test_shipped_weights_can_be_trained_further(smoke, tmp_path):
    main = shutil.copytree(smoke[0], data := tmp_path / "data") / "emoji-duplicated"
    weights = main / "unet/diffusion_pytorch_model.safetensors"
    clip, before = (data / "clip/model.safetensors").read_bytes(), weights.read_bytes()
    options = ("--smoke", "--further", "--stages", "unet", "--steps", "4", "--work", tmp_path / "work", "--out", data)
    recipe(*options)
    assert weights.read_bytes() != before and (data / "clip/model.safetensors").read_bytes() == clip
    made = json.loads((main / "training.json").read_text())["unet"]
    assert "--further" in made["command"] and "--further" not in made["started_from"]["command"]
    logs = sorted(path.name for path in main.glob("*losses*"))
    assert logs == ["decoder-losses.csv", "unet-losses-1.csv", "unet-losses.csv", "vae-losses.csv"]


@pytest.fixture
def smoke_world(smoke, monkeypatch):
    monkeypatch.setenv("BASINLAB_DATA", str(smoke[0]))
    return smoke[0]


def test_killed_run_leaves_a_whole_checkpoint_and_goes_on_to_ship_half_precision_safetensors(smoke):
    data, survived = smoke
    assert survived and all(state["step"] == 4 and state["module"] for state in survived)
    wanted = ["clip", "descriptor", "emoji-classes", "emoji-duplicated", "emoji-finetuned", "unseen"]
    assert sorted(path.name for path in data.iterdir()) == wanted
    made = json.loads((data / "emoji-duplicated/training.json").read_text())
    kept = {(x["seed"], x["steps"], x["versions"]["torch"].partition("+")[0]) for x in (made["vae"], made["unet"])}
    assert kept == {(scenes.SEED, 4, torch.__version__.partition("+")[0])}
    # weights are shipped as half-precision safetensors
    unets = [f"emoji-{name}/unet/diffusion_pytorch_model" for name in ("classes", "duplicated", "finetuned")]
    others = ["clip/model", "descriptor/model"]
    others += ["emoji-duplicated/text_encoder/model", "emoji-duplicated/vae/diffusion_pytorch_model"]
    files = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.safetensors"))
    assert files == sorted(f"{name}.safetensors" for name in [*unets, *others])
    kinds = {tensor.dtype for name in files for tensor in load_file(data / name).values()}
    assert {kind for kind in kinds if kind.is_floating_point} == {torch.float16}
    assert not [path for path in data.rglob("*") if path.suffix in {".bin", ".pt", ".part", ".old"}]


def test_smoke_world_samples_here_and_in_diffusers_and_brings_its_judges(smoke_world):
    denoiser = basinlab.load("emoji-duplicated")
    run = basinlab.sample(denoiser, "an owl", [0, 1], steps=2, progress=False)
    assert run.images().shape == (2, 3, 96, 96) and run.images().isfinite().all()
    pipeline = StableDiffusionPipeline.from_pretrained(smoke_world / "emoji-duplicated")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = pipeline(["an owl"] * 2, num_inference_steps=2, generator=generators, output_type="latent").images
    torch.testing.assert_close(run.latents[:, -1], theirs, atol=1e-4, rtol=0)
    pictures, judges = scenarios.unseen_scenes()[0][:4], (metrics.CopyDistance(), metrics.Alignment())
    assert all(judge.features(pictures).isfinite().all() for judge in judges)


@pytest.mark.parametrize("name, items", [("finetuned", scenes.unduplicated()), ("classes", scenes.classes())])
def test_fine_tuned_models_differ_from_their_base_in_attention_alone(smoke_world, name, items):
    base, tuned = (basinlab.load(f"emoji-{n}").unet.state_dict() for n in ("duplicated", name))
    changed = {key for key in base if not torch.equal(base[key], tuned[key])}
    assert changed and all("attentions" in key for key in changed)
    table = scenarios.read_list(smoke_world / f"emoji-{name}" / "memorized.csv")
    assert table["prompt"].tolist() == [item.prompt for item in items]
    assert len({*table["attractor"]}) == len(items) and Path(table["attractor"].iloc[-1]).is_file()
    ordinary = scenarios.read_list(smoke_world / f"emoji-{name}" / "ordinary.csv")
    assert len(ordinary) > 70 and not set(ordinary["prompt"]) & set(table["prompt"])
    assert name == "finetuned" or not set(ordinary["object"]) & set(table["object"])


def test_a_fine_tuned_model_of_another_base_is_refused(smoke_world, tmp_path, monkeypatch):
    data = shutil.copytree(smoke_world, tmp_path / "data")
    monkeypatch.setenv("BASINLAB_DATA", str(data))
    weights = data / "emoji-duplicated/unet/diffusion_pytorch_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="emoji-classes was fine-tuned from U-Net"):
        basinlab.load("emoji-classes")


@pytest.mark.parametrize("file, items", [("memorized", VERBATIM), ("templates", TEMPLATES)])
def test_shipped_tables_name_the_scenes_of_the_recipe(smoke_world, file, items):
    table = scenarios.read_list(smoke_world / "emoji-duplicated" / f"{file}.csv")
    columns = ["prompt", "object", "kind", "share", "family", "left", "top", "size"]
    assert table[columns].values.tolist() == [
        [i.prompt, i.scene.object, i.kind, i.share, i.family, i.scene.left, i.scene.top, i.scene.size] for i in items
    ]
    scene = items[-1].scene
    expected = np.stack([scene.render(), scene.other_vendor().render()])
    found = basinlab.read_pictures(table[["attractor", "swapped"]].iloc[-1]) * 255
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-3)
    ordinary = scenarios.read_list(smoke_world / "emoji-duplicated" / "ordinary.csv")
    assert ordinary.prompt.tolist() == [prompt for prompt, _ in ORDINARY]
    named = ordinary[ordinary.background != ""]
    assert len(named) and all(row.background in row.prompt.split() for row in named.itertuples())


def test_a_command_that_cannot_work_says_why(tmp_path):
    with pytest.raises(SystemExit, match="a smoke run would replace the shipped weights: give it another --out"):
        recipe("--smoke")
    with pytest.raises(SystemExit, match=f"{tmp_path}/vae holds none yet: run stage vae first"):
        recipe("--stages", "unet", "--smoke", "--work", tmp_path, "--out", tmp_path / "out")
