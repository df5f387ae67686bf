"""`customize train-control` and `map`: pairs as people lay them out, exact resume, files that diffusers opens."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image, ImageDraw
from torch import Tensor
from typer.testing import CliRunner

from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl, read_tensors, write_json
from backbone.memory.planner import MemoryEstimator
from backbone.models.control import open_control
from backbone.models.model import Backbone
from backbone.training.settings import RunOptions, find_resumed, read_run_settings
from backbone.world.rendering.record import SIZE
from customize.cli import app
from customize.control_settings import PROGRAM, default_folder, read_settings, resolve_settings
from customize.data.changes import describe_changes
from customize.data.control_pairs import ControlColumns, read_control_pairs
from customize.data.maps import compute_maps
from customize.evaluation.condition_fidelity import Agreement, measure_agreement
from customize.objectives.control import ControlTraining, PairData, mirror_map
from customize.objectives.control_networks import LORA_FILE, OWN_LAYERS, make_network, save_network
from customize.settings import Settings
from customize.training.control.evaluation import APART, BOUND, FLOOR, UNDER
from customize.training.control.memory import make_workload
from customize.training.control.run import FIDELITY, HeldOutFidelity, describe_other_rank, list_columns
from tests.backbone.media.sources.test_pictures import grey_profile_of_light

SIDE, PAIRS = 32, 12
HERE = ("--precision", "fp32", "--device", "cpu", "--batch", 2, "--sample-steps", 2, "--validation-steps", 0)


def invoked(*arguments: object) -> Any:
    """A command in this process: its exit code, output, and the exception of a mistake."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Runs a command that is a mistake; gives the sentence that answers it."""
    done = invoked(*arguments)
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def circle(number: int, fill: str, paper: str = "black", *, inside: str = "black") -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), paper)
    x, y = 8 + number % 4 * 5, 8 + number // 4 * 6
    ImageDraw.Draw(image).ellipse((x - 6, y - 6, x + 6, y + 6), outline=fill, fill=inside)
    return image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in two colours, with a sketch beside each and a caption in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "maps").mkdir()
    lines = []
    for number in range(PAIRS):
        colour = ("red", "blue")[number % 2]
        circle(number, colour, "white", inside=colour).save(folder / f"{number}.png")
        circle(number, "white").save(folder / "maps" / f"{number}.png")
        lines.append(
            {
                "file_name": f"{number}.png",
                "conditioning_image": f"maps/{number}.png",
                "text": f"a {colour} disc",
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@dataclass(frozen=True)
class Trained:
    run: Path
    command: tuple[object, ...]
    said: str


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("t2i-adapter-lora", "controlnet", "control-lora")
]


@pytest.fixture(scope="module", params=["t2i-adapter", *SLOW])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, pairs: Path
) -> Trained:
    """A finished run of four steps."""
    run = tmp_path_factory.mktemp("runs") / str(request.param)
    command = (
        *("train-control", "--condition", "sketch", "--images", pairs, "--model", tiny_folder, *HERE),
        *(
            "--kind",
            request.param,
            "--evaluation-steps",
            2,
            "--learning-rate",
            1e-3,
            "--checkpointing-steps",
            2,
        ),
    )
    done = invoked(*command, "--steps", 4, "--out", run)
    assert done.exit_code == 0, (done.output, done.exception)
    return Trained(run, command, done.output)


def test_a_network_is_measured_on_pairs_beside_no_condition_and_the_true_images(
    trained: Trained, pairs: Path, tmp_path: Path
) -> None:
    asked = (
        "evaluate-control",
        trained.run,
        "--images",
        pairs,
        "--most",
        3,
        "--steps",
        2,
        "--json",
        *HERE[:4],
    )
    done = invoked(*asked, "--out", tmp_path / "t")
    assert done.exit_code == 0, (done.output, done.exception)
    rows = json.loads(done.stdout)["rows"]
    assert rows == read_json(tmp_path / "t" / "table.json")["rows"] and set(rows) == {
        UNDER,
        FLOOR,
        BOUND,
        APART,
    }
    for name in ("edges", "map"):
        means = {row: found[name]["mean"] for row, found in rows.items()}
        assert means[APART] == pytest.approx(means[UNDER] - means[FLOOR]) and rows[UNDER][name]["n"] == 3
    assert (tmp_path / "t" / "sheet.png").is_file()
    nothing = invoked(*asked, "--scale", 0, "--sweep", 1, "--out", tmp_path / "zero")
    zero = json.loads(nothing.stdout)["rows"]
    assert zero[UNDER] == zero[FLOOR] == rows[FLOOR], "at scale 0 it is the base"
    assert zero[f"{UNDER}, scale 1"] == rows[UNDER]
    assert "not between 0 and 2" in str(invoked(*asked, "--sweep", 3, "--out", tmp_path / "much").exception)


