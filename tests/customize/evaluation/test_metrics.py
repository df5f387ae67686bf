"""What says how well a concept was learned: figures, the rule that chooses, the protocol, and the run's report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backbone.adapters.concept import Concept
from backbone.io.console import UserError
from backbone.io.report import line_plot, table, write_report
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from customize.evaluation.dreambench import (
    compare_with_references,
    make_moji_prompts,
    read_dreambench_prompts,
    read_templates,
)
from customize.evaluation.metrics import (
    ConceptMetrics,
    EarlyStopping,
    Evaluator,
    Scorers,
    compute_pseudo_ratings,
    mean_similarity,
    measure_dreambench,
    rate_checkpoint,
)
from customize.settings import Settings
from tests.tiny import tiny_eye

FILE = """Classes

subject_name,class
backpack,backpack
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token),
]
"""


def figures(
    step: int = 0, *, subject_fidelity: float = 0.4, prompt_precision: float = 0.9, rated: float = 0.0
) -> ConceptMetrics:
    return ConceptMetrics(
        step,
        subject_fidelity=subject_fidelity,
        prompt_fidelity=0.3,
        prior_preservation=0.4,
        diversity=0.5,
        loss=0.1,
        rating=rated,
        prompt_precision=prompt_precision,
    )


def test_a_model_before_training_is_rated_zero_and_a_perfect_one_one() -> None:
    start = figures()
    assert rate_checkpoint(start, baseline=start, ceiling=0.9) == 0
    assert rate_checkpoint(figures(subject_fidelity=0.9), baseline=start, ceiling=0.9) == 1


def test_likeness_without_obedience_is_worth_less() -> None:
    start = figures()
    both = rate_checkpoint(figures(subject_fidelity=0.8), baseline=start, ceiling=0.9)
    copied = rate_checkpoint(figures(subject_fidelity=0.8, prompt_precision=0.3), baseline=start, ceiling=0.9)
    assert copied < 0.6 * both
    assert both == pytest.approx(2 * 0.8 / 1.8)


def test_patience_ends_after_so_many_without_a_better_one() -> None:
    patience: EarlyStopping[ConceptMetrics] = EarlyStopping(2)
    best = []
    for step, value in enumerate([0.0, 0.5, 0.4, 0.5]):
        best.append(patience.update(figures(step, rated=value)))
        assert patience.should_stop == (step == 3)
    assert best == [True, True, False, False]
    assert patience.should_stop
    assert patience.best.step == 1


def test_a_later_checkpoint_wins_unless_an_earlier_one_is_better_by_more_than_noise() -> None:
    def best_of(*rows: Sequence[float]) -> list[bool]:
        stopping: EarlyStopping[ConceptMetrics] = EarlyStopping(9)
        return [
            stopping.update(replace(figures(step, rated=mean(row)), ratings=tuple(row)))
            for step, row in enumerate(rows, start=1)
        ]

    assert best_of((0.5, 0.5, 0.4, 0.4), (0.6, 0.3, 0.5, 0.3)) == [True, True]  # 0.025 lower, and noisier
    assert best_of((0.5, 0.5, 0.4, 0.4), (0.4, 0.4, 0.3, 0.3)) == [True, False]  # lower for every prompt
    # Of four images one standard error is little: by eye the later of these two, of a real run, was the better
    assert best_of((0.325, 0.42, 0.439, 0.198), (0.286, 0.324, 0.451, 0.118)) == [True, True]
    assert best_of((0.5, 0.5, 0.4), (0.6, 0.3, 0.5), (0.7, 0.7, 0.6), (0.6, 0.6, 0.5)) == [
        True,
        True,
        True,
        False,
    ]


def test_the_pseudo_values_of_a_mean_are_its_values() -> None:
    values = (0.1, 0.5, 0.9)
    found = compute_pseudo_ratings(lambda rows: mean(values[row] for row in rows), 3)
    assert found == pytest.approx(values)
    assert compute_pseudo_ratings(lambda rows: 1.0, 1) == ()


def test_the_likeness_of_pictures_among_themselves() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    assert mean_similarity(vectors) == pytest.approx(0)
    assert mean_similarity(vectors[:1]) == 1


def test_the_prompts_of_dreambooth_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(FILE)
    found = read_dreambench_prompts(path)
    assert found.things == ("a {} in the jungle", "a cube shaped {}")
    assert found.living == ("a {} wearing a santa hat",)
    assert found.classes == {"backpack": "backpack", "dog6": "dog"}


@pytest.mark.parametrize("text", ["", "prompt_list = []", "prompt_list = ['a dog']\nprompt_list = ['b']"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match="google/dreambooth"):
        read_dreambench_prompts(path)


def test_a_prompt_to_measure_by_has_places_for_the_subject_alone() -> None:
    kept = ("a {} beside a {}", "a {} in {red|blue}", "a {} {")
    assert read_templates(kept) == kept
    for words, said in (("a dog", "has no {}"), ("a {} in {place}", "has {place}, and {} alone")):
        with pytest.raises(UserError, match=re.escape(said)):
            read_templates([words])


def test_our_own_prompts_are_twenty_five_different_ones() -> None:
    assert len(set(make_moji_prompts())) == 25
    assert all(prompt.count("{}") == 1 for prompt in make_moji_prompts())


def test_a_report_shows_text_as_text(tmp_path: Path) -> None:
    parts = [table(("a",), [("<script>",)]), line_plot("c", {"x": [(0, 1.0), (1, 2.0)]}, marked=1)]
    write_report(tmp_path / "r.html", "<b>", parts)
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "polyline" in page
    assert "://" not in page


def test_likeness_by_dino_leaves_obedience_to_the_model_s_own_scorer(tmp_path: Path) -> None:
    own = EMBEDDED / "scorer"
    pictures = [Image.new("RGB", (40, 40), (60 * k, 10, 200 - 40 * k)) for k in range(4)]
    texts = ["a dog in a park", "a dog at night"]

    def measured(scorers: Scorers | None) -> dict[str, float]:
        assert scorers is not None
        subject = scorers.image_encoder.embed_images(pictures[:1])
        found = measure_dreambench(scorers, subject, pictures, texts, per_prompt=2)
        return {name: figure.value for name, figure in found.items()}

    dino = tiny_eye(tmp_path, "dinov2")
    alone, with_reader = measured(Scorers.load(dino, None)), measured(Scorers.load(dino, own))
    clip = measured(Scorers.load(None, own))
    assert list(alone) == ["DINO", "DIV"] and list(with_reader) == ["DINO", "CLIP-T", "DIV"]
    assert list(clip) == ["CLIP-I", "CLIP-T", "DIV"] and clip["CLIP-I"] != alone["DINO"]
    assert with_reader["CLIP-T"] == pytest.approx(clip["CLIP-T"]) and with_reader["DIV"] == alone["DIV"]
    assert Scorers.load(None, None) is None


def test_a_run_is_compared_with_references_prompt_by_prompt() -> None:
    """Prompts differ far more among themselves than the two ways do, which the paired interval leaves out."""
    untrained = [0.1, 0.5, 0.9, 0.3]
    found = compare_with_references({"CLIP-I": [value + 0.02 for value in untrained]}, {"CLIP-I": untrained})
    apart, alone = found["CLIP-I, the run minus references"], found["CLIP-I, from references"]
    assert apart.value == pytest.approx(0.02) and apart.high - apart.low < 1e-9
    assert alone.value == pytest.approx(0.45) and alone.high - alone.low > 0.3
    assert compare_with_references({"CLIP-I": untrained}, {}) == {}


def test_a_run_whose_obedience_nothing_can_measure_is_refused(tmp_path: Path, tiny: Backbone) -> None:
    scorers = Scorers.load(tiny_eye(tmp_path, "vit"), None)
    concept = Concept("lora", "", "", {"[V]": "rkh"}, "dog")
    settings = Settings(images="", token="[V]", class_noun="dog")
    assert scorers is not None
    with pytest.raises(UserError, match="Name a CLIP folder"):
        Evaluator(tiny, scorers, concept, settings, [Image.new("RGB", (40, 40))])
