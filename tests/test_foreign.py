"""What a stranger sent runs no code, opens no pickle, and reads nothing outside of its own folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import errors
from typer.testing import CliRunner

import align.cli
import align.settings
import customize.cli
import customize.settings
import edit.cli
from align.collect.sample import sample_pairs
from align.comparison.compare import compare_models
from align.comparison.sides import Side
from align.pairs.read import read_preferences
from align.pairs.records import check_preferences
from backbone.adapters.apply import check_concept_fits
from backbone.adapters.concept import Concept, read_concept
from backbone.cli.options import list_fields
from backbone.cli.sampling import DrawingOptions
from backbone.cli.values.collect import values_from_file
from backbone.families.location import find_hub_file, hub_file
from backbone.io.console import UserError
from backbone.io.files import write_json, write_tensors
from backbone.io.prompts import Prompt
from backbone.io.run_folder import hold_folder, hold_new_folder, refuse_taken
from backbone.media.sources.pictures import check_images, list_images
from backbone.models.locate import EMBEDDED, locate
from backbone.models.model import Backbone
from customize.sampling import sample_to_folder
from customize.training.reporting.card import push
from tests.align.conftest import picture, write_lines

CANARY = """
from pathlib import Path
Path({!r}).write_text("ran")
def score(pictures, prompts):
    return [0.0] * len(pictures)
"""


# Python files -----------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary.txt"


@pytest.fixture
def sent(tmp_path: Path, canary: Path) -> Path:
    """A run folder whose scorer is a Python file inside of it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "evil.py").write_text(CANARY.format(str(canary)))
    (tmp_path / "prompts.txt").write_text("a dog\n")
    asked = {
        "online": str(run / "evil.py"), "prompts": str(tmp_path / "prompts.txt"), "rounds": 1, "steps": 1,
        "per_prompt": 2,
    }  # fmt: skip
    settings = align.settings.resolve_settings(asked, {"steps": 2, "guidance": 2.0})
    write_json(run / "settings.json", {"settings": settings, "command": "align train"})
    return run


def called(*words: object) -> str:
    done = CliRunner().invoke(align.cli.app, [str(word) for word in words])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_going_on_with_a_run_runs_no_python_that_only_the_folder_names(sent: Path, canary: Path) -> None:
    said = called("train", "--resume", sent)
    assert "would be run" in said and f"--online {sent}/evil.py --resume {sent}" in said
    assert not canary.exists()


@pytest.mark.parametrize("other", ["other.py", "moji"])
def test_another_scorer_beside_resume_is_refused(sent: Path, canary: Path, other: str) -> None:
    assert "has no effect" in called("train", "--resume", sent, "--online", other)
    assert not canary.exists()


def test_settings_from_a_file_run_no_python_either(sent: Path, canary: Path) -> None:
    said = called("train", "--config", sent / "settings.json", "--out", sent.parent / "new")
    assert "would be run" in said and "--online" in said
    assert not canary.exists() and not (sent.parent / "new").exists()
    known = list_fields(align.settings.Settings)
    code = str(sent / "evil.py")
    assert values_from_file(sent / "settings.json", known, {"online": code})["online"] == code


# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weights", "words", "changed"])
@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/tmp/other.safetensors", "a/../../other.safetensors"]
)
def test_a_concept_names_files_of_its_own_folder(tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "run").mkdir()
    named: dict[str, Any] = {key: name}
    Concept("lora", "moji", "f", {"[V]": "bcd"}, "dog", **named).write(tmp_path / "run")
    with pytest.raises(UserError, match="outside the folder"):
        read_concept(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": None}, "tokens is null"),
        ({"tokens": ["[V]"]}, "tokens is"),
        ({"tokens": {"[V]": 3}}, r"tokens\.\[V\] is 3"),
        ({"tokens": {"": "bcd"}}, "a token is empty"),
        ({"model": 3}, "model is 3"),
        ({"weights": None}, "weights is null"),
        ({"class_noun": 3}, "class_noun is 3"),
        ({"more": 1}, "the key more"),
        ({"folder": "/"}, "the key folder"),
    ],
)
def test_a_damaged_concept_is_named_with_its_key(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    Concept("lora", "moji", "f", {"[V]": "bcd"}, "dog", "w.safetensors").write(tmp_path)
    path = tmp_path / "concept.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"concept\.json is damaged.*{said}"):
        read_concept(tmp_path)


def test_a_concept_whose_file_is_missing_is_refused(tmp_path: Path, tiny: Backbone) -> None:
    for key in ("weights", "words", "changed"):
        named: dict[str, Any] = {key: "w.safetensors"}
        concept = Concept("lora", "m", tiny.fingerprint, {"[V]": "bcd"}, "dog", folder=tmp_path, **named)
        with pytest.raises(UserError, match=r"w\.safetensors is missing"):
            check_concept_fits(concept, tiny)
    with pytest.raises(UserError, match="names no weights"):
        check_concept_fits(Concept("lora", "m", tiny.fingerprint, {}, "dog", folder=tmp_path), tiny)


def test_a_damaged_concept_is_refused_before_a_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Backbone
) -> None:
    Concept(
        "lora", str(tiny.location.folder), tiny.fingerprint, {"[V]": "bcd"}, "dog", "w.safetensors"
    ).write(tmp_path)
    write_tensors(tmp_path / "w.safetensors", {"unet.x.lora_A.weight": torch.full((2, 3), torch.nan)})
    monkeypatch.chdir(tmp_path)
    words = (
        "sample",
        "--prompts",
        "a [V]",
        "--concept",
        tmp_path,
        "--steps",
        1,
        "--out",
        "out",
        "--device",
        "cpu",
    )
    assert "unet.x.lora_A.weight holds values that are not finite" in called(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "sub/../../secret.png"]
)
def test_pairs_name_pictures_of_their_own_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "sub" / "a.png"):
        picture(0).save(path)
    rows = [{"prompt": "a dog", "chosen": name, "rejected": "a.png"}]
    with pytest.raises(UserError, match=r"line 1 of .* outside the folder"):
        check_preferences(read_preferences(write_lines(tmp_path / "sub" / "p.jsonl", rows)))


@pytest.mark.parametrize("absolute", [True, False])
def test_a_table_names_pictures_of_its_own_folder(tmp_path: Path, absolute: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "sub").mkdir()
    picture(0).save(tmp_path / "secret.png")
    picture(1).save(tmp_path / "sub" / "own.png")
    name = str(tmp_path / "secret.png") if absolute else "../secret.png"
    for file, there in ((name, False), ("own.png", True)):
        path = tmp_path / "sub" / f"{there}.parquet"
        cells = [{"bytes": None, "path": file}]
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": ["a dog"]}), path)
        if there:
            check_images(list_images(path))
            continue
        with pytest.raises(UserError, match="outside the folder"):
            check_images(list_images(path))


def test_a_saved_dataset_names_splits_of_its_own_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "set" / "dataset_dict.json", {"splits": ["train", "../secret"]})
    with pytest.raises(UserError, match=r"names \.\./secret, which lies outside the folder"):
        list_images(tmp_path / "set")


# The hub ----------------------------------------------------------------------------------------------------


def test_all_files_of_a_hub_model_come_from_one_commit_and_fetching_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        assert not local_files_only
        asked.append((name, revision))
        path = tmp_path / "snapshots" / "c0ffee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((EMBEDDED / name).read_bytes())
        return str(path)

    monkeypatch.setattr("backbone.families.location.hub_answers", lambda repository: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: None)
    location = locate("some/model")
    assert "Fetching some/model from the hub" in capsys.readouterr().err
    location.config("unet")
    assert asked == [("model_index.json", None), ("unet/config.json", "c0ffee")]
    assert location.revision == "c0ffee"


