"""Preference records: pairs and single labelled images, their validation, and the split that holds some out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL.Image import Image

from backbone.io.console import UserError, format_count, on_one_line
from backbone.io.files import content_hash
from backbone.media.sources.decode import BadImageError
from backbone.media.sources.record import ImageRecord

if TYPE_CHECKING:  # it imports torch
    from backbone.models.model import Backbone

SAMPLES = "samples.json"
RANKING = "ranking.jsonl"
SCORES = "scores.json"
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class SamplesRecord:
    """The part of `samples.json` that is read."""

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
    both_bad: bool = False  # a tie in which both are bad

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
    bad: int = 0  # records that cannot be used and were left out
    columns: dict[str, None] = field(default_factory=dict)  # columns of rows that are not read
    # The model that sampled a folder of `align sample`
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> list[Record]:
        """Pairs, then single images."""
        return [*self.pairs, *self.singles]

    def describe_left_out(self, *, by_pairs: bool, ties: bool) -> str:
        """The records that a loss does not learn from, in the words of `LeftOut.describe`."""
        tied = sum(pair.is_tie and (by_pairs or not pair.both_bad) for pair in self.pairs)
        return LeftOut(self.bad, self.skipped, tied, len(self.singles)).describe(
            self.source, by_pairs=by_pairs, ties=ties
        )


@dataclass(frozen=True)
class LeftOut:
    """Numbers of a source's records of the kinds that some losses, or all, leave out.

    bad         records that cannot be used     unlabelled  records without a label
    ties        pairs without a preferred side; for single images, pairs that are bad on both sides do not count
    singles     single images
    """

    bad: int
    unlabelled: int
    ties: int
    singles: int

    def describe(self, source: str, *, by_pairs: bool, ties: bool) -> str:
        """A sentence on the records that a loss of pairs or of single images leaves out; "" if it learns from all.

        `ties` says whether a loss of pairs learns from them.
        """
        counts = self.count(by_pairs=by_pairs, ties=ties)
        return f"Left out of {source}: {counts}." if counts else ""

    def count(self, *, by_pairs: bool, ties: bool) -> str:
        """The numbers of records that such a loss leaves out, as “2 records without a label and 1 tie”; or ""."""
        counts = [
            f"{format_count(self.bad, 'record')} that cannot be used" if self.bad else "",
            f"{format_count(self.unlabelled, 'record')} without a label" if self.unlabelled else "",
            format_count(self.ties, "tie") if self.ties and not (by_pairs and ties) else "",
            f"{format_count(self.singles, 'labelled picture')} beside the pairs, which --loss kto learns from"
            if self.singles and by_pairs
            else "",
        ]
        parts = list(filter(None, counts))
        return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


class Records(list[Record]):
    """Records with the interface of `align.pairs.prepared.PreparedRecords`, for training."""

    def split(self, *, share: float, seed: int) -> tuple[Records, Records]:
        """Training and held-out records, by `split_held_out`."""
        train, out = split_held_out(self, share=share, seed=seed)
        return Records(train), Records(out)

    def describe(self) -> str:
        """As `describe_records` says."""
        return describe_records(self)

    def texts(self) -> Iterator[str]:
        """The records' prompts, in order."""
        return (record.prompt for record in self)

    def has_ties(self) -> bool:
        """Whether any record is a tie."""
        return any(isinstance(record, Pair) and record.is_tie for record in self)

    def empty(self) -> Records:
        """An empty selection."""
        return Records()

    def fingerprint(self) -> str:
        """The hash of all images, in their order."""
        images = "".join(picture.content_hash for record in self for picture in record.pictures)
        return content_hash(images.encode())

    def choices(self) -> str:
        """The hash of prompts and labels, in their order."""
        facts = (
            (record.prompt, record.label, record.both_bad)
            if isinstance(record, Pair)
            else (record.prompt, record.good)
            for record in self
        )
        return content_hash(repr(list(facts)).encode())


def check_preferences(preferences: Preferences, *, skip_bad: bool = False) -> Preferences:
    """Open every image; raises one `UserError` that lists all problems, a line each.

    With `skip_bad` bad records are dropped instead, and it is an error only if nothing useful remains.
    """
    problems = list(preferences.problems)
    good: list[Record] = []
    for record in preferences.records:
        _, record_problems = open_record(record, at_least=64)
        problems += [f"{record.name} {problem}" for problem in record_problems]
        if not record_problems:
            good.append(record)
    usable = replace(
        preferences,
        pairs=[record for record in good if isinstance(record, Pair)],
        singles=[record for record in good if isinstance(record, Single)],
        problems=problems,
        bad=len(preferences.problems) + len(preferences.records) - len(good),
    )
    general = list(_find_general_problems(usable))
    if general or (problems and not skip_bad):
        raise UserError(_format_problems(preferences, problems, general))
    return usable


def is_of_another_model(preferences: Preferences, model: Backbone) -> bool:
    """Whether a pairs folder was sampled from other weights than this model's."""
    drawn_by = preferences.provenance.get("fingerprint")
    return drawn_by is not None and not model.has_fingerprint(drawn_by)


