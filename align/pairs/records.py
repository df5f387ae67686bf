"""Preference records: pairs and single labelled images, their validation, and the split that holds some out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from backbone.io.console import UserError
from backbone.io.files import content_hash
from backbone.media.decode import BadImageError
from backbone.media.pictures import ImageRecord

SAMPLES = "samples.json"
RANKING = "ranking.jsonl"
SCORES = "scores.json"
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Drawn:
    """`samples.json`, as far as it is read again."""

    prompts: list[DrawnPrompt]
    per_prompt: int
    format: int = 0
    concepts: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt of `samples.json`."""

    prompt: str
    category: str = ""
    hard_negatives: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """`scores.json`: the number that each scorer gave each picture, by the picture's file."""

    scorers: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt. `label` is the probability that the first is preferred: 1, 0, or ½ for a tie."""

    prompt: str
    first: ImageRecord
    second: ImageRecord
    label: float
    name: str  # for error messages: “row 12 of pairs.parquet”
    user: str = ""
    both_bad: bool = False  # a tie in which neither is wanted

    @property
    def pictures(self) -> tuple[ImageRecord, ImageRecord]:
        """Both images."""
        return self.first, self.second

    @property
    def is_tie(self) -> bool:
        """Whether neither was preferred."""
        return self.label == 0.5

    @property
    def ordered(self) -> Pair:
        """The same pair with the preferred image first; a tie is unchanged."""
        if self.label >= 0.5:
            return self
        return replace(self, first=self.second, second=self.first, label=1 - self.label)


@dataclass(frozen=True)
class Single:
    """One image of a prompt, labelled good or bad by itself."""

    prompt: str
    picture: ImageRecord
    good: bool
    name: str
    user: str = ""

    @property
    def pictures(self) -> tuple[ImageRecord]:
        """The image, as a tuple of one."""
        return (self.picture,)


Record: TypeAlias = Pair | Single


@dataclass
class Preferences:
    """Records of a source, in its order, and the problems found so far, a sentence each."""

    source: str
    pairs: list[Pair] = field(default_factory=list)
    singles: list[Single] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: int = 0  # rows without a label, skipped pairs
    provenance: dict[str, Any] = field(default_factory=dict)  # the model that drew a folder of `align sample`

    @property
    def records(self) -> list[Record]:
        """Pairs, then single images."""
        return [*self.pairs, *self.singles]


def check_preferences(preferences: Preferences, *, skip_bad: bool = False) -> Preferences:
    """Open every image; raises one `UserError` that lists all problems, a line each.

    With `skip_bad` bad records are dropped instead, and it is an error only if nothing useful remains.
    """
    problems = list(preferences.problems)
    good: list[Record] = []
    for record in preferences.records:
        record_problems = list(_find_problems(record))
        problems += [f"{record.name} {problem}" for problem in record_problems]
        if not record_problems:
            good.append(record)
    kept = replace(
        preferences,
        pairs=[record for record in good if isinstance(record, Pair)],
        singles=[record for record in good if isinstance(record, Single)],
        problems=problems,
    )
    general_problems = list(_find_general_problems(kept))
    if general_problems or (problems and not skip_bad):
        raise UserError(_format_problems(preferences, problems, general_problems))
    return kept


def refuse_another_model(preferences: Preferences, model: str, fingerprint: str) -> None:
    """Raise `UserError` when a pairs folder was sampled from other weights than those that are to be trained."""
    drawn_by = preferences.provenance
    if drawn_by.get("fingerprint") not in (None, fingerprint):
        raise UserError(
            f"{preferences.source} was drawn by {drawn_by.get('model')} with other weights than {model} has. "
            "Train that model, or pass --any-model to learn from another model's pictures."
        )


def split_held_out(
    records: Sequence[Record], *, share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split into (training, held-out) records by prompt; about `share` of the prompts are held out.

    A prompt's side is a hash of its words and the seed, so other prompts do not move it. At least one prompt is held
    out, and one kept, where there are two and the share is not 0. Of single images both classes are learned from,
    where there are both, even if that leaves none held out.
    """
    prompts = {normalize_prompt(record.prompt) for record in records}
    uniform = {prompt: int(content_hash(f"{seed}/{prompt}".encode())[:13], 16) / 16**13 for prompt in prompts}
    held_out = {prompt for prompt, number in uniform.items() if number < share}
    if share and len(prompts) > 1:
        if not held_out:
            held_out = {min(uniform, key=lambda prompt: uniform[prompt])}
        if len(held_out) == len(prompts):
            held_out -= {max(uniform, key=lambda prompt: uniform[prompt])}
    elif len(prompts) < 2:
        held_out = set()
    # A class of single images that stands in held-out prompts alone comes back, with the prompt nearest to this side
    for good in sorted({record.good for record in records if isinstance(record, Single)}):
        of_class = {
            normalize_prompt(record.prompt)
            for record in records
            if isinstance(record, Single) and record.good is good
        }
        if of_class <= held_out:
            held_out -= {max(of_class, key=lambda prompt: uniform[prompt])}
    return (
        [record for record in records if normalize_prompt(record.prompt) not in held_out],
        [record for record in records if normalize_prompt(record.prompt) in held_out],
    )


