"""Where each target of an edit may differ from the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.diffusion.transfer import send
from backbone.io.console import UserError
from edit.attention.alignment import Alignment, Word, token_mask
from edit.attention.control import Maps
from edit.inversion.inversion import Inversion
from edit.masks import compute_difference_maps, load_latent_mask
from edit.methods.prompt_to_prompt.settings import AUTO, ReplaceSettings
from edit.methods.prompt_to_prompt.weigh import remove_phrase

EVERYWHERE = frozenset([  # words that say how a picture is made, and so belong to no region of it
    "style", "art", "painting", "drawing", "sketch", "sketched", "watercolor", "watercolour", "photo", "photograph",
    "picture", "image", "render", "rendering", "illustration", "cartoon", "anime", "comic", "poster", "neon", "pixel",
    "oil", "pencil", "charcoal", "ink", "pastel", "mosaic", "sculpture",
])  # fmt: skip


COLOURS = frozenset([  # words that change how a thing looks and leave its shape
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey", "gray",
    "golden", "gold", "silver", "turquoise", "teal", "cyan", "magenta", "beige", "maroon", "crimson", "scarlet", "navy",
    "dark", "light", "pale", "bright",
])  # fmt: skip


ARTICLES = frozenset(["a", "an"])  # which change with the word after them
LINKS = ARTICLES | {"of", "in", "as", "the"}  # which change with words of how a picture is made


PLACES = frozenset([  # words that begin where something is
    "in", "on", "at", "under", "inside", "outside", "near", "by", "behind", "before", "above", "below", "over",
    "beside",
])  # fmt: skip


MOST = 0.5  # share of a picture: an edit that differs in more changes the whole picture
MUCH = 0.3  # the same for edits of the scene alone


class Regions:
    """Where each of N targets may differ from the source.

    Three optional criteria: the user's mask; where predictions under the two prompts differ
    (`compute_difference_maps`); and where attention goes to the words to blend and to keep, in the source and in the
    target.

    columns    [1 + N, 2·N + K, T]: the tokens whose attention maps are read, in the source's prompt and each target's.
               The first 2·N rows are the words to blend and to keep of each target, then K heat maps; None for none
    has_words  [2·N], which of the first rows have words
    """

    def __init__(
        self, inversion: Inversion, alignments: Sequence[Alignment], settings: ReplaceSettings
    ) -> None:
        self.inversion, self.alignments, self.settings = inversion, alignments, settings
        self.count = len(alignments)
        self.size = (inversion.states.shape[-2], inversion.states.shape[-1])
        self.device = inversion.model.device
        self.user_mask = load_latent_mask(settings.mask, inversion.encoded)
        self.columns = self._make_columns()
        self.heat: Tensor | None = None  # [1 + N, K, h, w]
        nothing = torch.zeros(2 * self.count, dtype=torch.bool)
        self.has_words = nothing if self.columns is None else self.columns.any(-1).any(0)[: 2 * self.count]
        # Pairs of prompts to compare, and how differently each of P is predicted [P, H, W], by the target's number
        self.pairs = self._find_pairs()
        self.differences: dict[int, Tensor] = {}
        moved = inversion.layout.find_moved(self.size)
        self.moved = None if moved is None else send(moved, self.device)

    def compare_predictions(self, first: int) -> int:
        """Find where predictions under the prompts differ, from step `first` on. Returns the NFE."""
        if not self.pairs or first == self.inversion.steps:
            return 0
        every_pair = [pair for pairs in self.pairs.values() for pair in pairs]
        maps, nfe = compute_difference_maps(self.inversion, every_pair, first=first)
        self.differences = dict(zip(self.pairs, maps.split(list(map(len, self.pairs.values()))), strict=True))
        return nfe

    def find_whole(self) -> frozenset[int]:
        """Find the numbers of the targets that change in all of the picture, as with another scene.

        This synchronises with a GPU; empty where no attention depends on it.
        """
        idle = self.settings.place_self_attention in (None, self.settings.self_attention)
        if idle or not self.differences:
            return frozenset()
        flags = torch.stack([self._is_whole(n) for n in self.differences]).cpu()
        return frozenset(n for n, is_whole in zip(self.differences, flags, strict=True) if is_whole)

    def find_freed(self) -> list[Tensor] | None:
        """Find where the source's control maps do not apply to each target [N, H, W], 0 or 1: what is added or removed.

        Its outlines differ from the source's. None where no target adds or removes anything.
        """
        adds = {
            n
            for n, alignment in enumerate(self.alignments)
            if n in self.differences and only_adds_or_removes(alignment)
        }
        nowhere = torch.zeros(self.size, device=self.device)
        masks = [
            ((self.differences[n][0] > self.settings.threshold) & ~self._is_whole(n)).float()
            if n in adds
            else nowhere
            for n in range(self.count)
        ]
        return masks if adds else None

    def _is_whole(self, n: int) -> Tensor:
        """Whether predictions for a target differ in most of the picture [], or in much of it for another scene.

        A threshold relative to the maximum then does not separate what changes from what does not.
        """
        shares = (self.differences[n] > self.settings.threshold).float().mean((-2, -1))
        least = MUCH if changes_only_places(self.alignments[n]) else MOST
        return (shares[0] > least) | (shares > MOST).any()

    def masks(self, maps: Maps | None) -> Tensor | None:
        """Where each target may differ [N, H, W], 0 or 1; None if everywhere.

        While named words have no `maps` yet, only the user's mask counts for targets with such words.
        """
        waiting = self.has_words.view(-1, 2).any(1) & (maps is None)
        if (not self.has_words.any() and not self.differences) or bool(waiting.all()):
            return None if self.user_mask is None else self.user_mask.expand(self.count, -1, -1)
        read = None if maps is None else maps.read()
        everywhere = torch.ones(self.size, device=self.device) if self.user_mask is None else self.user_mask
        return torch.stack(
            [everywhere if waiting[n] else self._make_mask(n, read) for n in range(self.count)]
        )

    def _make_mask(self, n: int, read: Tensor | None) -> Tensor:
        threshold = self.settings.threshold
        blends, keeps = (bool(self.has_words[2 * n + k]) for k in (0, 1))
        mask = torch.zeros(self.size, device=self.device, dtype=torch.bool)
        # Where predictions differ or a word to blend is, in either image; everywhere without both
        if n in self.differences:
            mask = mask | (self.differences[n] > threshold).any(0) | self._is_whole(n)
            if self.moved is not None:
                mask = mask | (self.moved > 0)
        if blends:
            assert read is not None
            grown = F.max_pool2d(read[[0, 1 + n], 2 * n : 2 * n + 1], 3, stride=1, padding=1)
            mask = mask | threshold_maps(grown, self.size, threshold).any(0)
        if n not in self.differences and not blends:
            mask = ~mask
        # Not where a word to keep is
        if keeps:
            assert read is not None
            protected = threshold_maps(read[[0, 1 + n], 2 * n + 1 : 2 * n + 2], self.size, threshold)
            mask = mask & ~protected.any(0)
        # And inside the user's mask
        return mask.float() if self.user_mask is None else mask * self.user_mask

    def read_heat(self, maps: Maps, needed: Sequence[bool]) -> None:
        """Read the heat maps after a step, for the targets that still need the source's row (`needed`).

        The others keep theirs, so that a target's maps do not depend on the other targets.
        """
        if not self.settings.heatmaps:
            return
        read = maps.read()[:, 2 * self.count :]
        if self.heat is not None:
            read = torch.stack(
                [read[0], *(read[1 + n] if needed[n] else self.heat[1 + n] for n in range(self.count))]
            )
        self.heat = read

    def heatmaps(self) -> dict[str, Tensor]:
        """Word → its latest map [1 + N, h, w]."""
        if self.heat is None:
            return {}
        return {phrase: self.heat[:, k].cpu() for k, phrase in enumerate(self.settings.heatmaps)}

    def _make_columns(self) -> Tensor | None:
        settings, length = self.settings, self.alignments[0].source.length
        columns = torch.zeros(1 + self.count, 2 * self.count + len(settings.heatmaps), length)
        for n, alignment in enumerate(self.alignments):
            named = (find_blended_words(alignment, settings.blend), _find_words(alignment, settings.keep))
            for row, (source, target) in enumerate(named, start=2 * n):
                columns[0, row], columns[1 + n, row] = token_mask(source, length), token_mask(target, length)
        prompts = [self.alignments[0].source, *(alignment.target for alignment in self.alignments)]
        for row, phrase in enumerate(settings.heatmaps, start=2 * self.count):
            for number, prompt in enumerate(prompts):
                columns[number, row] = token_mask(prompt.find(phrase), length)
        return columns if columns.any() else None

    def _find_pairs(self) -> dict[int, tuple[tuple[str, str], ...]]:
        if AUTO not in self.settings.blend:
            return {}
        pairs = {
            n: choose_compared_prompts(alignment, self.settings.weights)
            for n, alignment in enumerate(self.alignments)
        }
        return {n: compared for n, compared in pairs.items() if compared}


def threshold_maps(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Where maps [B, 1, h, w] exceed `threshold` times their greatest value [B, H, W]."""
    large = F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]
    greatest = large.amax((1, 2), keepdim=True)
    return (large > threshold * greatest) & (greatest > 0)