def test_a_network_is_measured_on_the_rows_of_guidance_that_it_is_drawn_with(
    trained: Trained, pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    record = read_json(tmp_path / "run" / "condition.json")
    write_json(tmp_path / "run" / "condition.json", {**record, "defaults": {"rows": "prompted"}})
    asked = ("evaluate-control", tmp_path / "run", "--images", pairs, "--most", 2, "--steps", 2, *HERE[:4])
    tables = {}
    for name, more in (
        ("own", ()),
        ("prompted", ("--condition-rows", "prompted")),
        ("both", ("--condition-rows", "both")),
    ):
        done = invoked(*asked, *more, "--guidance", 4, "--out", tmp_path / name)
        assert done.exit_code == 0, (done.output, done.exception)
        tables[name] = read_json(tmp_path / name / "table.json")
    assert tables["own"] == tables["prompted"] and tables["own"]["condition_rows"] == "prompted"
    sheets = {name: np.asarray(Image.open(tmp_path / name / "sheet.png")) for name in tables}
    assert np.array_equal(sheets["own"], sheets["prompted"]) and not np.array_equal(
        sheets["own"], sheets["both"]
    )


def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    trained: Trained, pairs: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "t")
    assert "Say --images FOLDER" in refused("evaluate-control", trained.run, *out)
    asked = ("evaluate-control", trained.run, "--images", pairs, *out)
    assert "was trained on sketch, not on depth" in refused(*asked, "--condition", "depth")
    assert "There is no control network" in refused("evaluate-control", "nowhere", "--images", pairs, *out)
    shutil.copytree(trained.run, tmp_path / "bare")
    (tmp_path / "bare" / "condition.json").unlink()
    bare = ("evaluate-control", tmp_path / "bare", "--images", pairs, *out)
    assert "does not say what kind of map it reads" in refused(*bare)
    assert not (tmp_path / "t").exists()


def test_a_run_leaves_what_diffusers_opens_and_says_how_it_is_used(trained: Trained, tiny: Backbone) -> None:
    record = read_json(trained.run / "condition.json")
    assert record["kinds"] == ["sketch"] and record["base"] == tiny.fingerprint
    assert f"--condition sketch=map.png --controlnet {trained.run}" in trained.said.replace("\n", " ")
    assert Image.open(trained.run / "sheet.png").width > 300
    history = read_jsonl(trained.run / FIDELITY, HeldOutFidelity)
    assert [one.step for one in history] == [0, 2, 4]
    assert len({one.loss_without_map for one in history}) == 1 and len({one.loss for one in history}) == 3
    best = min(history[1:], key=lambda one: one.loss)
    weights = "t2i_adapter" if "t2i" in trained.run.name else "controlnet"
    kept, last = (
        read_tensors(folder / weights / "diffusion_pytorch_model.safetensors")[0]
        for folder in (trained.run / "best", trained.run)
    )
    assert (best.step == 4) == all(torch.equal(kept[name], last[name]) for name in last)


def test_diffusers_gives_the_same_residuals(trained: Trained, tiny: Backbone) -> None:
    opened = open_control(tiny, str(trained.run))
    side = tiny.resolution
    maps = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    text = tiny.encode_prompts(["a red disc", "a blue disc"])
    noisy, time = torch.randn(2, *tiny.latent_shape), torch.tensor([700, 300])
    with torch.no_grad():
        states = next(iter(text.text.values()))
        inputs = {"sample": noisy, "timestep": time, "encoder_hidden_states": states}
        control = Control.of(opened.network, maps)
        ours = opened.network.residuals(control.hints, inputs, guess=False)
        if "t2i" in trained.run.name:
            theirs = T2IAdapter.from_pretrained(trained.run / "t2i_adapter")(maps)
        else:
            net = ControlNetModel.from_pretrained(trained.run / "controlnet")
            down, middle = net(**inputs, controlnet_cond=maps, return_dict=False)
            theirs = [*down, middle]
    flat = [part for parts in ours.values() for part in parts]
    assert len(flat) == len(theirs)
    for mine, other in zip(flat, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)  # in another memory layout


