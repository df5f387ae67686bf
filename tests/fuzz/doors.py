"""The doors: each writes damaged input into a folder and goes in, as far as the mistake could be found.

A door returns whether its input was surely damaged, so that coming back at all is a fault.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw

import align.settings
import customize.settings
from align.collect.label.session import Session, list_label_pairs
from align.pairs.read import read_preferences
from align.pairs.records import check_preferences
from align.pairs.samples import read_samples
from align.training.reporting.logs import (
    LoggedEvaluation,
    LoggedFigures,
    LoggedInterval,
    LoggedReward,
    LoggedStep,
)
from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import read_concept, resolve_placeholder_tokens
from backbone.adapters.config import CONFIG_KEY
from backbone.cli.conditions import RequestedMap
from backbone.cli.options import list_fields
from backbone.cli.values.collect import values_from_file, values_from_flags
from backbone.cli.values.repeat import as_command
from backbone.conditions.control import Control
from backbone.io.files import read_header, read_jsonl, read_tensors, write_json, write_tensors
from backbone.io.prompts import load_prompts, read_prompts
from backbone.io.run_folder import trim_log
from backbone.media.clips import read_film
from backbone.media.control.maps import MapTarget, read_map
from backbone.media.sources.decode import open_rgb
from backbone.media.sources.pictures import check_images, list_images
from backbone.models.clips.motion import attach_motion, detach_motion, read_motion_adapter
from backbone.models.control import make_control_network, open_control
from backbone.models.model import Backbone
from backbone.training.checkpoint import load_checkpoint, save_checkpoint
from backbone.training.loop import Report
from customize.data.control_pairs import check_control_pairs, read_control_pairs
from customize.data.edit_pairs import read_edit_pairs, select_usable_pairs
from customize.evaluation.metrics import ConceptMetrics
from customize.formats.convert import export_adapter
from edit.inversion.inversion import invert, read_inversion
from edit.pictures import read_mask
from edit.run.run import perform, replay
from tests.fuzz.damage import NUMBERS, damaged_bytes, damaged_json, damaged_safetensors, odd_text
from tests.tiny import (
    tiny_chroma,
    tiny_flux,
    tiny_flux2_klein,
    tiny_krea2,
    tiny_motion_adapter,
    tiny_pipeline,
    tiny_pixart,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_stable_diffusion_3,
    tiny_stable_diffusion_xl,
    tiny_z_image,
)

Door = Callable[["Place", Random], bool]
IMAGE_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
JSON_PARTS = (
    *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "limner.json", "tokenizer/tokenizer_config.json"),
)
FAMILIES: tuple[Callable[[Path], Path], ...] = (
    *(tiny_stable_diffusion_xl, tiny_stable_diffusion_3, tiny_flux, tiny_chroma, tiny_pixart, tiny_z_image),
    *(tiny_flux2_klein, tiny_qwen_image, tiny_qwen_image21, tiny_krea2),
)
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
NEEDED = {
    "customize.settings": {"images": "x", "token": "[V]", "class_noun": "dog"},
    "align.settings": {"pairs": "p"},
}
CONCEPT = {
    "format": 1, "kind": "lora", "model": "moji", "fingerprint": "f", "tokens": {"[V]": "bcd"}, "class_noun": "dog",
    "weights": "w.safetensors", "words": "", "changed": "",
}  # fmt: skip
SAMPLES = {
    "format": 1, "model": "moji", "fingerprint": "f", "per_prompt": 2,
    "prompts": [{"prompt": "a dog", "category": ""}, {"prompt": "a cat", "hard_negatives": ["a dog"]}],
}  # fmt: skip
CHOICE = {
    "number": 0, "pair": "a+b", "prompt": "a dog", "left": "pictures/p00000-s00.png",
    "right": "pictures/p00000-s01.png", "verdict": "left", "repeat": False, "user": "", "time": "", "seconds": 1.0,
}  # fmt: skip
PAIR = {
    "prompt": "a dog",
    "chosen": "pictures/p00000-s00.png",
    "rejected": "pictures/p00000-s01.png",
    "user": "a",
}
LABELLED = {
    "caption": "a dog",
    "image_0": PAIR["chosen"],
    "image_1": PAIR["rejected"],
    "label_0": 1,
    "label_1": 0,
}


@dataclass
class Place:
    """What the doors share: a tiny model, its files as bytes, and the folder of the case."""

    root: Path
    folder: Path = Path()
    files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = tiny_pipeline(self.root / "model")
        opened = Backbone.open(str(self.model), device="cpu", precision="fp32")
        self.opened = opened
        self.files = {
            str(path.relative_to(self.model)): path.read_bytes()
            for path in self.model.rglob("*")
            if path.is_file()
        }
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        image.save(self.root / "image.png")
        self.image = image
        invert(opened, image, "a dog", steps=2).write(self.root / "i.safetensors")
        parameter, optimizer = self.training()
        save_checkpoint(
            self.root / "c.safetensors",
            step=1, parameters=parameter, optimizer=optimizer, facts={"model": "f"},
        )  # fmt: skip
        write_tensors(
            self.root / "w.safetensors", {"unet.x.lora_A.weight": torch.ones(2, 3)}, {"format": "pt"}
        )
        layers = sorted(
            name
            for name, part in opened.denoiser.named_modules()
            if name.endswith((".to_q", ".to_v")) and part
        )
        factors = {}
        for layer in layers:
            weight: Any = opened.denoiser.get_submodule(layer).weight
            out, wide = weight.shape
            factors[f"unet.{layer}.lora_A.weight"] = torch.ones(2, wide)
            factors[f"unet.{layer}.lora_B.weight"] = torch.ones(out, 2)
        config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": layers}
        write_tensors(self.root / "a.safetensors", factors, {"format": "pt", CONFIG_KEY: json.dumps(config)})
        self.networks()
        options = {
            "image": str(self.root / "image.png"), "prompt": "a dog", "steps": 2, "metrics": False,
            "model": str(self.model), "precision": "fp32", "device": "cpu", "concepts": [], "seed": 0,
        }  # fmt: skip
        perform("sdedit", options, out=self.root / "edit")
        programs: list[Any] = [customize.settings, align.settings]
        for program in programs:
            made = program.resolve_settings(NEEDED[program.__name__], {})
            write_json(
                self.root / f"{program.__name__}.json", {"settings": made, "command": "x", "versions": {}}
            )

    def networks(self) -> None:
        """Networks beside the model: a ControlNet, a T2I-Adapter and a motion adapter."""
        of_net: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8, 8, 16)}
        made = {
            "controlnet": make_control_network(self.opened, "controlnet", **of_net).module,
            "adapter": make_control_network(self.opened, "t2i-adapter", num_res_blocks=1).module,
        }
        for kind, network in made.items():
            cast(Any, network).save_pretrained(self.root / kind)
            record = {"kinds": ["sketch"], "maps": 1, "base": self.opened.fingerprint, "model": "tiny"}
            write_json(self.root / kind / "condition.json", record)
        tiny_motion_adapter().save_pretrained(self.root / "motion")

    def damaged_folder(self, name: str, random: Random) -> tuple[Path, bool]:
        """A copy of a folder of `networks`, one file of which is damaged, and whether it surely is."""
        source = self.root / name
        chosen = random.choice(sorted(path.name for path in source.iterdir()))
        content = (source / chosen).read_bytes()
        json_file = chosen.endswith(".json")
        content, damaged = (
            damaged_json(json.loads(content), random) if json_file else damaged_safetensors(content, random)
        )
        for path in source.iterdir():
            self.write(f"{name}/{path.name}", content if path.name == chosen else path.read_bytes())
        return self.folder / name, damaged

    def training(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        parameter = {"p": torch.nn.Parameter(torch.ones(2, 2))}
        optimizer = torch.optim.AdamW(parameter.values())
        parameter["p"].grad = torch.ones(2, 2)
        optimizer.step()
        return dict(parameter), optimizer

    def record(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def copy_model(self, but: str, source: Path | None = None) -> Path:
        """A model's folder, its files linked, but for one."""
        source, copy = source or self.model, self.folder / "model"
        for path in source.rglob("*"):
            if path.is_file() and (name := path.relative_to(source)) != Path(but):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).symlink_to(path)
        return copy

    def family(self, make: Callable[[Path], Path]) -> Path:
        """A tiny model of another family, made once."""
        folder = self.root / make.__name__
        return folder if folder.exists() else make(folder)

    def draw(self, folder: Path) -> None:
        """Uses a model as far as its files are read."""
        model = Backbone.open(str(folder), device="cpu", precision="fp32")
        assert model.path and model.latent_shape and model.defaults and model.fingerprint
        text = model.encode_prompts(["a dog"])
        noise = torch.zeros(1, *model.latent_shape)
        model.decode(model.predict(noise, torch.tensor([0]), text))

    def pictures(self) -> None:
        for i in range(2):
            for j in range(2):
                path = self.write(f"pictures/p{i:05d}-s{j:02d}.png", b"")
                self.image.rotate(90 * (2 * i + j)).save(path)


