"""A run on the hub: its card's head, and an upload to a stand-in on this machine."""

from __future__ import annotations

import base64
import html
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image

from backbone.adapters.embeddings import EMBEDDINGS_FILE
from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.files import write_json, write_tensors
from backbone.models.locate import locate
from backbone.models.model import Backbone
from customize.settings import Settings
from customize.training.reporting.card import explain_diffusers, format_card, push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload talks to; what arrives is in `received`."""

    received: dict[str, bytes]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        if server.refuses:
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path.endswith("/repos/create"):
            return self.answer(200, {"url": f"http://127.0.0.1:{server.server_port}/me/dog"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            every = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer(200, {"files": every})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.received[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"http://127.0.0.1:{server.server_port}/me/dog"
            return self.answer(200, {"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True})
        return self.answer(200, {"valid": True, "warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.answer(200, {"name": "me", "type": "user", "sha": "1", "id": "me/dog", "siblings": []})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, in place of the hub."""
    server: Any = HTTPServer(("127.0.0.1", 0), Hub)
    server.received, server.refuses = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("README.md", "concept.json", "checkpoint.safetensors", "tensorboard/events"):
        (folder / name).write_text(name)
    return folder


def test_a_run_is_uploaded_without_what_only_resuming_needs(hub: Any, run: Path) -> None:
    assert push(run, "me/dog").endswith("/me/dog")
    assert set(hub.received) == {"README.md", "concept.json"}
    assert hub.received["concept.json"] == b"concept.json"


def test_what_is_uploaded_names_no_folder_of_this_disk(
    hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = run.parent
    monkeypatch.setenv("HOME", str(home / "somebody"))
    settings: dict[str, Any] = {
        "images": str(home / "my “photos”"),
        "model": str(home / "models/mine"),
        "subject": [f"{home / 'cats'}:[W]:cat"],
        "class_images": [str(home / "dogs")],
    }
    line = f"customize train --images '{settings['images']}' --out {run} --scorer {home / 'somebody/clip'}"
    write_json(run / "settings.json", {"settings": settings, "command": line})
    write_json(run / "concept.json", {"model": settings["model"]})
    for name in ("README.md", "report.html"):
        (run / name).write_text(
            f"{line}\n{home / 'cats'} & {html.escape(settings['images'])}", encoding="utf-8"
        )
    weights = {"w": torch.zeros(2)}
    write_tensors(run / "pytorch_lora_weights.safetensors", weights, {"base_model": settings["model"]})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    push(run, "me/dog")
    assert set(hub.received) == {
        *("settings.json", "concept.json", "README.md", "report.html"), "pytorch_lora_weights.safetensors"
    }  # fmt: skip
    assert not [name for name, content in hub.received.items() if str(home).encode() in content]
    assert (
        b"--images 'my \xe2\x80\x9cphotos\xe2\x80\x9d' --out dog --scorer ~/clip" in hub.received["README.md"]
    )
    record = json.loads(hub.received["settings.json"])["settings"]
    assert (record["model"], record["subject"], record["class_images"]) == (
        "mine",
        ["cats:[W]:cat"],
        ["dogs"],
    )
    assert b'"base_model":"mine"' in hub.received["pytorch_lora_weights.safetensors"]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_refusal_is_one_sentence_that_says_what_to_do(hub: Any, run: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match=r"could not be uploaded as me/dog .*hf auth login"):
        push(run, "me/dog")


def test_the_cards_head_is_what_the_hub_reads(tiny_folder: Path) -> None:
    settings = Settings(
        images="x", token="[V]", class_noun='toy "dog" figure', token_words="bcd", model="tiny"
    )
    head = format_card(settings, Backbone.open(str(tiny_folder)))
    data = ModelCard(head + "# [V] dog").data
    assert data.get("instance_prompt") == 'a bcd toy "dog" figure'
    assert data.get("pipeline_tag") == "text-to-image"
    assert data.get("base_model") is None  # a folder on this machine is no place that the hub knows
    assert data.get("widget") == [{"text": 'a bcd toy "dog" figure', "output": {"url": "sheet.png"}}]


@pytest.mark.parametrize("name", ["moji", "moji-flow", "tiny", "sdxl.safetensors"])
@pytest.mark.parametrize("method", ["lora", "pivotal"])
def test_the_readme_s_lines_for_diffusers_begin_with_their_imports_and_end_in_a_file(
    name: str, method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        images="x", token="[V]", class_noun="dog", token_words="bcd", model=name, method=method
    )
    if name.endswith(".safetensors"):
        index = {"_class_name": "StableDiffusionXLPipeline"}
        location = Location(name, str(tmp_path / name), index, (tmp_path,))
    else:
        location = locate(str(tiny_folder) if name == "tiny" else name)
    model = SimpleNamespace(
        location=location,
        defaults={"steps": 25, "guidance": 4.0, "sampler": "ancestral"},
        choose_sampler=lambda: "ancestral",
    )
    write_tensors(tmp_path / EMBEDDINGS_FILE, {"[V]": torch.zeros(1, 4)})
    lines = explain_diffusers(tmp_path, settings, model, "a [V] dog")  # type: ignore[arg-type]
    if (name, method) == ("moji-flow", "pivotal"):  # diffusers' pipeline of SD3 reads no words
        assert not hasattr(diffusers.StableDiffusion3Pipeline, "load_textual_inversion")
        assert lines == [
            "diffusers' StableDiffusion3Pipeline reads no learned words; `customize sample` does."
        ]
        return
    code = lines[lines.index("```python") + 1 : lines.index("```")]
    opened: dict[str, Any] = {}

    class Pipeline:
        @classmethod
        def opening(cls, how: str) -> Any:
            return lambda place: opened.setdefault(how, str(place)) and cls()

        def __getattr__(self, called: str) -> Any:
            return lambda *given, **how: opened.setdefault(called, given)

        def __call__(
            self, prompt: str, num_inference_steps: int, guidance_scale: float, eta: float = 0
        ) -> Any:
            opened["prompt"], opened["how"] = prompt, (num_inference_steps, guidance_scale, eta)
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    kind: Any = Pipeline
    kind.from_pretrained, kind.from_single_file = Pipeline.opening("folder"), Pipeline.opening("file")
    monkeypatch.setattr(diffusers, str(location.index["_class_name"]), Pipeline)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code), {})
    assert opened["file" if location.file else "folder"] == location.source
    assert opened["prompt"] == "a bcd dog" and opened["how"] == (25, 4.0, float(name != "moji-flow"))
    assert opened["load_lora_weights"] == (str(tmp_path),) and Path("picture.png").is_file()