def refuse_another_model(preferences: Preferences, model: Backbone) -> None:
    """Raise `UserError` when a pairs folder was sampled from other weights than the model's."""
    if is_of_another_model(preferences, model):
        raise UserError(
            f"{preferences.source} was drawn by {preferences.provenance.get('model')} "
            f"with other weights than {model.location.name} has. "
            "Train that model, or pass --any-model to learn from another model's pictures."
        )


def split_held_out(
    records: Sequence[Record], *, share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split into (training, held-out) records by prompt; about `share` of the prompts are held out.

    A prompt's side is a hash of its words and the seed, so other prompts do not move it. At least one prompt is held
    out, and one kept, where there are two and the share is not 0. If there are single images of both classes, both are
    learned from, even if that leaves none held out.
    """
    classes = [
        {
            normalize_prompt(record.prompt)
            for record in records
            if isinstance(record, Single) and record.good is good
        }
        for good in (False, True)
    ]
    prompts = {normalize_prompt(record.prompt) for record in records}
    held_out = held_out_prompts(prompts, classes, share=share, seed=seed)
    return (
        [record for record in records if normalize_prompt(record.prompt) not in held_out],
        [record for record in records if normalize_prompt(record.prompt) in held_out],
    )


def held_out_prompts(
    prompts: Collection[str], classes: Sequence[Set[str]], *, share: float, seed: int
) -> set[str]:
    """The normalised prompts that are held out; `classes` are those of bad and of good single images."""
    uniform = {prompt: int(content_hash(f"{seed}/{prompt}".encode())[:13], 16) / 16**13 for prompt in prompts}
    held_out = {prompt for prompt, number in uniform.items() if number < share}
    if share and len(prompts) > 1:
        if not held_out:
            held_out = {min(uniform, key=lambda prompt: uniform[prompt])}
        if len(held_out) == len(prompts):
            held_out -= {max(uniform, key=lambda prompt: uniform[prompt])}
    elif len(prompts) < 2:
        held_out = set()
    # If all single images of a class are held out, its prompt nearest to the threshold is put back
    for of_class in filter(None, classes):
        if of_class <= held_out:
            held_out -= {max(of_class, key=lambda prompt: uniform[prompt])}
    return held_out


def select_records(preferences: Preferences, *, by_pairs: bool, ties: bool) -> list[Record]:
    """The records to learn from: pairs, with or without ties, or single images (`to_singles`)."""
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


def record_key(prompt: str, hashes: Sequence[str]) -> str:
    """A record's key: the hash of its prompt and its pictures' hashes, the better one's first."""
    return content_hash("\n".join([normalize_prompt(prompt), *hashes]).encode())


def normalize_prompt(prompt: str) -> str:
    """Lower-case a prompt and strip extra spaces and a final full stop, to compare prompts."""
    return " ".join(prompt.lower().split()).rstrip(" .")


def open_record(record: Record, *, at_least: int) -> tuple[list[Image], list[str]]:
    """A record's images, decoded for a side of `at_least` pixels, and its problems."""
    problems = [] if record.prompt.strip() else ["has no prompt"]
    images: list[Image] = []
    for picture in record.pictures:
        try:
            images.append(picture.open(at_least=at_least))
        except BadImageError as error:
            problems.append(f"names a picture that {error.reason} ({error.name})")
        except OSError as error:
            problems.append(f"names a picture that cannot be read ({error})")
        except UserError as error:
            problems.append(f"has no usable picture ({error})")
    if len(images) == 2:
        first, second = images
        if not _is_same_size(first.size, second.size):
            (width, height), (other_width, other_height) = first.size, second.size
            problems.append(
                f"has pictures of different sizes, {width} × {height} and {other_width} × {other_height}"
            )
        if first.size == second.size and first.tobytes() == second.tobytes():
            problems.append("has the same picture twice")
    return images, problems


def _is_same_size(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes are equal, up to the rounding of a JPEG that is decoded at a reduced size."""
    return all(abs(a - b) <= 1 for a, b in zip(first, second, strict=True))


def _find_general_problems(preferences: Preferences) -> Iterator[str]:
    pairs, singles = preferences.pairs, preferences.singles
    ties, good = sum(pair.is_tie for pair in pairs), sum(single.good for single in singles)
    yield from find_general_problems(
        preferences.source, len(pairs), ties, len(singles), good, waiting=preferences.skipped
    )


def find_general_problems(
    source: str, pairs: int, ties: int, singles: int, good: int, *, waiting: int = 0
) -> Iterator[str]:
    """Yield problems of the whole source: no records, only ties, or only one label."""
    if not pairs + singles:
        labelled = f" ({waiting} are not labelled yet)" if waiting else ""
        yield f"{source} holds no usable pair{labelled}. Choose with `align label`, or rank with `align rank`."
    elif not singles and ties == pairs:
        yield f"All {pairs} pairs of {source} are ties, so nothing is preferred. Choose in some."
    elif not pairs and good in (0, singles):
        label, opposite = ("good", "bad") if good else ("bad", "good")
        yield f"Every picture of {source} is labelled {label}, so nothing is preferred. Label some {opposite}."


def _format_problems(preferences: Preferences, problems: Sequence[str], general: Sequence[str]) -> str:
    if not problems:
        return "\n".join(general)
    rows = len(preferences.records) + len(preferences.problems)
    return format_problems(preferences.source, rows, problems, general)


def format_problems(
    source: str, count: int, problems: Sequence[str], general: Sequence[str] = (), *, total: int = 0
) -> str:
    """The problems of a source of `count` records, one per line; `total` may be more than are listed."""
    total = total or len(problems)
    lines = [f"  {on_one_line(problem)}" for problem in problems[:PROBLEMS_SHOWN]]
    if total > PROBLEMS_SHOWN:
        lines.append(f"  and {total - PROBLEMS_SHOWN} more")
    counts = f"{total} {_pluralize('problem', total)} in {count} {_pluralize('record', count)}"
    heading = f"{source} has {counts}:"
    remedy = "Repair or remove them, or leave them out with --skip-bad."
    return "\n".join([heading, *lines, *general, remedy])


def _pluralize(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def find_contradictions(records: Iterable[Record]) -> list[str]:
    """Describe pairs of the same two images of a prompt with opposite choices, and images labelled good and bad."""
    first_choices: dict[tuple[str, ...], tuple[float, str]] = {}
    contradictions = []
    for record in records:
        if isinstance(record, Pair) and record.is_tie:
            continue
        key, judgement = _judge(record)
        earlier, name = first_choices.setdefault(key, (judgement, record.name))
        if earlier != judgement:
            contradictions.append(f"{record.name} contradicts {name}")
    return contradictions


def _judge(record: Record) -> tuple[tuple[str, ...], float]:
    """(key, judgement) of a record: its prompt and sorted images, and whether the first of these is preferred."""
    names = tuple(picture.content_hash for picture in record.pictures)
    if isinstance(record, Pair):
        judgement = record.label if names == tuple(sorted(names)) else 1 - record.label
    else:
        judgement = float(record.good)
    return (normalize_prompt(record.prompt), *sorted(names)), judgement


def describe_repeats(records: Iterable[Record]) -> str:
    """A sentence on records that repeat the same person's choice between the same images; "" for none."""
    first_names: dict[tuple[object, ...], str] = {}
    repeats = []
    for record in records:
        first = first_names.setdefault((*_judge(record), record.user), record.name)
        if first != record.name:
            repeats.append(f"{record.name} says what {first} says")
    return _list_first("The same choice is there more than once and counts as often", repeats)


def describe_contradictions(records: Iterable[Record]) -> str:
    """A sentence on contradictions; "" where there are none."""
    contradictions = find_contradictions(records)
    return _list_first("The same images are judged both ways, and both are learned from", contradictions)


def _list_first(claim: str, items: Sequence[str]) -> str:
    """A claim with the first few items of it; "" where there are none."""
    others = f", and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{claim}: {'; '.join(items[:3])}{others}." if items else ""


def describe_doubts(records: Sequence[Record]) -> list[str]:
    """A sentence on contradicting choices, and one on repeated ones, if there are any."""
    return list(filter(None, (describe_contradictions(records), describe_repeats(records))))


def describe_shared_images(learn: Iterable[Record], out: Iterable[Record]) -> str:
    """A sentence on held-out records with an image that is learned from under another prompt; "" for none."""
    learned = {picture.content_hash for record in learn for picture in record.pictures}
    shared = [record for record in out if any(picture.content_hash in learned for picture in record.pictures)]
    if not shared:
        return ""
    return (
        f"{len(shared)} held-out {_pluralize('record', len(shared))} ({shared[0].name}"
        f"{' …' if shared[1:] else ''}) show images that are learned from too, under other prompts: what is measured "
        "on them is better than on new images."
    )


def describe_records(records: Iterable[Record]) -> str:
    """Describe records for people: “120 pairs (4 ties) of 40 prompts”."""
    records = list(records)
    pairs = [record for record in records if isinstance(record, Pair)]
    prompts = len({normalize_prompt(record.prompt) for record in records})
    ties = sum(pair.is_tie for pair in pairs)
    return describe_counts(len(pairs), ties, len(records) - len(pairs), prompts)


def describe_counts(pairs: int, ties: int, singles: int, prompts: int) -> str:
    """Like `describe_records`, from the numbers alone."""
    counts = []
    if pairs:
        counts.append(
            f"{pairs} {_pluralize('pair', pairs)}" + (f" ({ties} {_pluralize('tie', ties)})" if ties else "")
        )
    if singles:
        counts.append(f"{singles} labelled {_pluralize('picture', singles)}")
    return f"{' and '.join(counts) or 'nothing'} of {prompts} {_pluralize('prompt', prompts)}"