def settings_door(program: Any, place: Place, random: Random) -> bool:
    content, damaged = damaged_json(place.record(f"{program.__name__}.json"), random)
    place.write("settings.json", content)
    settings = program.read_settings(place.folder)
    assert as_command("train", settings)
    return damaged


def config_door(program: Any, place: Place, random: Random) -> bool:
    usual = {"steps": 3, "learning_rate": 1e-3, "seed": 1, "model": "moji", "gradient_checkpointing": True}
    content, damaged = damaged_json(usual, random)
    kind = random.choice((".json", ".json", ".yaml"))
    asked = values_from_file(place.write(f"c{kind}", content), list_fields(program.Settings), {})
    program.resolve_settings({**NEEDED[program.__name__], **asked}, {})
    return damaged and kind == ".json"


def number_door(program: Any, place: Place, random: Random) -> bool:
    known = {name: one for name, one in list_fields(program.Settings).items() if one.kind in (int, float)}
    name, number = random.choice(list(known)), random.choice(NUMBERS)
    asked = values_from_flags({name: number}, known)
    program.resolve_settings({**NEEDED[program.__name__], **asked}, {})
    return number in ("nan", "inf", "-inf", "x", "", " ", "½", "0x10")


def concept_door(place: Place, random: Random) -> bool:
    content, damaged = damaged_json(CONCEPT, random)
    place.write("runs/b/concept.json", content)
    # A broken run beside is of no account
    resolve_placeholder_tokens("a dog", [], runs=place.folder / "runs")
    resolve_placeholder_tokens("a [V] dog", [read_concept(place.folder / "runs" / "b")], runs=place.folder)
    return damaged