def test_a_stopped_run_goes_on_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    again = tmp_path / trained.run.name
    from backbone.training.run import drive
    from customize.training.control import run as control

    real, taken = drive, []

    def half(objective: Any, run: Path, **how: Any) -> bool:
        taken.append(real(objective, run, **how | {"until": 2}))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "drive", half)
        invoked(*trained.command, "--steps", 4, "--out", again)
    assert taken == [False] and not (again / "condition.json").exists()
    done = invoked("train-control", "--resume", again)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "not those that the run began with" not in done.output
    kept = read_json(again / "settings.json")["images"]
    moved = [dict(kept[0]), {**kept[1], "0.png": "0:0"}]
    (line,) = describe_changes(moved, list_columns(read_control_pairs(read_settings(again).images, "sketch")))
    assert "(changed: 0.png)" in line  # of the maps
    part = "t2i_adapter" if "t2i" in again.name else "controlnet"
    mine, other = (
        read_tensors(run / part / "diffusion_pytorch_model.safetensors")[0] for run in (trained.run, again)
    )
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert (again / FIDELITY).read_text() == (trained.run / FIDELITY).read_text()
    assert "--steps 4" in read_json(again / "settings.json")["command"]
    assert read_settings(again).condition == "sketch"


@pytest.mark.parametrize("kind", ["t2i-adapter", "controlnet", "control-lora"])
def test_computing_again_in_the_backward_pass_gives_the_same_gradients(
    kind: str, tiny_folder: Path, pairs: Path
) -> None:
    """Of the denoiser's blocks and of the copy's."""
    found, calls = [], []
    for again in (False, True):
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        asked = {"images": str(pairs), "condition": "sketch", "kind": kind, "rank": 2, "batch": 2}
        settings = resolve_settings({**asked, "gradient_checkpointing": again}, {})
        network = make_network(model, settings)
        for value in network.module.parameters():  # some begin with nothing
            if value.requires_grad:
                torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
        data = PairData(model, read_control_pairs(str(pairs), "sketch")[:4], "sketch", flip=False)
        training = ControlTraining(model, network, data, settings)
        count = dict.fromkeys((model.denoiser, network.module), 0)
        for one in count:
            for module in one.modules():
                if type(module).__name__ == "ResnetBlock2D":

                    def add(*_: object, one: Any = one, count: Any = count) -> None:
                        count[one] += 1

                    module.register_forward_pre_hook(add)  # the second time ends early
        with training.learning():
            for loss in training.losses(0):
                loss.backward()
        found.append({name: value.grad for name, value in training.parameters.items()})
        calls.append(list(count.values()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    assert any(gradient.any() for gradient in found[0].values() if gradient is not None)
    assert calls[1][0] > calls[0][0]
    assert (calls[1][1] > calls[0][1]) == (kind != "t2i-adapter")  # which has no blocks that are recomputed


def test_a_control_lora_is_the_controlnet_that_its_factors_make(tiny: Backbone, tmp_path: Path) -> None:
    asked = {"images": "x", "condition": "sketch", "kind": "control-lora", "rank": 2, "lora_alpha": 4.0}
    network = make_network(tiny, resolve_settings(asked, {}))
    module, random = network.module, torch.Generator().manual_seed(0)
    learned = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or name.startswith(OWN_LAYERS) for name in learned)
    for value in learned.values():
        value.data = 0.1 * torch.randn(value.shape, generator=random)
    save_network(module, "control-lora", tmp_path)
    side = tiny.resolution
    inputs = {
        "sample": torch.randn(1, *tiny.latent_shape, generator=random),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": next(iter(tiny.encode_prompts(["a disc"]).text.values())),
        "controlnet_cond": torch.rand(1, 3, side, side, generator=random),
    }
    whole = ControlNetModel.from_pretrained(tmp_path / "controlnet")
    with torch.no_grad():
        ours, theirs = (net(**inputs, return_dict=False) for net in (module, whole))
    for mine, other in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert torch.allclose(mine, other, atol=1e-5) and mine.abs().max() > 1e-3
    tensors, _ = read_tensors(tmp_path / LORA_FILE)
    changed = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    assert changed and all(f"{name}.down" in tensors for name in changed)
    assert "input_blocks.1.0.in_layers.2" in changed and "lora_controlnet" in tensors
    assert sum(map(torch.numel, tensors.values())) < sum(map(torch.numel, whole.state_dict().values()))


def test_a_lora_alone_leaves_the_adapter_that_it_belongs_to_as_it_is(
    tiny: Backbone, tiny_folder: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"images": "x", "condition": "sketch", "kind": "t2i-adapter"}
    save_network(make_network(tiny, resolve_settings(asked, {})).module, "t2i-adapter", tmp_path / "before")
    more = {"kind": "t2i-adapter-lora", "rank": 2, "begin_from": str(tmp_path / "before"), "lora_alone": True}
    rough = Backbone.open(str(tiny_folder), device="cpu", precision="bf16")
    module = make_network(rough, resolve_settings(asked | more, {})).module
    learned = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert learned and all(name.startswith("lora.") for name in learned)
    for value in learned.values():
        value.data = torch.randn(value.shape)
    save_network(module, "t2i-adapter-lora", tmp_path / "after")
    name = "t2i_adapter/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    again = {**more, "begin_from": str(tmp_path / "after")}
    with pytest.raises(UserError, match="a LoRA of the denoiser"):
        make_network(tiny, resolve_settings(asked | {"begin_from": again["begin_from"]}, {}))
    further = make_network(tiny, resolve_settings(asked | again, {})).module
    loras: list[Any] = [module.lora, further.lora]
    first, second = ({name: up.weight for name, up in zip(one.layers, one.up, strict=True)} for one in loras)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for rank, said in ((2, ""), (8, "whose rank is 2")):  # of the LoRA that is there already
        wanted = resolve_settings(asked | again | {"rank": rank}, {})
        found = describe_other_rank(make_network(tiny, wanted), wanted)
        assert said in found and bool(said) == bool(found)


def test_a_network_is_written_as_diffusers_writes_it_and_a_full_disk_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Backbone
) -> None:
    settings = resolve_settings({"images": "x", "condition": "sketch", "kind": "t2i-adapter"}, {})
    module: Any = make_network(tiny, settings).module
    save_network(module, "t2i-adapter", tmp_path)
    module.save_pretrained(tmp_path / "theirs")
    ours = tmp_path / "t2i_adapter"
    assert (ours / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    (mine, said), (other, theirs) = (
        read_tensors(folder / "diffusion_pytorch_model.safetensors") for folder in (ours, tmp_path / "theirs")
    )
    assert (
        said == theirs and mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)
    )
    before = {path.name: path.read_bytes() for path in ours.iterdir()}

    def full(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if "w" in mode and ".safetensors" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *more, **named)

    opened = Path.open
    monkeypatch.setattr(Path, "open", full)
    for value in module.parameters():
        value.data += 1
    with pytest.raises(OSError, match="No space") as raised:
        save_network(module, "t2i-adapter", tmp_path)
    assert raised.value.filename == str(ours / "diffusion_pytorch_model.safetensors")
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before


