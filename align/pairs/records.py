"""Preference records: pairs and single judgements, what makes them valid, how some are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from backbone.io.console import UserError
from backbone.io.files import content_hash
from backbone.media.decode import BadPicture
from backbone.media.pictures import Picture

SAMPLES = "samples.json"


RANKING = "ranking.jsonl"


SCORES = "scores.json"


PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt. `label` is the probability that the first is better: 1, 0, or ½ for a tie."""

    prompt: str
    first: Picture
    second: Picture
    label: float
    name: str  # how a message calls it: “row 12 of pairs.parquet”
    user: str = ""
    both_bad: bool = False  # a tie in which neither is wanted

    @property
    def pictures(self) -> tuple[Picture, Picture]:
        """Both."""
        return self.first, self.second

    @property
    def is_tie(self) -> bool:
        """Whether neither was preferred."""
        return self.label == 0.5

    @property
    def ordered(self) -> Pair:
        """The same pair with the better picture first; a tie as it is."""
        if self.label >= 0.5:
            return self
        return replace(self, first=self.second, second=self.first, label=1 - self.label)


@dataclass(frozen=True)
class Single:
    """One picture of a prompt that was judged by itself."""

    prompt: str
    picture: Picture
    good: bool
    name: str
    user: str = ""

    @property
    def pictures(self) -> tuple[Picture]:
        """The picture."""
        return (self.picture,)


Record: TypeAlias = Pair | Single


@dataclass
class Preferences:
    """What a source holds: records in its order, and what is wrong with it so far, a sentence each."""

    source: str
    pairs: list[Pair] = field(default_factory=list)
    singles: list[Single] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: int = 0  # rows without a label, skipped pairs
    provenance: dict[str, Any] = field(
        default_factory=dict
    )  # what a folder of `align sample` says of its model

    @property
    def records(self) -> list[Record]:
        """Pairs, then single pictures."""
        return [*self.pairs, *self.singles]


def check_preferences(found: Preferences, *, skip_bad: bool = False) -> Preferences:
    """Opens every picture; one `UserError` lists all that is wrong, a line each.

    With `skip_bad` the bad records are left out instead, and only an empty or useless rest is an error.
    """
    problems = list(found.problems)
    good: list[Record] = []
    for record in found.records:
        reasons = list(_find_problems(record))
        problems += [f"{record.name} {reason}" for reason in reasons]
        if not reasons:
            good.append(record)
    kept = replace(
        found,
        pairs=[record for record in good if isinstance(record, Pair)],
        singles=[record for record in good if isinstance(record, Single)],
        problems=problems,
    )
    whole = list(_find_general_problems(kept))
    if whole or (problems and not skip_bad):
        raise UserError(_format_problems(found, problems, whole))
    return kept


def refuse_another_model(found: Preferences, model: str, fingerprint: str) -> None:
    """`UserError` when a pairs folder was drawn by other weights than those that are to be trained."""
    made = found.provenance.get("fingerprint")
    if made is not None and made != fingerprint:
        raise UserError(
            f"{found.source} was drawn by {found.provenance.get('model')} with other weights than {model} has. Train "
            "that model, or pass --any-model to learn from another model's pictures."
        )