def select_records(preferences: Preferences, *, by_pairs: bool, ties: bool) -> list[Record]:
    """What is learned from: pairs, with or without ties, or single images (`to_singles`)."""
    if not by_pairs:
        return list(to_singles(preferences))
    return [pair for pair in preferences.pairs if ties or not pair.is_tie]


def to_singles(preferences: Preferences) -> list[Single]:
    """Pairs as single labelled images: winners good, losers bad, “both bad” both bad; other ties are dropped."""
    singles = list(preferences.singles)
    for pair in preferences.pairs:
        if pair.is_tie and not pair.both_bad:
            continue
        better = pair.ordered
        singles += [
            Single(pair.prompt, better.first, not pair.both_bad, pair.name, pair.user),
            Single(pair.prompt, better.second, False, pair.name, pair.user),
        ]
    return singles


def normalize_prompt(prompt: str) -> str:
    """Lower-case a prompt and strip extra spaces and a final full stop, to compare prompts."""
    return " ".join(prompt.lower().split()).rstrip(" .")


def _find_problems(record: Record) -> Iterator[str]:
    """Yield what is wrong with one record; opens its images."""
    if not record.prompt.strip():
        yield "has no prompt"
    images = []
    for picture in record.pictures:
        try:
            images.append(picture.open(at_least=64))
        except BadImageError as error:
            yield f"names a picture that {error.reason} ({error.name})"
        except OSError as error:
            yield f"names a picture that cannot be read ({error})"
        except UserError as error:
            yield f"has no usable picture ({error})"
    if len(images) != 2:
        return
    if not _is_same_size(images[0].size, images[1].size):
        (width, height), (other_width, other_height) = (image.size for image in images)
        yield f"has pictures of different sizes, {width} × {height} and {other_width} × {other_height}"
    if images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        yield "has the same picture twice"


def _is_same_size(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes are equal, up to the rounding of a JPEG that is decoded at a reduced size."""
    return all(abs(a - b) <= 1 for a, b in zip(first, second, strict=True))


def _find_general_problems(preferences: Preferences) -> Iterator[str]:
    """Yield what is wrong with the whole: no records, all ties, or one label only."""
    source, pairs, singles = preferences.source, preferences.pairs, preferences.singles
    if not preferences.records:
        waiting = f" ({preferences.skipped} are not labelled yet)" if preferences.skipped else ""
        yield f"{source} holds no usable pair{waiting}. Choose with `align label`, or rank with `align rank`."
    elif pairs and not singles and all(pair.is_tie for pair in pairs):
        yield f"All {len(pairs)} pairs of {source} are ties, so nothing is preferred. Choose in some."
    elif singles and not pairs and len({single.good for single in singles}) == 1:
        label, opposite = ("good", "bad") if singles[0].good else ("bad", "good")
        yield f"Every picture of {source} is labelled {label}, so nothing is preferred. Label some {opposite}."


def _format_problems(preferences: Preferences, problems: Sequence[str], general: Sequence[str]) -> str:
    if not problems:
        return "\n".join(general)
    count = len(preferences.records)
    shown = [f"  {problem}" for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        shown.append(f"  and {len(problems) - PROBLEMS_SHOWN} more")
    counts = (
        f"{len(problems)} {_pluralize('problem', len(problems))} in {count} {_pluralize('record', count)}"
    )
    heading = f"{preferences.source} has {counts}:"
    remedy = "Repair or remove them, or leave them out with --skip-bad."
    return "\n".join([heading, *shown, *general, remedy])


def _pluralize(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def find_contradictions(records: Iterable[Record]) -> list[str]:
    """Describe pairs of the same two images of a prompt with opposite choices, and images labelled good and bad."""
    seen: dict[tuple[Any, ...], tuple[float, str]] = {}
    found = []
    for record in records:
        if isinstance(record, Pair) and record.is_tie:
            continue
        names = tuple(picture.content_hash for picture in record.pictures)
        if isinstance(record, Pair):
            says = record.label if names == tuple(sorted(names)) else 1 - record.label
        else:
            says = float(record.good)
        key = (normalize_prompt(record.prompt), *sorted(names))
        before, name = seen.setdefault(key, (says, record.name))
        if before != says:
            found.append(f"{record.name} contradicts {name}")
    return found


def describe_contradictions(records: Iterable[Record]) -> str:
    """A sentence on what contradicts itself; "" where nothing does."""
    found = find_contradictions(records)
    if not found:
        return ""
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f"The same images are judged both ways, and both are learned from: {'; '.join(found[:3])}{more}."


def describe_records(records: Iterable[Record]) -> str:
    """Describe records for people: “120 pairs (4 ties) of 40 prompts”."""
    records = list(records)
    pairs = [record for record in records if isinstance(record, Pair)]
    ties = sum(pair.is_tie for pair in pairs)
    singles = len(records) - len(pairs)
    counts = []
    if pairs:
        counts.append(
            f"{len(pairs)} {_pluralize('pair', len(pairs))}"
            + (f" ({ties} {_pluralize('tie', ties)})" if ties else "")
        )
    if singles:
        counts.append(f"{singles} labelled {_pluralize('picture', singles)}")
    prompts = len({normalize_prompt(record.prompt) for record in records})
    return f"{' and '.join(counts) or 'nothing'} of {prompts} {_pluralize('prompt', prompts)}"