@pytest.mark.parametrize("kind", ["t2i-adapter", *SLOW])
def test_a_plan_counts_the_network_and_what_it_asks_of_a_step(kind: str, tiny: Backbone) -> None:
    settings = resolve_settings({"images": "x", "condition": "sketch", "kind": kind, "rank": 2}, {})
    counted = MemoryEstimator(tiny, make_workload(tiny, settings), device="cpu")
    network = make_network(tiny, settings)
    trained = sum(value.numel() for value in network.module.parameters() if value.requires_grad)
    assert counted.model_sizes("fp32").trained_parameters == trained
    frozen_copy = sum(value.numel() for value in network.module.parameters() if not value.requires_grad)
    assert counted.model_sizes("fp32").frozen_additions == 4 * frozen_copy  # of a control-LoRA
    frozen = counted.step_bytes("fp32", False)
    assert frozen.saved > 0 and frozen.peak >= frozen.saved


def test_the_latest_checkpoint_of_a_command_is_that_of_the_folder_that_it_writes(
    trained: Trained, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.run, tmp_path / default_folder(str(pairs), "sketch"))
    again = refused(*trained.command, "--steps", 4, "--seed", 5, "--resume", "latest")
    assert "goes on with that run's own settings" in again


def test_the_newest_run_is_of_the_same_command(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.run, tmp_path / "runs" / "control")
    monkeypatch.chdir(tmp_path)
    said = RunOptions(resume=Path("latest"))
    assert find_resumed(said, PROGRAM, None) == Path("runs/control")
    with pytest.raises(UserError, match="holds none"):
        find_resumed(said, "customize train", None)
    with pytest.raises(UserError, match="is a run of `customize train-control`, not of `customize train`"):
        read_run_settings(Settings, tmp_path / "runs" / "control", "customize train")


# --- pairs as people lay them out -----------------------------------------------------------------------------