def split_held_out(
    records: Sequence[Record], *, share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records; no prompt is in both. About `share` of the prompts are held out.

    A prompt's side depends on its words and the seed alone, so more records of other prompts do not move it. At
    least one prompt is held out where there are two and the share is not 0.
    """
    prompts = {normalize_prompt(record.prompt) for record in records}
    drawn = {prompt: int(content_hash(f"{seed}/{prompt}".encode())[:13], 16) / 16**13 for prompt in prompts}
    out = {prompt for prompt, number in drawn.items() if number < share}
    if share and len(prompts) > 1:
        if not out:
            out = {min(drawn, key=lambda prompt: drawn[prompt])}
        if len(out) == len(prompts):
            out -= {max(drawn, key=lambda prompt: drawn[prompt])}
    elif len(prompts) < 2:
        out = set()
    return (
        [record for record in records if normalize_prompt(record.prompt) not in out],
        [record for record in records if normalize_prompt(record.prompt) in out],
    )


def to_singles(found: Preferences) -> list[Single]:
    """The same as judged single pictures: winners good, losers bad, both of a “both bad” bad; ties say nothing."""
    singles = list(found.singles)
    for pair in found.pairs:
        if pair.is_tie and not pair.both_bad:
            continue
        better = pair.ordered
        singles += [
            Single(pair.prompt, better.first, not pair.both_bad, pair.name, pair.user),
            Single(pair.prompt, better.second, False, pair.name, pair.user),
        ]
    return singles


def normalize_prompt(prompt: str) -> str:
    """A prompt without what does not make it another one: case, spaces, a full stop at the end."""
    return " ".join(prompt.lower().split()).rstrip(" .")


def _find_problems(record: Record) -> Iterator[str]:
    if not record.prompt.strip():
        yield "has no prompt"
    sizes = []
    for picture in record.pictures:
        try:
            sizes.append(picture.open(at_least=64).size)
        except BadPicture as error:
            yield f"names a picture that {error.reason} ({error.name})"
        except OSError as error:
            yield f"names a picture that cannot be read ({error})"
        except UserError as error:
            yield f"has no usable picture ({error})"
    if len(sizes) == 2 and not _is_same_size(*sizes):
        (width, height), (other_width, other_height) = sizes
        yield f"has pictures of different sizes, {width} × {height} and {other_width} × {other_height}"
    if isinstance(record, Pair) and len(sizes) == 2 and record.first.path == record.second.path:
        yield "has the same picture twice"


def _is_same_size(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are one, up to what a decoder rounds when it opens a JPEG reduced."""
    return all(abs(a - b) <= 1 for a, b in zip(one, other, strict=True))


def _find_general_problems(found: Preferences) -> Iterator[str]:
    if not found.records:
        waiting = f" ({found.skipped} are not labelled yet)" if found.skipped else ""
        yield f"{found.source} holds no usable pair{waiting}. Choose with `align label`, or rank with `align rank`."
    elif found.pairs and not found.singles and all(pair.is_tie for pair in found.pairs):
        yield f"All {len(found.pairs)} pairs of {found.source} are ties, so nothing is preferred. Choose in some."
    elif found.singles and not found.pairs and len({single.good for single in found.singles}) == 1:
        said, other = ("good", "bad") if found.singles[0].good else ("bad", "good")
        yield f"Every picture of {found.source} is labelled {said}, so nothing is preferred. Label some {other}."


def _format_problems(found: Preferences, problems: Sequence[str], whole: Sequence[str]) -> str:
    if not problems:
        return "\n".join(whole)
    count = len(found.records)
    shown = [f"  {problem}" for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        shown.append(f"  and {len(problems) - PROBLEMS_SHOWN} more")
    much = f"{len(problems)} {_pluralize('problem', len(problems))} in {count} {_pluralize('record', count)}"
    heading = f"{found.source} has {much}:"
    remedy = "Repair or remove them, or leave them out with --skip-bad."
    return "\n".join([heading, *shown, *whole, remedy])


def _pluralize(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def hash_pair(pair: Pair) -> str:
    """A pair by its contents: prompt and both pictures, in their order."""
    parts = [pair.prompt, *(content_hash(picture.read()) for picture in pair.pictures)]
    return content_hash("\n".join(parts).encode())


def describe_records(records: Iterable[Record]) -> str:
    """“120 pairs (4 ties) of 40 prompts”, for people."""
    records = list(records)
    pairs = [record for record in records if isinstance(record, Pair)]
    ties = sum(pair.is_tie for pair in pairs)
    singles = len(records) - len(pairs)
    said = []
    if pairs:
        said.append(
            f"{len(pairs)} {_pluralize('pair', len(pairs))}"
            + (f" ({ties} {_pluralize('tie', ties)})" if ties else "")
        )
    if singles:
        said.append(f"{singles} judged {_pluralize('picture', singles)}")
    prompts = len({normalize_prompt(record.prompt) for record in records})
    return f"{' and '.join(said) or 'nothing'} of {prompts} {_pluralize('prompt', prompts)}"