def find_blended_words(alignment: Alignment, phrases: Sequence[str]) -> tuple[list[Word], list[Word]]:
    """The named words of the source and the target, in whose region the edit may change the image."""
    return _find_words(alignment, [phrase for phrase in phrases if phrase != AUTO])


def refuse_ambiguous_auto(words: Sequence[str], alignments: Sequence[Alignment]) -> None:
    """`UserError` for `auto` if it is also a word of a prompt."""
    prompts = [prompt for alignment in alignments for prompt in (alignment.source, alignment.target)]
    if AUTO in words and any(prompt.find(AUTO) for prompt in prompts):
        raise UserError(
            f"--blend {AUTO} is wherever the prompts differ, and “{AUTO}” is a word of a prompt too. Leave --blend out "
            "for the former; for the latter name the word together with a neighbour."
        )


def choose_compared_prompts(
    alignment: Alignment, weights: Mapping[str, float]
) -> tuple[tuple[str, str], ...]:
    """Pairs of prompts that differ in what the edit changes: the source and the target; and where words that both have
    are weighted, the target without these and the target. The latter alone for prompts that say the same, and none
    where a changed word says how the whole image is made."""
    if find_changed_words(alignment) & EVERYWHERE:
        return ()
    source, target = alignment.source.text, alignment.target.text
    # Words that are added or replaced lie where the source and the target are predicted differently
    changed = {word for span in alignment.changes() for word in span.target}
    kept_phrases = [
        phrase
        for phrase, weight in weights.items()
        if weight != 1 and not changed.issuperset(alignment.target.find(phrase))
    ]
    remaining = target
    for phrase in kept_phrases:
        remaining = remove_phrase(remaining, phrase)
    says_same = not any(alignment.changes())
    words = () if says_same and kept_phrases else ((source, target),)
    return (*words, (remaining, target)) if remaining != target else words