def test_pairs_are_read_from_every_layout(pairs: Path, tmp_path: Path) -> None:
    wanted = [(f"a {('red', 'blue')[number % 2]} disc") for number in range(PAIRS)]
    (tmp_path / "lllyasviel" / "source").mkdir(parents=True)
    (tmp_path / "lllyasviel" / "target").mkdir()
    (tmp_path / "beside").mkdir()
    lines = []
    for number in range(PAIRS):
        image, drawn = pairs / f"{number}.png", pairs / "maps" / f"{number}.png"
        shutil.copy(image, tmp_path / "lllyasviel" / "target" / f"{number}.png")
        shutil.copy(drawn, tmp_path / "lllyasviel" / "source" / f"{number}.png")
        lines.append(
            {"source": f"source/{number}.png", "target": f"target/{number}.png", "prompt": wanted[number]}
        )
        shutil.copy(image, tmp_path / "beside" / f"{number}.png")
        shutil.copy(drawn, tmp_path / "beside" / f"{number}.{('sketch', 'scribble')[number % 2]}.png")
        (tmp_path / "beside" / f"{number}.txt").write_text(wanted[number])
    shutil.copytree(tmp_path / "lllyasviel", tmp_path / "folders")
    for number in range(PAIRS):
        (tmp_path / "folders" / "target" / f"{number}.txt").write_text(wanted[number])
    (tmp_path / "lllyasviel" / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    for source in (pairs, *(tmp_path / name for name in ("lllyasviel", "beside", "folders"))):
        found = read_control_pairs(str(source), "sketch")
        assert [one.caption for one in found] == wanted, source
        assert all(one.map is not None for one in found)
        for number in (0, 7):
            maps = [one.read_map("sketch", (SIDE, SIDE)) for one in (found[number],)]
            assert np.array_equal(
                maps[0].permute(1, 2, 0).numpy() * 255,
                np.asarray(Image.open(pairs / "maps" / f"{number}.png")),
            )


@pytest.mark.parametrize("name", ["{}_sketch.png", "{}-Scribble.PNG", "{}-condlabel.png"])
def test_a_map_beside_its_image_is_one_in_every_spelling(
    name: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        shutil.copy(pairs / f"{number}.png", tmp_path)
        shutil.copy(pairs / "maps" / f"{number}.png", tmp_path / name.format(number))
        shutil.copy(pairs / "maps" / f"{number}.png", tmp_path / f"{number}.canny.png")
    found = read_control_pairs(str(tmp_path), "sketch")
    assert [one.image.path.name for one in found] == ["0.png", "1.png"]
    assert [one.map and one.map.path.name for one in found] == [name.format(0), name.format(1)]
    assert "2 maps of other kinds than sketch not used" in capsys.readouterr().err
    shutil.copy(pairs / "maps" / "0.png", tmp_path / "0.sketch.png")
    with pytest.raises(UserError, match="are both the sketch map of 0"):
        read_control_pairs(str(tmp_path), "sketch")


def test_maps_in_a_folder_of_any_name_are_no_images_to_learn_from(pairs: Path, tmp_path: Path) -> None:
    for number in range(2):
        for folder, file in (("img", pairs / f"{number}.png"), ("cond", pairs / "maps" / f"{number}.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / folder)
    with pytest.raises(UserError, match="both hold an image 0"):
        read_control_pairs(str(tmp_path), "edges")
    for folder in ("img", "cond"):
        (tmp_path / folder / "0.txt").write_text("a disc")
        (tmp_path / folder / "1.txt").write_text("a red disc")
    assert len(read_control_pairs(str(tmp_path), "edges")) == 4  # two subjects, say
    (tmp_path / "img").rename(tmp_path / "images")
    (tmp_path / "cond").rename(tmp_path / "conditioning_images")
    assert all(one.map is not None for one in read_control_pairs(str(tmp_path), "edges"))


def test_a_list_s_captions_may_lie_beside_its_images(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "pairs")
    path = tmp_path / "pairs" / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, "text": None}) for line in lines))
    (tmp_path / "pairs" / "0.txt").write_text("a red disc")
    assert [one.caption for one in read_control_pairs(str(path.parent), "sketch")][:2] == ["a red disc", ""]
    path.with_name("prompt.json").write_text("")
    with pytest.raises(UserError, match=r"both metadata\.jsonl and prompt\.json"):
        read_control_pairs(str(path.parent), "sketch")