def samples_door(place: Place, random: Random) -> bool:
    place.pictures()
    content, damaged = damaged_json(SAMPLES, random)
    place.write("samples.json", content)
    prompts, names = read_samples(place.folder)
    session = Session(place.folder, list_label_pairs([prompt.text for prompt in prompts], names))
    assert session.question is not None
    return damaged


def lines_door(name: str, row: dict[str, Any], place: Place, random: Random) -> bool:
    place.pictures()
    place.write("samples.json", json.dumps(SAMPLES).encode())
    content, damaged = damaged_json(row, random)
    path = place.write(name, json.dumps(row).encode() + b"\n" + content + b"\n")
    check_preferences(read_preferences(path))
    # An empty line is passed over; among choices so is a damaged one, which is what a crash left
    return damaged and name != "choices.jsonl" and bool(content.strip())


def captions_door(place: Place, random: Random) -> bool:
    shutil.copyfile(place.root / "image.png", place.write("a.png", b""))
    row = {"file_name": "a.png", "text": "a dog"}
    content, damaged = damaged_json(row, random)
    text = content if b"\n" not in content else content.replace(b"\n", b" ")
    place.write("metadata.jsonl", text)
    check_images(list_images(place.folder))
    return damaged and bool(text.strip())


def prompts_door(place: Place, random: Random) -> bool:
    if random.random() < 0.4:
        content, _ = damaged_json({"prompt": "a dog", "category": "c", "hard_negatives": ["a cat"]}, random)
        read_prompts(place.write("p.jsonl", content))
        return False
    text = odd_text(random)
    if random.random() < 0.5:
        found = read_prompts(place.write("p.txt", text.encode("utf-8", "surrogatepass")))
    else:
        found = load_prompts([text])
    place.opened.encode_prompts([one.text for one in found[:2]] or ["a"])
    return False