def changes_only_colours(alignment: Alignment, weights: Mapping[str, float] = MappingProxyType({})) -> bool:
    """Whether only colours differ; for equal prompts, whether only colours have `weights`."""
    words = find_changed_words(alignment) - ARTICLES
    if not words:
        words = {word.text for phrase in weights for word in alignment.target.find(phrase)}
    return bool(words) and words <= COLOURS


def changes_only_styles(alignment: Alignment) -> bool:
    """Whether only words of style differ, which say how a picture is made."""
    words = find_changed_words(alignment)
    return bool(words & EVERYWHERE) and words <= EVERYWHERE | LINKS


def only_adds_or_removes(alignment: Alignment) -> bool:
    """Whether words are only added or removed, not all of them colours."""
    added = all(span.change in ("added", "removed") for span in alignment.changes())
    return added and bool(find_changed_words(alignment) - COLOURS - ARTICLES)


def changes_only_places(alignment: Alignment) -> bool:
    """Whether only the scene differs: “at night” and “in the city”.

    “in a park” and “in the snow” are not certain, since clothes are described the same way.
    """
    are_places: list[bool] = []
    in_place = False  # whether the span before is a changed place
    for span in alignment.spans:
        differs = span.change != "kept"
        begins = [words[0].text.lower() for words in (span.source, span.target) if words]
        in_place = differs and (in_place or (span.change == "replaced" and PLACES.issuperset(begins)))
        are_places += [in_place] if differs else []
    return bool(are_places) and all(are_places)


def find_changed_words(alignment: Alignment) -> set[str]:
    """The words that differ, of both prompts, in lower case."""
    return {word.text.lower() for span in alignment.changes() for word in (*span.source, *span.target)}


def _find_words(alignment: Alignment, phrases: Sequence[str]) -> tuple[list[Word], list[Word]]:
    """The words that phrases name in the source and the target."""
    pairs = [alignment.find_both(phrase) for phrase in phrases]
    return [word for old, _ in pairs for word in old], [word for _, new in pairs for word in new]