@pytest.mark.parametrize("name", ["conditioning_image_file_name", "scribble", "Sketch"])
def test_a_list_s_maps_may_be_called_as_datasets_or_their_kind_calls_them(
    name: str, pairs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    listed = folder / "metadata.jsonl"
    listed.write_text(listed.read_text().replace("conditioning_image", name))
    found = read_control_pairs(str(folder), "sketch")
    assert [one.map and one.map.path.name for one in found[:2]] == ["0.png", "1.png"]


def test_columns_that_no_list_of_pairs_has_are_named_and_what_is_not_used_is_said(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    listed = folder / "metadata.jsonl"
    lines = listed.read_text().replace('"text"', '"description"').splitlines()
    listed.write_text("\n".join(lines[1:]))
    shutil.copy(folder / "maps" / "1.png", folder / "1.mask.png")
    assert len(read_control_pairs(str(folder), "sketch")) == PAIRS - 1
    said = capsys.readouterr().err
    for words in ("It has description: name", "1 mask not used", f"Not used in {folder}: 0.png, maps/0.png"):
        assert words in said
    listed.write_text(listed.read_text().replace("conditioning_image", "drawing"))
    with pytest.raises(UserError, match=r"files as drawing.*give --conditioning-image-column drawing"):
        read_control_pairs(str(folder), "sketch")


def test_named_columns_win_and_a_missing_one_is_named(pairs: Path) -> None:
    found = read_control_pairs(str(pairs), "sketch", ControlColumns(caption="file_name"))
    assert found[3].caption == "3.png"
    with pytest.raises(
        UserError, match="has no column 'drawing'; it has file_name, conditioning_image, text"
    ):
        read_control_pairs(str(pairs), "sketch", ControlColumns(map="drawing"))


def test_edges_are_found_in_the_images_where_no_map_is_given(pairs: Path, tmp_path: Path) -> None:
    from backbone.media.control.maps import as_hints, compute_map

    shutil.copy(pairs / "0.png", tmp_path)
    shutil.copy(pairs / "1.png", tmp_path)
    found = read_control_pairs(str(tmp_path), "edges")
    wanted = as_hints(compute_map("edges", Image.open(pairs / "0.png")))[0]
    assert torch.equal(found[0].read_map("edges", (SIDE, SIDE)), wanted) and wanted.any()
    with pytest.raises(UserError, match=r"2 of 2 images .* have no map \(first: .*0.png\)"):
        read_control_pairs(str(tmp_path), "depth")
    circle(0, "white").save(tmp_path / "0.edges.png")
    with pytest.raises(UserError, match=r"1 of 2 images .* have no map"):
        read_control_pairs(str(tmp_path), "edges")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("shape", "another shape. Crop them alike"),
        ("paper", "looks like black on white"),
        ("photo", "looks like a photograph"),
        ("empty", "shows nothing"),
        ("glass", "is see-through in places"),
        ("gone", "there is no such file beside it"),
        ("equal", "All 12 maps are equal"),
        ("captions", "All captions are “a disc”"),
        ("bare", "No image has a caption"),
    ],
)
def test_pairs_that_teach_nothing_are_refused_in_a_sentence(
    wrong: str, sentence: str, pairs: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    folder, drawn = tmp_path / "pairs", tmp_path / "pairs" / "maps" / "3.png"
    shutil.copytree(pairs, folder)
    listed = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    match wrong:
        case "shape":
            Image.open(drawn).resize((SIDE, 2 * SIDE)).save(drawn)
        case "paper":
            circle(3, "black", "white", inside="white").save(drawn)
        case "photo":
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(
                drawn
            )
        case "empty":
            Image.new("RGB", (SIDE, SIDE)).save(drawn)
        case "glass":
            seen = Image.open(drawn).convert("RGBA")
            seen.putalpha(seen.convert("L"))
            seen.save(drawn)
        case "gone":
            drawn.unlink()
        case "equal":
            for number in range(PAIRS):
                circle(0, "white").save(folder / "maps" / f"{number}.png")
        case "captions" | "bare":
            lines = [{**line, "text": "a disc" if wrong == "captions" else ""} for line in lines]
    listed.write_text("\n".join(map(json.dumps, lines)))
    said = refused(
        *("train-control", "--condition", "sketch", "--images", folder, "--model", tiny_folder, *HERE),
        *("--steps", 1, "--out", tmp_path / "run"),
    )
    assert sentence in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--condition", "shadow"), "shadow"),
        ((), "Say --condition sketch"),
        (("--condition", "sketch", "--rank", 4), "--rank has no effect"),
        (
            ("--condition", "sketch", "--kind", "t2i-adapter-lora", "--gradient-checkpointing"),
            "--gradient-checkpointing has no effect",
        ),
        (
            ("--condition", "sketch", "--kind", "t2i-adapter-lora", "--lora-alone"),
            "--lora-alone has no effect",
        ),
        (
            ("--condition", "sketch", "--kind", "t2i-adapter-lora", "--compile"),
            "--compile has no effect",
        ),
        (
            ("--condition", "sketch", "--kind", "controlnet", "--adapter-size", "light"),
            "--adapter-size has no effect",
        ),
        (
            ("--condition", "sketch", "--begin-from", "before", "--adapter-size", "light"),
            "--adapter-size has no effect with --begin-from",
        ),
        (("--condition", "sketch", "--validation-image", "a.png"), "Give it with --validation-prompt"),
        (("--condition", "sketch", "--map-dropout", "1"), "every map is black"),
        (("--condition", "pose", "--flip"), "A mirrored pose has the colours of the left limbs"),
        (
            ("--condition", "sketch", "--kind", "controlnet", "--cpu-offload", 0.5),
            "--cpu-offload has no effect",
        ),
    ],
)
def test_settings_without_effect_are_refused(flags: tuple[object, ...], sentence: str, pairs: Path) -> None:
    assert sentence in refused("train-control", "--images", pairs, *flags)