def model_door(place: Place, random: Random) -> bool:
    name = random.choice(JSON_PARTS)
    content, damaged = damaged_json(json.loads(place.files[name]), random)
    folder = place.copy_model(name)
    place.write(f"model/{name}", content)
    place.draw(folder)
    return damaged


def family_door(place: Place, random: Random) -> bool:
    source = place.family(random.choice(FAMILIES))
    listed = sorted(str(path.relative_to(source)) for path in source.rglob("*.json"))
    name = random.choice([name for name in listed if Path(name).stem not in ("tokenizer", "vocab")])
    content, damaged = damaged_json(json.loads((source / name).read_text()), random)
    folder = place.copy_model(name, source)
    place.write(f"model/{name}", content)
    place.draw(folder)
    return damaged


def weights_door(place: Place, random: Random) -> bool:
    name = random.choice(WEIGHTS) + ".safetensors"
    content, damaged = damaged_safetensors(place.files[name], random)
    folder = place.copy_model(name)
    place.write(f"model/{name}", content)
    place.draw(folder)
    return damaged


def index_door(place: Place, random: Random) -> bool:
    name = random.choice(WEIGHTS)
    folder = place.copy_model(f"{name}.safetensors")
    weights = place.files[f"{name}.safetensors"]
    shard = random.choice((
        *("whole.safetensors", "evil.bin", "evil", "../x.safetensors", "x.safetensors", "evil.pt"),
        *("a/b.safetensors", "whole.safetensors", "whole.safetensors"),
    ))  # fmt: skip
    names = [
        one for one in json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]) if one[0] != "_"
    ]
    content, damaged = damaged_json(
        {"metadata": {"total_size": len(weights)}, "weight_map": dict.fromkeys(names, shard)}, random
    )
    place.write(f"model/{Path(name).parent}/whole.safetensors", weights)
    place.write(f"model/{Path(name).parent}/evil.bin", b"\x80\x04cos\nsystem\n.")
    place.write(f"model/{name}.safetensors.index.json", content)
    place.draw(folder)
    return damaged or shard != "whole.safetensors"


def adapter_door(place: Place, random: Random) -> bool:
    content = (place.root / "a.safetensors").read_bytes()
    if random.random() < 0.5:
        tensors, metadata = read_tensors(place.root / "a.safetensors")
        config, damaged = damaged_json(json.loads(metadata[CONFIG_KEY]), random)
        path = place.folder / "pytorch_lora_weights.safetensors"
        write_tensors(path, tensors, {**metadata, CONFIG_KEY: config.decode("utf-8", "replace")})
    else:
        content, damaged = damaged_safetensors(content, random)
        path = place.write("pytorch_lora_weights.safetensors", content)
    concept = {**CONCEPT, "weights": path.name, "fingerprint": place.opened.fingerprint}
    place.write("concept.json", json.dumps(concept).encode())
    if random.random() < 0.5:
        export_adapter(path, place.folder / "o.safetensors", "kohya")
    else:
        model = Backbone.open(str(place.model), device="cpu", precision="fp32")
        load_concepts(model, [read_concept(place.folder)])
        model.predict(torch.zeros(1, *model.latent_shape), torch.tensor([0]), model.encode_prompts(["a dog"]))
    return damaged


def record_door(place: Place, random: Random) -> bool:
    content, damaged = damaged_json(place.record("edit/run.json"), random)
    try:
        replay(place.write("old/run.json", content), out=place.folder / "out")
    finally:
        left = place.folder / "out"
        assert not left.exists() or (left / "README.md").exists()
    return damaged


def mask_door(place: Place, random: Random) -> bool:
    path = place.folder / "a.png"
    place.image.convert(random.choice(("L", "1", "RGBA", "P", "I;16"))).save(
        path, random.choice(("PNG", "TIFF"))
    )
    path.write_bytes(damaged_bytes(path.read_bytes(), random))
    assert read_mask(path).image.mode == "L"
    return False


LOGGED_FIGURES = LoggedFigures(LoggedInterval(0.5, 0.4, 0.6), (0.5, None), 0.1, 0.2, 3, 4)


