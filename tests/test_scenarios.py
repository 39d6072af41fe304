import json
from pathlib import Path

import pytest
import yaml

import basinlab
from basinlab.published import prompt_lists, scenarios
from basinlab.published.prompt_lists import read_list

PAPERS = ("sd14-finetuned", "sd14-webster", "sd21-imagenette", "sd21-laion10k")
BUNDLED = ("emoji-classes", "emoji-duplicated", "emoji-finetuned")
LEAST = {
    "title": "t",
    "source": "s",
    "model": "emoji-duplicated",
    "static_transition_point": 650,
    "prompts": {"memorized": {"texts": {"a": "an owl"}}},
    "references": {"from": "table"},
    "metrics": {"copy": ["descriptor"], "alignment": "clip", "quality": ["cmmd"]},
}


def written(folder, **changed):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **changed}))
    return path


def test_all_seven_are_read():
    assert scenarios.names() == sorted([*PAPERS, *BUNDLED])
    for name in scenarios.names():
        found = scenarios.read(name)
        assert found.name == name and found.steps == 50
        assert "memorized" in found.prompts


def test_the_papers_have_the_constants_of_the_official_commands():
    found = {name: scenarios.read(name) for name in PAPERS}
    assert all(scenario.scale == 7.5 for scenario in found.values())
    laion, classes = found["sd21-laion10k"], found["sd21-imagenette"]
    assert (laion.static_transition_point, laion.opposite_until, laion.opposite_scale) == (500, 650, 2.0)
    assert (laion.resolution, classes.resolution, classes.static_transition_point) == (256, 256, 600)
    assert found["sd14-finetuned"].unet.parts[-2:] == ("checkpoint-20000", "unet")
    texts = classes.prompts["memorized"].texts
    assert len(texts) == 10 and texts["n03000684"] == "An image of chain saw"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_ones_have_prompts_attractors_and_a_scale(name):
    scenario = scenarios.read(name)
    table = scenario.table("memorized")
    assert table.equals(basinlab.scenarios.read(name).table())
    assert all(Path(path).is_file() for path in table["attractor"])
    assert len(scenario.table("ordinary")) > 90
    assert scenario.scale == basinlab.models.read_scenario(name)["guidance_scale"]


def test_the_scenario_loads_its_denoiser(tmp_path, tiny_folder):
    scenario = scenarios.read(written(tmp_path, model=f"./{tiny_folder.name}", resolution=32))
    (tmp_path / tiny_folder.name).symlink_to(tiny_folder)
    assert scenario.load().latent_shape[1:] == (8, 8)


def test_missing_weights_say_where_they_can_be_had():
    with pytest.raises(ValueError, match=r"no checkpoint .*sd-21-finetuned_LAION10K.*weights from https://drive"):
        scenarios.read("sd21-laion10k").load()


def test_missing_lists_and_pictures_say_where_they_can_be_had(tmp_path):
    prompts = {"memorized": {"file": "x.jsonl", "format": "wen", "url": "https://example.org/x.jsonl"}}
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x.jsonl is missing: fetch it from https://example.org/x"):
        scenarios.read(written(tmp_path, prompts=prompts)).table()
    references = {"from": "folder", "folder": "pictures", "url": "https://example.org/pictures"}
    with pytest.raises(FileNotFoundError, match=r"pictures has no picture a\.\*.*from https://example.org/pictures"):
        scenarios.read(written(tmp_path, references=references)).table()
    with pytest.raises(ValueError, match=r"own.yaml has no prompts.ordinary: give one of \['memorized'\]"):
        scenarios.read(written(tmp_path)).table("ordinary")


def test_reference_folder_gives_a_row_for_each_picture(tmp_path):
    prompts = {"memorized": {"texts": {"a": "an owl", "b": "a fox"}}}
    for name in ("pictures/a/2.png", "pictures/a/1.png", "pictures/a/notes.txt", "pictures/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = scenarios.read(
        written(tmp_path, prompts=prompts, references={"from": "folder", "folder": "pictures"})
    ).table()
    assert table["prompt"].tolist() == ["an owl", "an owl", "a fox"]
    assert [Path(path).name for path in table["attractor"]] == ["1.png", "2.png", "b.jpg"]


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no scenario 'sd15'.*'sd14-webster'"):
        scenarios.read("sd15")
    with pytest.raises(ValueError, match=r"no scenario .*none.yaml'"):
        scenarios.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"stpes": 50}, r"own.yaml: unknown key 'stpes': the keys are \['guidance_scale', 'metrics', .*'steps'"),
        ({"steps": 0}, "own.yaml: steps is 0: give a whole number from 1 to 1000"),
        ({"steps": True}, "own.yaml: steps is True: give a whole number"),
        ({"static_transition_point": 1000}, "static_transition_point is 1000: give a timestep, .* 1 to 999"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: give a number from 0.1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf: give a number from 0.1"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5': give a number"),
        (
            {"metrics": {**LEAST["metrics"], "copy": ["scd"]}},
            r"metrics.copy.0 is 'scd': give one of \['descriptor', 'sscd'",
        ),
        (
            {"metrics": {"copy": ["sscd"], "quality": ["fid"]}},
            "metrics.alignment is missing: give clip, the bundled one",
        ),
        ({"references": {"from": "web"}}, r"references.from is 'web': give one of \['table', 'url', 'folder'\]"),
        ({"references": {"from": "folder"}}, "references.folder goes with references.from folder"),
        ({"prompts": {}}, "prompts.memorized is missing: give file, format and url of a list, or texts"),
        ({"prompts": {"memorized": {"file": "x"}}}, r"prompts.memorized has \['file'\]: give file, format and url, or"),
        (
            {"prompts": {"memorized": {"file": "x", "format": "wen"}}},
            "prompts.memorized.url is missing: give an address",
        ),
        (
            {"prompts": {"memorized": {"texts": {"../x": "y"}}}},
            "prompts.memorized.texts is .*: give a name without slashes",
        ),
        ({"weights_url": "file:///etc/passwd"}, "weights_url is 'file:.*': give an address with http"),
        (
            {"prompts": {"memorized": {"file": "x", "format": "xml"}}},
            r"memorized.format is 'xml': give one of \['basinlab'",
        ),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        scenarios.read(written(tmp_path, **changed))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is None: give a mapping of"),
        (b"- a\n- b", "the file is .*: give a mapping of"),
        (b"title: \xff", "byte 7: no UTF-8"),
        (b"a: &x [1]\nb: *x", "no YAML of a scenario: line 2: aliases"),
        (b"a: !!python/name:os.system x", "aliases, tags, deep nesting"),
        (b"[" * 50_000, "aliases, tags, deep nesting"),
        (b"steps: 0x" + b"f" * 50_000, "2000 letters at once"),
        (b"#" * 200_000, "more than 100 kB"),
        (b"title: a\ntitle: b", "key 'title' is given twice"),
        (b"title: 2001-99-99", "no YAML of a scenario: month must be in"),
        (b"title: [", "no YAML of a scenario"),
    ],
)
def test_files_that_are_no_scenario_are_named(tmp_path, content, words):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"own.yaml.*{words}"):
        scenarios.read(path)