@pytest.mark.parametrize(
    ("kind", "offline", "complaint"),
    [
        (
            "GatedRepoError",
            False,
            "is gated: accept its terms at https://huggingface.co/some/model. Then log in",
        ),
        (
            "RepositoryNotFoundError",
            False,
            "The hub shows no model some/model: check the spelling, or it is private",
        ),
        ("LocalEntryNotFoundError", True, "is not on this machine, and the hub could not be reached"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    kind: str, offline: bool, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: str, local_files_only: bool, **how: Any) -> str:
        assert local_files_only is offline
        if offline:
            raise errors.LocalEntryNotFoundError("nothing")
        answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise getattr(errors, kind)("no", response=answer)

    monkeypatch.setattr("backbone.families.location.hub_answers", lambda repository: not offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name, **how: "there")
    with pytest.raises(UserError, match=complaint):
        locate("some/model")


def test_without_the_hub_a_file_that_it_did_not_have_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was fetched whole opens again without a network."""
    commit, place = "c0ffee" + "0" * 34, tmp_path / "models--some--model"
    for file in (f"snapshots/{commit}/vae/config.json", f".no_exist/{commit}/vae/index.json", "refs/main"):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("backbone.families.location.hub_answers", lambda repository: False)
    for revision in (commit, None):
        found = find_hub_file("some/model", "vae/config.json", revision)
        assert found is not None and found.read_text() == commit
        assert find_hub_file("some/model", "vae/index.json", revision) is None
    with pytest.raises(UserError, match="is not on this machine"):
        find_hub_file("some/model", "vae/weights.safetensors", commit)


def test_a_hub_file_that_is_missing_is_a_sentence() -> None:
    with pytest.raises(UserError, match="Check its name"):
        hub_file("not a name", "model_index.json")


def test_an_upload_is_private_and_telemetry_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def create(self: object, repository: str, **how: Any) -> Any:
        made.update(how)
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    with pytest.raises(UserError, match="could not be uploaded"):
        push(tmp_path, "me/run")
    assert made["private"] is True
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


# A run folder's records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": -5}, "steps in .* is -5; it is at least 1"),
        ({"steps": "x"}, "steps in .* is x"),
        ({"steps": None}, "steps in"),
        ({"batch": 0}, "batch in .* at least 1"),
        ({"checkpointing_steps": 0}, "checkpointing_steps in"),
        ({"learning_rate": "x"}, "learning_rate in"),
        ({"sheet_prompts": [1]}, "sheet_prompts in"),
        ({"token": 5}, "token in"),
        ({"token": ""}, "token is empty"),
        ({"token": " "}, "token is empty"),
        ({"more": 1}, "no setting more"),
    ],
)
def test_settings_of_a_run_are_in_the_range_of_their_options(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    settings = customize.settings.resolve_settings({"images": "x", "token": "[V]", "class_noun": "dog"}, {})
    write_json(tmp_path / "settings.json", {"settings": settings, "command": "x"})
    path = tmp_path / "settings.json"
    record = json.loads(path.read_text())
    assert customize.settings.read_settings(tmp_path) == settings
    path.write_text(json.dumps({**record, "settings": {**record["settings"], **change}}))
    with pytest.raises(UserError, match=said):
        customize.settings.read_settings(tmp_path)


@pytest.mark.parametrize("record", [None, [], {}, {"settings": []}, {"settings": None}, 3])
def test_a_record_of_another_shape_is_refused(tmp_path: Path, record: Any) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(record))
    for program in (customize.settings, align.settings):
        with pytest.raises(UserError, match=r"settings\.json is damaged"):
            program.read_settings(tmp_path)


@pytest.mark.parametrize("device", ["quantum", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_a_sentence(tiny_folder: Path, device: str) -> None:
    with pytest.raises(UserError, match="There is no device"):
        Backbone.open(str(tiny_folder), device=device)


@pytest.mark.parametrize("door", ["customize sample", "align sample", "align compare"])
def test_of_two_that_draw_into_one_folder_the_second_is_refused(
    tmp_path: Path, tiny_folder: Path, door: str
) -> None:
    out = tmp_path / "drawn"
    how: dict[str, Any] = {"device": "cpu", "precision": "fp32", "steps": 1}
    side = Side.from_name(str(tiny_folder))

    def draw() -> None:
        if door == "customize sample":
            sample_to_folder(["a dog"], DrawingOptions(model=str(tiny_folder), **how), out)
        elif door == "align sample":
            sample_pairs([Prompt("a dog")], out, align.settings.PairSampling(model=str(tiny_folder), **how))
        else:
            other = replace(side, guidance=5.5)
            compare_models(side, other, [Prompt("a dog")], out, align.settings.ComparisonSettings(**how))

    with hold_folder(out):
        with pytest.raises(UserError, match="Another process is writing"):
            draw()
        assert not list(out.iterdir())


def test_a_new_folder_is_kept_by_who_has_made_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold_new_folder(out, out):
        with pytest.raises(UserError, match="Another process is writing"), hold_new_folder(out, out):
            pass
        assert out.is_dir(), "the one that is refused takes nothing away"
        (out / "a.png").touch()
    with pytest.raises(UserError, match="is not empty"), hold_new_folder(out, out):
        pass
    with pytest.raises(UserError, match="is a file"), hold_folder(out / "a.png"):
        pass
    with hold_new_folder(None, tmp_path / "empty") as folder:
        assert folder.is_dir()
    assert not folder.exists()  # of a page that was closed before anything was drawn
    with pytest.raises(KeyError), hold_new_folder(tmp_path / "failed", out):
        raise KeyError
    assert not (tmp_path / "failed").exists()
    with hold_new_folder(None, out) as numbered:
        assert numbered == tmp_path / "out-2"


@pytest.mark.parametrize(
    "words",
    [
        (
            "customize",
            "train",
            "--images",
            "subject",
            "--token",
            "[V]",
            "--class",
            "dog",
            "--out",
            "closed/run",
        ),
        ("customize", "sample", "a dog", "--out", "closed/s"),
        ("customize", "sample", "a dog"),
        ("edit", "sdedit", "subject/0.png", "--prompt", "a cat", "--out", "closed/e"),
        ("edit", "sdedit", "subject/0.png", "--prompt", "a cat"),
        ("align", "train", "p.jsonl", "--out", "closed/run"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    words: tuple[str, ...], subject: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(subject.parent)
    Path("closed").mkdir()
    rows = [
        {"prompt": "a dog", "chosen": f"subject/{number}.png", "rejected": "subject/2.png"}
        for number in (0, 1)
    ]
    write_lines(Path("p.jsonl"), rows)
    closed = subject.parent / "closed" if "--out" in words else subject.parent
    # A permission is nothing to root, who may run this
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    program = {"customize": customize.cli.app, "edit": edit.cli.app, "align": align.cli.app}[words[0]]
    answer = CliRunner().invoke(program, [*words[1:], "--model", str(tiny_folder), "--device", "cpu"])
    assert isinstance(answer.exception, UserError), answer.output
    assert f"{closed} is read-only" in str(answer.exception)
    assert not list(Path("closed").iterdir()) and not Path("runs").exists() and not Path("samples").exists()


@pytest.mark.parametrize("name", ["dog.png", "dog.JPG", "runs/dog.safetensors", "dog.txt", "dog.tiff"])
def test_a_folder_is_not_called_as_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for take in (
        lambda: hold_new_folder(Path(name), Path("x")).__enter__(),
        lambda: refuse_taken(Path(name)),  # a run's
        lambda: hold_folder(Path(name)).__enter__(),  # what is prepared
    ):
        with pytest.raises(UserError, match=r"called as a file.* --out .*dog\."):
            take()
    assert not list(tmp_path.iterdir())
    Path(name).mkdir(parents=True)
    refuse_taken(Path(name))  # it is a folder already
    Path("link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link is a link to nowhere, which is not there"):
        refuse_taken(Path("link"))


def test_of_two_runs_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="Another process is writing")
    with hold_folder(tmp_path / "run"), refused, hold_folder(tmp_path / "run"):
        pass
    with hold_folder(tmp_path / "run"):
        assert not list((tmp_path / "run").iterdir())