def log_door(place: Place, random: Random) -> bool:
    usual: list[Any] = [
        ("log.jsonl", Report(1, 0.5, 1.0, 1e-4, 0.1)),
        ("evaluations.jsonl", ConceptMetrics(1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)),
        ("log.jsonl", LoggedStep(1, 0.5, 0.5)), ("rewards.jsonl", LoggedReward(1, 0.5)),
        ("evaluations.jsonl", LoggedEvaluation(1, 0.1, LOGGED_FIGURES, LOGGED_FIGURES)),
    ]  # fmt: skip
    name, entry = random.choice(usual)
    content, _ = damaged_json(asdict(entry), random)
    path = place.write(name, json.dumps(asdict(entry)).encode() + b"\n" + content)
    if "step" in asdict(entry):
        trim_log(path, 1)
    read_jsonl(path, type(entry))
    return False  # a damaged line is what a crash left


def inversion_door(place: Place, random: Random) -> bool:
    content, damaged = damaged_safetensors((place.root / "i.safetensors").read_bytes(), random)
    read_inversion(place.write("i.safetensors", content), place.opened)
    return damaged


def checkpoint_door(place: Place, random: Random) -> bool:
    content, damaged = damaged_safetensors((place.root / "c.safetensors").read_bytes(), random)
    parameter, optimizer = place.training()
    load_checkpoint(
        place.write("c.safetensors", content), parameters=parameter, optimizer=optimizer, facts={"model": "f"}
    )
    return damaged


def tensors_door(place: Place, random: Random) -> bool:
    content, damaged = damaged_safetensors((place.root / "w.safetensors").read_bytes(), random)
    path = place.write("w.safetensors", content)
    read_header(path)
    read_tensors(path)
    return damaged


def image_door(place: Place, random: Random) -> bool:
    path = place.folder / "a.png"
    place.image.save(path, random.choice(IMAGE_KINDS))
    path.write_bytes(damaged_bytes(path.read_bytes(), random))
    assert open_rgb(path).mode == "RGB"
    return False