def test_all_that_is_wrong_is_said_once(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({key: LEAST[key] for key in LEAST if key not in ("title", "model")} | {"steps": -1}))
    with pytest.raises(ValueError) as error:
        scenarios.read(path)
    found = [line.removeprefix(f"{path}: ").split(" is ")[0] for line in str(error.value).splitlines()]
    assert found == ["title", "model", "steps"]


def test_whole_numbers_written_with_a_point_are_whole(tmp_path):
    assert type(scenarios.read(written(tmp_path, steps=25.0)).steps) is int


# Lists of prompts

CAPTION = '"Watch: The ""New"" Video; part\u2028two"'
URL = "https://example.org/a@2x.jpg"


def test_the_shared_formats_agree(tmp_path):
    quoted = CAPTION.replace('"', '""')
    texts = {
        "wen": json.dumps({"caption": CAPTION, "index": 7, "url": URL}) + "\n",
        "han": f';Caption;URL;type;mean_sscd;max_sscd;Index\n0;"{quoted}";{URL};TM;0.1;0.2;7\n',
        "memattn": f"{CAPTION}\r\n",
    }
    for format, text in texts.items():
        path = tmp_path / format
        path.write_text(text, encoding="utf-8", newline="")
        row = read_list(path, format).loc[0]
        assert row["prompt"] == CAPTION
        if format != "memattn":
            assert (row["url"], row["index"]) == (URL, "7")
    assert row.keys().tolist() == ["prompt"]
    assert read_list(tmp_path / "han", "han").loc[0, "kind"] == "template"


def test_texts_beside_pictures_and_captions_by_picture(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    assert read_list(tmp_path, "pairs").to_dict("list") == {"prompt": ["caption a", "caption b"], "index": ["a", "b"]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"/data/x/012.png": ["first", "second"]}))
    assert read_list(path, "dcr").to_dict("list") == {"prompt": ["first"], "index": ["012"]}


@pytest.mark.parametrize(
    "format, text, words",
    [
        ("wen", '{"caption": "a"}\nb', "line 2: no JSON"),
        ("wen", "[" * 100_000, "line 1: no JSON"),
        ("wen", '{"prompt": "a"}', "line 1: no object with the key caption"),
        ("wen", '{"caption": "a"}\n{"caption": 3}', "line 2: the prompt is 3: give a text"),
        ("wen", '{"caption": "\\ud800"}', "line 1: the prompt is .*: give a text"),
        ("wen", '{"caption": "a", "index": "../b"}', "line 1: the index '../b' is no file name"),
        ("wen", '{"caption": "a", "url": "u"}\n{"caption": "b"}', "only some of its prompts have url"),
        ("han", "Caption;URL\na;b", "line 1: no column type, Index"),
        ("han", "Caption;URL;type;Index\na;b;VM;1\nc;d", "line 3: not 4 fields"),
        ("han", "Caption;URL;type;Index\na;b;XX;1", r"line 2: type is 'XX': not one of \['VM', 'TM'\]"),
        ("han", 'Caption;URL;type;Index\n"a;b;VM;1', "no CSV with semicolons"),
        ("memattn", "a\n\nb", "line 2: the prompt is ''"),
        ("memattn", "", "holds no prompts"),
        ("dcr", "[1]", "no object of pictures"),
        ("dcr", '{"a.png": []}', "entry 1: no list of captions for 'a.png'"),
        ("basinlab", "object\nowl", "line 2: the prompt is None"),
        ("basinlab", "", "No columns"),
        ("xml", "", "no prompt format 'xml': give one of"),
    ],
)
def test_errors_of_lists_name_file_and_line(tmp_path, format, text, words):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_list(path, format)
    assert format == "xml" or str(path) in str(error.value)


def test_every_format_of_the_schema_has_a_reader():
    assert prompt_lists.FORMATS == ("basinlab", "wen", "han", "memattn", "pairs", "dcr")