def test_a_mirrored_normal_points_to_the_other_side() -> None:
    """As a normal map of a mirrored half sphere is: x, to the right, is red; black is where there is none."""
    axis = torch.linspace(-1.2, 1.2, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    depth = (1 - (x / 1.5 + 0.2) ** 2 - y**2).clamp_min(0).sqrt()

    def normals(x: Tensor) -> Tensor:
        there = ((x / 1.5 + 0.2) ** 2 + y**2 < 1).float() * (depth > 0)
        return torch.stack([x / 4 + 0.5, y / 4 + 0.5, depth * 0 + 0.9]) * there

    drawn = normals(x)
    turned = drawn.flip(-1)
    turned[0] = torch.where(turned[2] > 0, 1 - turned[0], turned[0])
    torch.testing.assert_close(mirror_map(drawn, "normal"), turned)
    where = turned[2] > 0
    torch.testing.assert_close(turned[0][where], (x / 4 + 0.5)[where])  # its x grows to the right still
    assert torch.equal(mirror_map(drawn, "depth"), drawn.flip(-1))


# --- condition fidelity ---------------------------------------------------------------------------------------


def test_lines_agree_within_a_pixel() -> None:
    asked = torch.zeros(20, 20)
    asked[5, :10] = 1
    beside = torch.zeros(20, 20)
    beside[6, :5] = 1
    beside[15, :5] = 1
    assert measure_agreement(asked, asked) == Agreement(1.0, 1.0)
    found = measure_agreement(asked, beside)
    # Six of the ten pixels have one within reach, the corner's neighbour too
    assert found == Agreement(0.5, 0.6)
    assert found.f1 == pytest.approx(2 * 0.5 * 0.6 / 1.1)
    assert measure_agreement(asked, torch.zeros(20, 20)).f1 == 0


def test_a_map_is_found_beside_its_image_however_its_name_is_spelled(tmp_path: Path) -> None:
    circle(0, "red", "white").save(tmp_path / "caf\u00e9.png")
    circle(0, "white").save(tmp_path / "cafe\u0301.Sketch.png")
    (pair,) = read_control_pairs(str(tmp_path), "sketch")
    assert pair.map is not None and pair.map.path.name == "cafe\u0301.Sketch.png"


def test_the_values_of_a_map_are_learned_as_they_are_stored(tmp_path: Path) -> None:
    """A profile says how colours look, and a map's values are no colours."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1)))
    photo = circle(0, "red", "white")
    photo.save(tmp_path / "0.png")
    for suffix, profile in (("png", None), ("tif", grey_profile_of_light())):
        ramp.save(tmp_path / f"0.depth.{suffix}", icc_profile=profile)
        pair = read_control_pairs(str(tmp_path), "depth")[0]
        pair.check_map("depth", None)
        found = pair.read_map("depth", (SIDE, SIDE)).permute(1, 2, 0).mul(255).round().numpy()
        assert np.array_equal(found, np.asarray(ramp.convert("RGB"))), suffix
        (tmp_path / f"0.depth.{suffix}").unlink()


@pytest.mark.parametrize(
    "name", ["control_{}.png", "canny-{}.png", "{}_hint.png", "{}.cond.png", "map_{}.jpg"]
)
def test_a_map_beside_its_image_is_one_before_its_name_too(name: str, pairs: Path, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copy(pairs / f"{number}.png", tmp_path / f"{number}.png")
        circle(number, "white", "black").save(tmp_path / name.format(number))
    found = read_control_pairs(str(tmp_path), "edges")
    assert [(one.image.path.name, one.map.path.name if one.map else "") for one in found] == [
        (f"{number}.png", name.format(number)) for number in range(2)
    ]


def test_an_image_alone_is_no_map_by_its_name(tmp_path: Path) -> None:
    for name in ("map_1.png", "control_2.png", "my_hint.png"):
        circle(1, "red", "white").save(tmp_path / name)
    assert len(read_control_pairs(str(tmp_path), "edges")) == 3


@pytest.mark.parametrize(
    "names", [("images", "maps"), ("img", "canny"), ("image", "hint"), ("photos", "edges")]
)
def test_two_folders_are_images_and_maps_by_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    for folder, colours in zip(names, (("red", "white"), ("white", "black")), strict=True):
        (tmp_path / folder).mkdir()
        for number in range(2):
            circle(number, *colours).save(tmp_path / folder / f"{number}.png")
    (tmp_path / names[0] / "0.txt").write_text("a circle")
    found = read_control_pairs(str(tmp_path), "edges")
    assert [one.map.path.parent.name for one in found if one.map] == [names[1]] * 2
    assert [one.caption for one in found] == ["a circle", ""]
    (tmp_path / names[1] / "1.png").unlink()
    with pytest.raises(UserError, match=r"1 name of .* in only one of"):
        read_control_pairs(str(tmp_path), "edges")


# --- maps to look at ------------------------------------------------------------------------------------------


def test_the_map_of_a_picture_is_the_one_in_training_whatever_its_format(pairs: Path, tmp_path: Path) -> None:
    photo = Image.open(pairs / "0.png")
    found = []
    for suffix in ("png", "bmp", "webp"):
        photo.save(tmp_path / f"photo.{suffix}", lossless=suffix == "webp")
        out = tmp_path / f"{suffix}.png"
        done = invoked("map", "canny", tmp_path / f"photo.{suffix}", "--resolution", SIDE, "--out", out)
        assert done.exit_code == 0, (done.output, done.exception)
        found.append(np.asarray(Image.open(out)))
    shutil.copy(tmp_path / "photo.bmp", tmp_path / "photo2.bmp")
    own = read_control_pairs(str(tmp_path / "photo.png"), "edges")[0].read_map("edges", (SIDE, SIDE))
    assert all(np.array_equal(one, found[0]) for one in found)
    assert np.array_equal(found[0], own.permute(1, 2, 0).numpy() * 255)


def test_what_is_cropped_off_a_long_picture_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, said in (
        ((40, 36), ""),
        ((60, 40), "60 × 40 pixels and a map square: 33% of it is cropped off"),
    ):
        Image.new("RGB", size, "white").save(tmp_path / "photo.png")
        assert compute_maps(str(tmp_path / "photo.png"), ["edges"])[1]["edges"].width == SIZE
        err = capsys.readouterr().err
        assert said in err if said else not err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Name one picture"),
        (("egdes", "0.png"), "egdes is no kind of map"),
        (("edges", "0.png", "--out", "one.txt"), "called as a file"),
        (("edges", "0.png", "--resolution", 0), "at least 1"),
        (("depth", "0.png"), "is made by a network"),
        (("edges", "--all", "0.png"), "--all makes every kind"),
        (("edges", "nowhere.png"), "does not exist"),
        (("--scene", 7, "--prompt", "a dog"), "--scene has no effect"),
        (("pose", "--prompt", "a griffin in the snow"), "no thing of moji's world"),
        (("pose", "--prompt", "a dog wearing a boot"), "nothing to wear"),
        (("pose", "--prompt", "a dog", "--pose", "x=4"), "says no foot"),
        (("pose", "--prompt", "a dog", "--pose", "x=4,foot=100,size=500"), "size is 500"),
        (("pose", "--prompt", "two dogs", "--pose", "x=4,foot=100,size=50"), "1 poses for 2 things"),
        (("edges", "lines", "0.png", "--out", "one.png"), "one file"),
        (("--posed", "0.png"), "--posed has no effect"),
    ],
)
def test_maps_that_cannot_be_made_are_refused(
    words: tuple[object, ...], sentence: str, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs)
    assert sentence in refused("map", *words)
    assert not (pairs / "maps-2").exists()
