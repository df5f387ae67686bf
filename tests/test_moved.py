"""A run goes on where its model, its images or its pairs lie elsewhere than when it began, with the same ones alone."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import customize.clips.train as motion
from align.collect.sample import _claim_folder as claim_samples
from align.comparison.compare import OpenedSide
from align.comparison.compare import _claim_folder as claim_side
from align.comparison.sides import Side
from align.training.start import as_saved
from backbone.cli.sampling import SamplingSettings
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_json, write_tensors
from backbone.io.run_folder import CHECKPOINT
from backbone.models.encode import describe_encoder
from backbone.models.fingerprint import earlier_fingerprint
from backbone.models.locate import locate
from backbone.models.model import Backbone
from backbone.training.prepared import PreparedFacts, hold_prepared
from customize.settings import Settings
from customize.training.start import as_saved as as_kept_by_a_concept
from tests.commands import run_here
from tests.tiny import tiny_pipeline

FEW = ("--steps", "2", "--checkpointing-steps", "1", "--device", "cpu", "--precision", "fp32")


def answer(program: str, *words: object, cwd: Path) -> str:
    """What a command says, whether it succeeds or not."""
    return run_here(program, *words, cwd=cwd, check=False).stderr


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_run_goes_on_with_a_model_and_images_that_have_moved(
    tmp_path: Path, model: Path, subject: Path
) -> None:
    words = ("--images", subject, "--token", "[V]", "--class", "dog", "--model", model, *FEW, "--out", "run")
    run_here("customize", "train", *words, cwd=tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    model.rename(tmp_path / "new-model")
    subject.rename(tmp_path / "new-images")
    go_on = ("customize", "train", "--resume", "elsewhere", "--images", "new-images")
    assert "said by --model FOLDER, beside RUN, --resume RUN" in answer(*go_on, cwd=tmp_path)
    tiny_pipeline(tmp_path / "other", seed=3)
    kept = (tmp_path / "elsewhere" / "settings.json").read_text()
    refused = answer(*go_on, "--model", "other", "--steps", "3", cwd=tmp_path)
    assert "was saved with another model" in refused and "Traceback" not in refused
    assert (tmp_path / "elsewhere" / "settings.json").read_text() == kept
    run_here(*go_on, "--model", "new-model", "--steps", "3", cwd=tmp_path)
    concept = read_json(tmp_path / "elsewhere" / "concept.json")
    assert concept["model"] == str(tmp_path / "new-model")
    lines = (tmp_path / "elsewhere" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_from_before_every_tensor_counted_goes_on_with_its_model(
    tmp_path: Path, model: Path, subject: Path
) -> None:
    words = ("--images", subject, "--token", "[V]", "--class", "dog", "--model", model, *FEW, "--out", "run")
    run_here("customize", "train", *words, cwd=tmp_path)
    tensors, header = read_tensors(tmp_path / "run" / CHECKPOINT)
    facts = json.loads(header["facts"])
    now, before = facts["model"], earlier_fingerprint(locate(str(model)))
    assert now != before
    facts["model"] = before
    write_tensors(tmp_path / "run" / CHECKPOINT, tensors, {**header, "facts": json.dumps(facts)})
    run_here("customize", "train", "--resume", "run", "--steps", "3", cwd=tmp_path)
    _, header = read_tensors(tmp_path / "run" / CHECKPOINT)
    assert (header["step"], json.loads(header["facts"])["model"]) == ("3", now)


def test_what_was_begun_before_every_tensor_counted_goes_on(tmp_path: Path, tiny: Backbone) -> None:
    """Images drawn, sides compared, latents prepared."""
    samples = {"format": 1, "fingerprint": tiny.fingerprint, "per_prompt": 2}
    write_json(tmp_path / "samples.json", {**samples, "fingerprint": earlier_fingerprint(tiny.location)})
    claim_samples(tmp_path, samples, tiny)
    write_json(tmp_path / "samples.json", {**samples, "fingerprint": "abc"})
    with pytest.raises(UserError, match="another fingerprint"):
        claim_samples(tmp_path, samples, tiny)

    one, drawing = OpenedSide(Side("a", str(tiny.location.folder)), tiny, ()), SamplingSettings()
    claim_side(tmp_path, one, [], drawing)
    drawn = read_json(tmp_path / "drawn.json")
    write_json(tmp_path / "drawn.json", {**drawn, "model": earlier_fingerprint(tiny.location)})
    claim_side(tmp_path, one, [], drawing)
    write_json(tmp_path / "drawn.json", {**drawn, "model": "abc"})
    with pytest.raises(UserError, match="drawn in another way"):
        claim_side(tmp_path, one, [], drawing)

    encoder = describe_encoder(tiny)
    facts = PreparedFacts("images", "there", tiny.location.name, tiny.resolution, 3, encoder=encoder)
    before = {**encoder, "model": earlier_fingerprint(tiny.location)}
    for other, refused in ((before, False), ({**encoder, "model": "abc"}, True)):
        folder = tmp_path / f"prepared-{refused}"
        write_json(folder / "prepared.json", asdict(replace(facts, encoder=other)))
        expected = pytest.raises(UserError, match="another") if refused else nullcontext()
        with expected, hold_prepared(folder, facts, tiny):
            pass


def test_preferences_are_learned_on_from_where_their_pairs_and_model_lie_now(
    tmp_path: Path, model: Path, subject: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": prompt, "chosen": f"subject/{first}.png", "rejected": f"subject/{second}.png"}
        for prompt, first, second in (("a dog", 0, 1), ("a cat", 1, 2), ("the cat", 2, 0))
    ]
    pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run_here("align", "train", "pairs.jsonl", "--model", "model", *FEW, "--out", "run", cwd=tmp_path)
    pairs.rename(tmp_path / "moved.jsonl")
    model.rename(tmp_path / "new-model")
    words = ("align", "train", "moved.jsonl", "--resume", "run", "--model", "new-model")
    changed = [*rows[:2], {**rows[2], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}]
    (tmp_path / "changed.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in changed))
    refused = answer("align", "train", "changed.jsonl", *words[3:], cwd=tmp_path)
    assert "another set of prompts and choices" in refused or "another images" in refused
    assert read_json(tmp_path / "run" / "settings.json")["settings"]["pairs"].endswith("/pairs.jsonl")
    run_here(*words, cwd=tmp_path)
    assert read_json(tmp_path / "run" / "concept.json")["model"] == str(tmp_path / "new-model")


def test_rounds_go_on_with_the_prompts_and_concepts_that_they_began_with(
    tmp_path: Path, model: Path, subject: Path
) -> None:
    words = ("--images", subject, "--token", "[V]", "--class", "dog", "--model", model, *FEW, "--out", "dog")
    run_here("customize", "train", *words, cwd=tmp_path)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    (tmp_path / "bright.py").write_text(
        "import numpy\ndef score(images, prompts):\n    return [float(numpy.mean(one)) for one in images]\n"
    )
    rounds = ("--rounds", "1", "--per-prompt", "2", "--sample-steps", "1", "--loss", "ddpo")
    judged = ("--online", "bright.py", "--prompts", "prompts.txt", "--concept", "dog", *rounds)
    run_here("align", "train", *judged, "--model", model, *FEW, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    (tmp_path / "prompts.txt").rename(tmp_path / "moved.txt")
    go_on = ("align", "train", "--online", "bright.py", "--resume", "run")
    run_here(*go_on, "--prompts", "moved.txt", cwd=tmp_path)
    (tmp_path / "moved.txt").write_text("a dog\na red cat\n")
    assert "another set of prompts" in answer(*go_on, cwd=tmp_path)
    (tmp_path / "moved.txt").write_text("a dog\na cat\n")
    more = ("--images", subject, "--token", "[V]", "--class", "dog", "--model", model, *FEW, "--seed", "1")
    run_here("customize", "train", *more, "--out", "dog2", cwd=tmp_path)
    assert "another concept" in answer(*go_on, "--concept", "dog2", cwd=tmp_path)
    (tmp_path / "bright.py").write_text("def score(images, prompts):\n    return [0.0] * len(images)\n")
    assert "another scorer" in answer(*go_on, cwd=tmp_path)


def test_a_round_that_was_begun_without_a_checkpoint_goes_on_with_the_same_model_alone(
    tmp_path: Path, model: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    (tmp_path / "bright.py").write_text(
        "import numpy\ndef score(images, prompts):\n    return [float(numpy.mean(one)) for one in images]\n"
    )
    shutil.copytree(model, own := tmp_path / "own")
    rounds = ("--rounds", "1", "--per-prompt", "2", "--sample-steps", "1", "--held-out", "0", "--model", own)
    judged = ("--online", "bright.py", "--prompts", "prompts.txt", *rounds)
    more = ("--steps", "2", "--batch", "1", "--device", "cpu", "--precision", "fp32", "--out", "run")
    run_here("align", "train", *judged, *more, cwd=tmp_path)
    # As if it had been killed in its first round
    for path in ((tmp_path / "run") / CHECKPOINT, *(tmp_path / "run").glob("*.safetensors")):
        path.unlink(missing_ok=True)
    (tmp_path / "run" / "concept.json").unlink()
    config = own / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.02}))
    again = answer("align", "train", "--online", "bright.py", "--resume", "run", cwd=tmp_path)
    assert "drawn or ranked with another model than there is now" in again


def test_paths_of_a_run_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    for name in ("scorer", "clips", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "s.py").touch()
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name, whole in {
        "scorer": f"{tmp_path}/scorer",
        "s.py": f"{tmp_path}/s.py",
        "like:pictures:moji": f"like:{tmp_path}/pictures:moji",
        "like:pictures": f"like:{tmp_path}/pictures",
        "moji": "moji",
    }.items():
        assert as_saved({"online": name}) == {"online": whole}
    kept = motion.as_saved({"clips": "clips", "model": "model", "motion": ""})
    assert kept == {"clips": f"{tmp_path}/clips", "model": f"{tmp_path}/model", "motion": ""}


def test_further_subjects_may_have_moved_and_stay_who_they_are(tmp_path: Path) -> None:
    own = Settings(images="a", token="[V]", class_noun="dog", subject=("b:[W]:cat:bcd",))
    (tmp_path / "there").mkdir()
    kept = as_kept_by_a_concept({"subject": (f"{tmp_path}/there:[W]:cat",)}, own)
    assert kept["subject"] == (f"{tmp_path}/there:[W]:cat:bcd",)
    for other in (("there:[W]:dog",), ("there:[X]:cat",), ()):
        with pytest.raises(UserError, match=r"of the run's own subjects \(\[W\] cat\)"):
            as_kept_by_a_concept({"subject": other}, own)
