"""A concept: what a run has learned, in files that all three commands read.

A concept owns tokens that people write, like `[V]`, and each stands for rare words of the model's tokenizer. `resolve_placeholder_tokens`
turns a person's prompt into the words that the model reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json, write_json

CONCEPT_FILE = "concept.json"
FORMAT = 1
PLACEHOLDER = re.compile(r"\[[^\[\]\s]+\]|<[^<>\s]+>")
CONSONANTS = "[bcdfghjklmnpqrstvwxz]{3,4}"
RARE = re.compile(rf"({CONSONANTS})</w>|▁({CONSONANTS})")  # as CLIP's and T5's tokenizers mark a whole word
RARE_WORD_POOL = 256  # a concept's words are drawn from this many of the tokenizer's rarest


@dataclass(frozen=True)
class Concept:
    """What `concept.json` says. `tokens` maps what people write to what the model reads.

    Its files, each empty where the method has none: `weights`, an adapter; `words`, rows of a token's own; `changed`,
    weights of the denoiser that replace the base's.
    """

    kind: str
    model: str
    fingerprint: str
    tokens: dict[str, str]
    class_noun: str
    weights: str = ""
    words: str = ""
    changed: str = ""
    folder: Path = Path()

    @property
    def weights_path(self) -> Path:
        """The adapter's file."""
        return self.folder / self.weights

    def write(self, folder: Path) -> None:
        """Writes `concept.json` into a run folder."""
        fields = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(folder / CONCEPT_FILE, {"format": FORMAT, **fields})


def read_concept(folder: str | Path) -> Concept:
    """The concept of a run folder; `UserError` when there is none."""
    folder = Path(folder)
    path = folder / CONCEPT_FILE if folder.is_dir() else folder
    if not path.is_file() or path.name != CONCEPT_FILE:
        raise UserError(
            f"{folder} holds no concept ({CONCEPT_FILE} is missing). Name a run folder of `customize train`."
        )
    said = read_json(path)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise UserError(f"{path} is not a concept that this version reads. Train it again, or update Limner.")
    try:
        return Concept(**{key: value for key, value in said.items() if key != "format"}, folder=path.parent)
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}). Train the concept again.") from error


def resolve_placeholder_tokens(prompt: str, concepts: Sequence[Concept], *, runs: Path = Path("runs")) -> str:
    """The prompt in the model's words: every token that a concept owns replaced by its rare words.

    Raises `UserError` for a token that no given concept owns, naming the newest run that has it.
    """
    owned = {token: words for concept in concepts for token, words in concept.tokens.items()}
    for token, words in sorted(owned.items(), key=lambda pair: -len(pair[0])):
        prompt = prompt.replace(token, words)
    own = {
        word for words in owned.values() for word in words.split()
    }  # a learned word is called like its token
    known = {token: run for run, concept in list_concept_runs(runs) for token in concept.tokens}
    strangers = [*PLACEHOLDER.findall(prompt), *(token for token in known if _mentions(prompt, token))]
    for token in [token for token in strangers if token not in own]:
        remedy = f"Add --concept {known[token]}." if token in known else "Train it first, or leave it out."
        raise UserError(f"No given concept owns the token {token} in the prompt “{prompt}”. {remedy}")
    return prompt


def list_concept_runs(runs: Path) -> list[tuple[Path, Concept]]:
    """The finished runs in a folder, oldest first."""
    found = []
    for path in sorted(runs.glob(f"*/{CONCEPT_FILE}"), key=lambda path: path.stat().st_mtime):
        try:
            found.append((path.parent, read_concept(path.parent)))
        except UserError:
            continue
    return found


def choose_rare_words(
    vocabulary: Mapping[str, int], key: str, *, count: int = 1, taken: Iterable[str] = ()
) -> str:
    """Words that mean nothing to a model: single tokens of three or four consonants, among the tokenizer's rarest.

    `key` (the contents of the pictures, say) chooses among them, so that two concepts seldom share one. Byte-pair
    vocabularies are ordered by frequency, so the rarest are those with the highest ids.
    """
    candidates = [token for token in vocabulary if RARE.fullmatch(token)]
    candidates.sort(key=lambda token: -vocabulary[token])
    words = [token.removesuffix("</w>").removeprefix("▁") for token in candidates[:RARE_WORD_POOL]]
    words = [word for word in words if word not in set(taken)]
    if len(words) < count:
        raise UserError("This model's tokenizer has no rare words of its own. Give some with --token_words.")
    words.sort(key=lambda word: content_hash(f"{key}/{word}".encode()))
    return " ".join(words[:count])


def check_token(token: str, vocabulary: Mapping[str, int]) -> None:
    """Refuses a token that cannot be told from ordinary words of a prompt."""
    if not token.strip() or " " in token.strip():
        raise UserError(f"The token “{token}” must be one word, like [V] or <dog>.")
    whole = (f"{token.lower()}</w>", f"▁{token.lower()}")
    if token.isalpha() and any(word in vocabulary for word in whole) and not RARE.fullmatch(whole[0]):
        raise UserError(f"The token “{token}” is an ordinary word for this model. Choose one like [{token}].")


def _mentions(prompt: str, token: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", prompt) is not None


def summarize_concepts(concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """What a record of a run says about its concepts."""
    return [
        {"folder": str(concept.folder), "tokens": concept.tokens, "class": concept.class_noun}
        for concept in concepts
    ]