def parquet_door(place: Place, random: Random) -> bool:
    import pyarrow
    import pyarrow.parquet

    picture = (place.root / "image.png").read_bytes()
    cell: Any = random.choice((
        picture, b"", b"x", {"bytes": picture, "path": "a.png"}, {"bytes": None, "path": "/etc/hostname"},
        {"bytes": None, "path": None}, {"path": "../image.png"}, {"bytes": None, "path": "../image.png"},
    ))  # fmt: skip
    caption: Any = random.choice(("a dog", b"\xff\xfe", None, 3, "\0"))
    path = place.folder / "t.parquet"
    other = io.BytesIO()
    place.image.rotate(90).save(other, "PNG")
    rows = {"jpg_0": [cell], "jpg_1": [other.getvalue()], "image": [cell]}
    rows |= {"caption": [caption], "text": [caption], "label_0": [1.0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    if random.random() < 0.5:
        path.write_bytes(damaged_bytes(path.read_bytes(), random))
        damaged = False
    else:
        damaged = not (cell == picture or (isinstance(cell, dict) and cell.get("bytes") == picture))
    if random.random() < 0.7:
        check_preferences(read_preferences(path))
    else:  # `datasets` is slow: it writes a cache
        check_images(list_images(path, image_column="image"))
    return damaged


def control_door(place: Place, random: Random) -> bool:
    folder, damaged = place.damaged_folder(random.choice(("controlnet", "adapter")), random)
    network = open_control(place.opened, str(folder)).network
    text = place.opened.encode_prompts(["a dog"])
    controls = (Control.of(network, torch.rand(1, 3, 64, 64)),)
    noise = torch.zeros(1, *place.opened.latent_shape)
    place.opened.predict(noise, torch.tensor([0]), replace(text, controls=controls))
    return damaged


def motion_door(place: Place, random: Random) -> bool:
    folder, damaged = place.damaged_folder("motion", random)
    attach_motion(place.opened.denoiser, read_motion_adapter(str(folder)))
    try:
        noise = torch.zeros(1, place.opened.latent_shape[0], 2, *place.opened.latent_shape[1:])
        place.opened.predict(noise, torch.tensor([0]), place.opened.encode_prompts(["a dog"]))
    finally:
        detach_motion(place.opened.denoiser)
    return damaged


def film_door(place: Place, random: Random) -> bool:
    path = place.folder / f"film.{random.choice(('webp', 'gif', 'png'))}"
    turned = [place.image.rotate(90 * number) for number in range(3)]
    place.image.save(path, save_all=True, append_images=turned, duration=100)
    path.write_bytes(damaged_bytes(path.read_bytes(), random))
    assert read_film(path).frames
    return False


def map_door(place: Place, random: Random) -> bool:
    drawn = Image.new("L", place.image.size)
    ImageDraw.Draw(drawn).rectangle((10, 10, 50, 50), outline=255, width=2)
    kind, path = random.choice(("sketch", "edges", "lines")), place.folder / "map.png"
    drawn.convert(random.choice(("L", "RGB", "1", "P", "RGBA"))).save(path)
    path.write_bytes(damaged_bytes(path.read_bytes(), random))
    assert read_map(RequestedMap(kind, str(path)), MapTarget(place.image.size)).size == place.image.size
    return False


def edit_pairs_door(place: Place, random: Random) -> bool:
    shutil.copyfile(place.root / "image.png", place.write("a.png", b""))
    for name, colour in (("b", "red"), ("c", "blue")):
        edited = place.image.copy()
        edited.paste(colour, (20, 20, 40, 40))
        edited.save(place.folder / f"{name}.png")
    row = {"source": "a.png", "target": "b.png", "instruction": "make it red"}
    content, damaged = damaged_json(row, random)
    text = content.replace(b"\n", b" ")
    other = json.dumps({**row, "target": "c.png", "instruction": "make it blue"}).encode()
    place.write("metadata.jsonl", other + b"\n" + text + b"\n")
    select_usable_pairs(read_edit_pairs(place.folder))
    return damaged and bool(text.strip())


def control_pairs_door(place: Place, random: Random) -> bool:
    shutil.copyfile(place.root / "image.png", place.write("a.png", b""))
    lines = Image.new("RGB", place.image.size)
    ImageDraw.Draw(lines).rectangle((10, 10, 50, 50), outline="white", width=2)
    lines.save(place.folder / "m.png")
    row = {"file_name": "a.png", "conditioning_image": "m.png", "text": "a dog"}
    content, damaged = damaged_json(row, random)
    text = content.replace(b"\n", b" ")
    other = {"file_name": "a.png", "conditioning_image": "n.png", "text": "a cat"}
    lines.rotate(45).save(place.folder / "n.png")
    place.write("metadata.jsonl", json.dumps(other).encode() + b"\n" + text + b"\n")
    check_control_pairs(read_control_pairs(str(place.folder), "sketch"), "sketch", place.image.size)
    return damaged and bool(text.strip())


DOORS: dict[str, Door] = {
    "customize settings": partial(settings_door, customize.settings),
    "align settings": partial(settings_door, align.settings),
    "customize --config": partial(config_door, customize.settings),
    "align --config": partial(config_door, align.settings),
    "customize numbers": partial(number_door, customize.settings),
    "align numbers": partial(number_door, align.settings),
    "concept.json": concept_door,
    "samples.json": samples_door,
    "choices.jsonl": partial(lines_door, "choices.jsonl", CHOICE),
    "pairs .jsonl": partial(lines_door, "pairs.jsonl", PAIR),
    "labelled .jsonl": partial(lines_door, "labelled.jsonl", LABELLED),
    "metadata.jsonl": captions_door,
    "prompts": prompts_door,
    "model configs": model_door,
    "families' configs": family_door,
    "model weights": weights_door,
    "weight indexes": index_door,
    "adapters": adapter_door,
    "edit records": record_door,
    "masks": mask_door,
    "logs": log_door,
    "inversions": inversion_door,
    "checkpoints": checkpoint_door,
    "tensors": tensors_door,
    "images": image_door,
    "parquet": parquet_door,
    "control networks": control_door,
    "motion adapters": motion_door,
    "films": film_door,
    "maps": map_door,
    "edit pairs": edit_pairs_door,
    "control pairs": control_pairs_door,
}
