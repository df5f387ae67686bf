"""A concept: what a training run learned, as a run folder that all three commands load.

A concept owns placeholder tokens like `[V]`. Each stands for rare words of the model's tokenizer, by which
`resolve_placeholder_tokens` replaces it wherever it is a whole word of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify, notify_once, quote, quote_text
from backbone.io.files import content_hash, explain_unread_format, read_header, read_json, write_json
from backbone.io.records import read_as, resolve_inside
from backbone.io.run_folder import (
    CONCEPT_FILE,
    CONDITION_FILE,
    DRAWN_RECORD,
    LORA_WEIGHTS,
    PICTURES,
    no_run_folder,
)
from backbone.io.written import written_path

BEST = "best"  # in a run folder: the checkpoint with the best evaluation
MOTION = "motion"  # the kind of a concept learned from clips: how things move
EDITS = "edits"  # the kind of a concept learned from pairs: image and instruction to edited image
# The embedded adapter with which `moji` follows instructions
OWN_EDITOR = Path(__file__).parents[1] / "moji-edit"
FORMAT = 1
# Brackets of tokens, and their counterparts on keyboards of other scripts
LIKE_BRACKETS = (("[［【〔", "]］】〕"), ("<＜〈《‹", ">＞〉》›"))
PLACEHOLDER = re.compile(r"\[[^\[\]\s]+\]|<[^<>\s]+>")
SWITCH = re.compile(r"\[[^\[\]]*(?::\s*\d*\.?\d+|\|[^\[\]]*)\]")  # webui's [red:blue:0.5], [red|blue]
# Letters of scripts without spaces between words (Thai to Khmer, Chinese, Japanese) or with joined endings (Korean)
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff"
LETTER = rf"[^\W{UNSPACED}]"
FOREIGN_SYNTAX = {  # of other programs' prompts: (red:1.3), ((red)), red++, (red hat)1.2; --w 512; {red|blue} …
    re.compile(
        # Each alternative can begin at few places, so that a long text without spaces is read in one pass
        r"\([^()]{1,999}?:\s*\d{0,9}\.?\d{1,9}\)|(?<!\()\({2,9}[^()]{1,999}\){2}|(?<!\w)\w{1,99}\+{2,}"
        r"|\([^()]{1,999}\)(?:\++|--+|\d{0,9}\.\d+)|(?<!\w)\w{0,99} ?::-?\d{0,9}\.?\d+"
    ): "weights of words",
    re.compile(r"(?<!\S)--(?:n|w|h|d|l|s|ar|seed|steps|neg)\s+\S+"): "options",
    SWITCH: "words that change on the way, or by turns,",
    re.compile(r"\{[^{}|]*\|[^{}]*\}"): "alternatives",
    re.compile(r"(?<!\S)BREAK(?![^\s,])|(?<=[a-z,.)] )AND(?= [a-z(])|\|\|\|"): "joints of prompts",
    re.compile(r"(?<!\w)__[\w/*-]{0,99}?[A-Za-z*][\w/*-]{0,99}?__(?!\w)"): "lists of words to draw from",
    re.compile(r"(?<!\w)embedding:\S+"): "names of embeddings",
    re.compile(r"\\[()\[\]{}]"): "brackets behind a backslash",
}
AROUND = ".,;:!?()\"'`“”‘’„«»"  # punctuation around a word
CONSONANTS = "[bcdfghjklmnpqrstvwxz]{3,4}"
RARE_WORD_POOL = 256  # number of the tokenizer's rarest words to choose from
# A whole word as the tokenizers of CLIP, T5 and Qwen mark it
RARE = re.compile(rf"({CONSONANTS})</w>|[▁Ġ]({CONSONANTS})")


@dataclass(frozen=True)
class Concept:
    """The contents of `concept.json`. `tokens` maps placeholder tokens to the words that the model reads.

    Its files, each "" where the method has none: `weights`, an adapter; `words`, embedding vectors per token;
    `changed`, differences from the base denoiser's weights. `resolution` is that of the training images, 0 the model's.
    """

    kind: str
    model: str
    fingerprint: str
    tokens: dict[str, str]
    class_noun: str
    weights: str = ""
    words: str = ""
    changed: str = ""
    resolution: int = 0
    folder: Path = Path()

    @property
    def weights_path(self) -> Path:
        """The path of the adapter."""
        return self.folder / self.weights

    @property
    def file_names(self) -> list[str]:
        """The names of its adapter, learned words and changed weights, as far as it has them."""
        return [name for name in (self.weights, self.words, self.changed) if name]

    @property
    def files(self) -> list[Path]:
        """The paths of `file_names`."""
        return [self.folder / name for name in self.file_names]

    def hash_files(self) -> str:
        """The content hashes of `files`."""
        return "/".join(map(content_hash, self.files))

    @property
    def learned_tokens(self) -> list[str]:
        """The tokens with learned embeddings rather than words of the model."""
        return [token for token, words in self.tokens.items() if words.split()[:1] == [token]]

    def write(self, folder: Path) -> None:
        """Write `concept.json` into a run folder."""
        fields = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(folder / CONCEPT_FILE, {"format": FORMAT, **fields})


def read_concept(folder: str | Path) -> Concept:
    """Read the concept of a run folder, or of its `concept.json`; `UserError` if there is none.

    `moji-edit` is the embedded one, unless there is a folder of that name.
    """
    folder = Path(folder)
    if str(folder) == OWN_EDITOR.name and not folder.exists():
        folder = OWN_EDITOR
    path = folder / CONCEPT_FILE if folder.is_dir() else folder
    if not path.is_file() or path.name != CONCEPT_FILE:
        raise UserError(explain_no_run(folder))
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a concept that this version reads. Train it again, or update Limner.")
    unknown = sorted(
        set(fields) - {entry.name for entry in dataclass_fields(Concept)} | ({"folder"} & set(fields))
    )
    if unknown or "" in read_as(dict[str, str], fields.get("tokens"), path, "tokens"):
        problem = f"it has the key {unknown[0]}, which is not known" if unknown else "a token is empty"
        raise UserError(
            f"{path} is damaged, or another version's ({problem}). Train the concept again, or update Limner."
        )
    concept = read_as(Concept, {**fields, "folder": str(path.parent)}, path)
    for name in concept.file_names:
        resolve_inside(path.parent, name, path)
    return concept


def needs_whole_base(concept: Concept) -> bool:
    """Whether a concept changes more than low-rank factors beside unchanged layers of its base."""
    if concept.changed or not concept.weights_path.is_file():  # reported when it is loaded
        return bool(concept.changed)
    names = read_header(concept.weights_path).shapes
    return not all(".lora_A." in name or ".lora_B." in name for name in names)


def list_adapter_files(folder: Path) -> list[Path]:
    """Possible adapters in a folder of another trainer, newest last: its files, and those of its checkpoints."""
    files = [*folder.glob("[!.]*.safetensors"), *folder.glob(f"*/{LORA_WEIGHTS}")]
    return sorted((file for file in files if file.is_file()), key=lambda file: (file.stat().st_mtime, file))


def name_last(files: Sequence[Path], folder: Path) -> str:
    """The names of the last three files of a folder, and the number of the others."""
    remainder = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{', '.join(str(file.relative_to(folder)) for file in files[-3:])}{remainder}"


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a training run, finished or not."""
    return (folder / CONCEPT_FILE).is_file() or (folder / "settings.json").is_file()


def explain_no_run(folder: Path) -> str:
    """The message for a path from which no concept can be read: the reason and a remedy."""
    if not folder.exists():
        name, _, strength = str(folder).rpartition(":")
        if re.fullmatch(r"-?\d*\.?\d+", strength) and Path(name).is_dir():
            return (
                f"There is no run folder {folder}. --scale is the strength of all concepts; for one of each, add them "
                f"up: customize merge {quote(folder)} OTHER:1 --out runs/NAME"
            )
        return str(no_run_folder(folder))
    if folder.is_file():
        if reason := explain_unread_format(folder):
            return reason
        unfit = f"{folder} is a file, not a run folder."
        if is_run(folder.parent):
            return f"{unfit} Name the one that it lies in: {quote(folder.parent)}"
        if folder.suffix.lower() in (*PICTURES, ".txt", ".md", ".json", ".jsonl", ".html", ".csv"):
            return f"{unfit} Name the folder that a training wrote."
        return f"{unfit} Make one of it: customize import {quote(folder)} --out runs/NAME"
    if (folder / "model_index.json").is_file():
        return f"{folder} is a whole model, not a run. Give it with --model {quote(folder)}."
    if (folder / CONDITION_FILE).is_file():
        return (
            f"{folder} is a control network, under whose maps is drawn, and no concept. Give it with --condition "
            f"KIND=MAP.png --controlnet {quote(folder)}."
        )
    if is_run(folder):
        unfinished = f"{folder} is a run that is not finished ({CONCEPT_FILE} is missing)"
        return f"{unfinished}. Go on with it: --resume {quote(folder)}"
    inner = sorted(str(file.parent) for file in folder.glob(f"*/{CONCEPT_FILE}"))
    if inner:
        listed = ", ".join(inner[:4]) + (f" and {len(inner) - 4} more" if len(inner) > 4 else "")
        return f"{folder} holds no concept itself, but runs: {listed}. Name one of these."
    if (folder / DRAWN_RECORD).is_file():
        return f"{folder} holds what was drawn, by its {DRAWN_RECORD}, and no concept. Name the folder of a training."
    if files := list_adapter_files(folder):
        return (
            f"{folder} is no run folder, and holds {name_last(files, folder)}. Make a run of one that is an adapter: "
            f"customize import {quote(files[-1])} --out runs/NAME"
        )
    return f"{folder} holds no concept ({CONCEPT_FILE} is missing). Name a run folder of `customize train`."


def checkpoint(run: str | Path, choice: str | None = None) -> Path:
    """The folder of a run's concept: `best/` in it where the run kept its best checkpoint, or the run itself (`last`).

    `choice` is best, last, or None for the best if there is one, with a notice. Raises `UserError` where the best is
    requested and there is none.
    """
    folder = Path(run) / BEST
    if (folder / CONCEPT_FILE).is_file():
        if choice is None:
            notify(
                f"Using the best checkpoint of {run} (--checkpoint last: the weights after the last step)."
            )
        return Path(run) if choice == "last" else folder
    if choice == "best":
        read_concept(run)  # raises where there is no run at all
        raise UserError(f"{run} kept no best checkpoint. Give --checkpoint last, or leave it out.")
    return Path(run)


def trained_resolution(concepts: Sequence[Concept]) -> int:
    """The training resolution of all concepts; 0, the model's own, where they differ, with a notice."""
    sizes = sorted({concept.resolution for concept in concepts})
    if len(sizes) > 1:
        listed = " and ".join(str(size or "the model's own") for size in sizes)
        notify(f"The concepts were trained at different resolutions ({listed}), so the model's own is used.")
    return sizes[0] if len(sizes) == 1 else 0


def resolve_placeholder_tokens(
    prompt: str,
    concepts: Sequence[Concept],
    *,
    runs: Path | None = Path("runs"),
    model: str | None = None,
) -> str:
    """Replace each placeholder token of the concepts by the words that the model reads for it.

    `model` is the sampling model, None that of the concepts: bracketed words of its own tokenizer stay. Raises
    `UserError` for a placeholder that none of the concepts owns, naming the newest run in `runs` that does, and for a
    token with other brackets.
    """
    _refuse_two_meanings(prompt, concepts)
    _refuse_other_brackets(prompt, concepts)
    _say_shared_words(prompt, concepts)
    resolved = replace_tokens(prompt, concepts)
    # Textual inversion adds the token itself to the tokenizer, so a resolved prompt may still contain it.
    owned = {word for concept in concepts for words in concept.tokens.values() for word in words.split()}
    run_of_token = {
        token: run for run, concept in (list_concept_runs(runs) if runs else []) for token in concept.tokens
    }
    foreign = find_foreign_placeholders(resolved, owned)
    foreign += [token for token in run_of_token if token not in owned and mentions(resolved, token)]
    if foreign:
        known_words = own_words(model or next((concept.model for concept in concepts), ""))
        foreign = [token for token in foreign if token not in known_words]
    for token in foreign:
        remedy = (
            f"Add --concept {quote(run_of_token[token])}."
            if token in run_of_token
            else "Train it first, or leave it out."
        )
        if token.startswith("[") and token not in run_of_token:
            remedy = "Train it first, or leave the brackets out, which weaken no word here."
        if SWITCH.fullmatch(token):
            remedy = (
                "Words that change on the way, or by turns, are not understood in prompts: write one of them."
            )
        if token.startswith(("<lora:", "<lyco:")):
            remedy = "A LoRA is given with --concept RUN and --scale here; customize import makes a run of its file."
        raise UserError(f"No given concept owns the token {token} in the prompt “{resolved}”. {remedy}")
    for excerpt, kind in find_foreign_syntax(prompt):
        notify_once(f"“{excerpt}” is read as plain text: {kind} are not understood in prompts.")
    return resolved


def own_words(model: str) -> set[str]:
    """Bracketed words in a model's tokenizer: learned ones saved with it (by `merge --bake`, by diffusers).

    They are read from folders only; for hub ids and single files the set is empty.
    """
    words: set[str] = set()
    for file in written_path(model).glob("tokenizer*/[!.]*.json") if model else ():
        with suppress(UserError, OSError):
            words |= _read_added_words(file, file.stat().st_mtime_ns)
    return {word for word in words if PLACEHOLDER.match(word)}


@lru_cache(maxsize=64)
def _read_added_words(file: Path, changed: int) -> frozenset[str]:
    """The words added to a tokenizer, from one of its files; `changed` makes a new version be read again."""
    settings = read_json(file)
    listed, decoded = settings.get("added_tokens"), settings.get("added_tokens_decoder")
    entries = [*(listed if isinstance(listed, list) else ())]
    entries += decoded.values() if isinstance(decoded, dict) else ()
    words = [entry for entry in entries if isinstance(entry, dict) and not entry.get("special")]
    names = settings if file.name == "added_tokens.json" else ()
    return frozenset([*names, *(str(entry.get("content")) for entry in words)])


def resolve_prompts(
    prompts: Sequence[str], concepts: Sequence[Concept], *, model: str | None = None
) -> list[str]:
    """`resolve_placeholder_tokens` of all prompts of a command; names the subjects that no prompt mentions."""
    resolved = [resolve_placeholder_tokens(prompt, concepts, model=model) for prompt in prompts]
    say_uncalled(prompts, concepts)
    return resolved


def say_uncalled(prompts: Sequence[str], concepts: Sequence[Concept]) -> None:
    """Name the subjects that no prompt of a command mentions, by their tokens or by the words these stand for.

    A concept without a class may be a style or a slider, whose token is optional.
    """
    for concept in concepts:
        names = (*concept.tokens, *concept.tokens.values())
        if concept.class_noun and not any(mentions(prompt, word) for prompt in prompts for word in names):
            beginning = "No prompt has" if len(prompts) > 1 else "The prompt has no"
            tokens = " or ".join(concept.tokens)
            notify_once(f"{beginning} {tokens}, the token of {concept.folder}, so its subject hardly shows.")


def _refuse_other_brackets(prompt: str, concepts: Sequence[Concept]) -> None:
    """`UserError` for a token with spaces inside its brackets, or with another keyboard's: `[V ]`, `［V］`."""
    tokens = [token for concept in concepts for token in concept.tokens]
    for token in tokens:
        pair = next((pair for pair in LIKE_BRACKETS if token[0] in pair[0] and token[-1] in pair[1]), None)
        if pair is None:
            continue
        opening, closing = map(re.escape, pair)
        for match in re.finditer(rf"[{opening}]\s*{re.escape(token[1:-1])}\s*[{closing}]", prompt):
            if match[0] not in tokens:
                raise UserError(f"“{match[0]}” in the prompt “{prompt}” is not {token}. Write {token}.")


def find_foreign_placeholders(text: str, words: Iterable[str]) -> list[str]:
    """The bracketed parts of a text that are neither in `words` nor in a longer one, such as `<s0><s1>`."""
    for word in sorted(words, key=len, reverse=True):
        text = text.replace(word, " ")
    return PLACEHOLDER.findall(text)


def expand_tokens(prompt: str, concepts: Sequence[Concept], *, runs: Path | None = Path("runs")) -> str:
    """A prompt of unknown origin with its tokens resolved; without concepts its brackets are left alone."""
    return resolve_placeholder_tokens(prompt, concepts, runs=runs) if concepts else prompt


def find_foreign_syntax(text: str) -> list[tuple[str, str]]:
    """The first excerpt of each kind of other programs' prompt syntax, which is plain text here, with its kind."""
    return [(match[0], kind) for pattern, kind in FOREIGN_SYNTAX.items() if (match := pattern.search(text))]


def replace_tokens(prompt: str, concepts: Sequence[Concept]) -> str:
    """Replace the concepts' tokens by their words, whole words only; the rest is unchanged.

    A space separates a replacement from a letter beside the token, as in “[V]s”.
    """
    words = {token: words for concept in concepts for token, words in concept.tokens.items()}
    if not words:
        return prompt
    # For plain words, which match in any case
    lowercase = {token.lower(): replacement for token, replacement in words.items()}
    longest_first = sorted(words, key=len, reverse=True)  # [VV] before [V]
    pattern = "|".join(f"({word_pattern(token)})" for token in longest_first)

    def write(match: re.Match[str]) -> str:
        replacement, text = words.get(match[0]) or lowercase[match[0].lower()], match.string
        space_before = _are_one_word(text[: match.start()][-1:], replacement[:1])
        space_after = _are_one_word(replacement[-1:], text[match.end() :][:1])
        return f"{' ' * space_before}{replacement}{' ' * space_after}"

    return re.sub(pattern, write, prompt)


def _are_one_word(first: str, second: str) -> bool:
    """Whether two adjacent characters belong to one word."""
    return bool(re.fullmatch(f"{LETTER}{{2}}", first + second))


def _refuse_two_meanings(prompt: str, concepts: Sequence[Concept]) -> None:
    """`UserError` for a prompt with a token that two concepts give different words."""
    owners: dict[str, Concept] = {}
    for concept in concepts:
        for token, words in concept.tokens.items():
            first = owners.setdefault(token, concept)
            learned = words.split()[:1] == [token] and concept.folder != first.folder
            if (first.tokens[token] != words or learned) and mentions(prompt, token):
                raise UserError(
                    f"{token} is a token of {first.folder} and of {concept.folder}, and stands for something else in "
                    "each. Merge them, which gives each its own: customize merge "
                    f"{quote(first.folder)} {quote(concept.folder)} --out FOLDER"
                )


def _say_shared_words(prompt: str, concepts: Sequence[Concept]) -> None:
    """Warn where another concept has also learned the words of a token in the prompt."""
    owners: dict[str, Concept] = {}
    for concept in concepts:
        for token, words in concept.tokens.items():
            first = owners.setdefault(words, concept)
            if first is not concept and any(
                mentions(prompt, shared)
                for owner in (first, concept)
                for shared, meaning in owner.tokens.items()
                if meaning == words
            ):
                notify_once(
                    f"{first.folder} and {concept.folder} have both learned “{words}”, so {token} in a prompt draws "
                    "a mix of the two."
                )


def word_pattern(token: str) -> str:
    """The pattern of a token as a whole word: `sks` is not in “desks”. Brackets need no space beside them, nor do
    scripts without spaces (`UNSPACED`). A plain word matches with capitals too, as at the start of a sentence; a
    bracketed one only as written."""
    start = f"(?<!{LETTER})" if re.match(LETTER, token) else ""
    end = f"(?!{LETTER})" if re.match(LETTER, token[-1:]) else ""
    word = re.escape(token) if re.search(r"[\[\]<>]", token) else f"(?i:{re.escape(token)})"
    return f"{start}{word}{end}"


def mentions(prompt: str, token: str) -> bool:
    """Whether a prompt contains a token as a whole word."""
    return re.search(word_pattern(token), prompt) is not None


def name_call(token: str, class_noun: str, run: Path) -> str:
    """The command that draws what a run has learned, ready to copy; “…” where the class is not known."""
    prompt = f"a {token} {class_noun or '…'} in the snow"
    return f"customize sample {quote_text(prompt)} --concept {quote(run)}"


def list_concept_runs(runs: Path) -> list[tuple[Path, Concept]]:
    """List the finished runs in a folder with their concepts, oldest first, skipping what cannot be read."""
    finished = []
    for path in runs.glob(f"*/{CONCEPT_FILE}"):
        with suppress(UserError, OSError):
            finished.append((path.stat().st_mtime, path.parent, read_concept(path.parent)))
    return [(run, concept) for _, run, concept in sorted(finished, key=lambda entry: entry[:2])]


def choose_rare_word(vocabulary: Mapping[str, int], key: str, *, taken: Iterable[str] = ()) -> str:
    """Choose a rare-token identifier (Ruiz et al. 2023, § 3.2): a single token of 3 or 4 consonants with a weak prior.

    `key` (such as the hash of the training images) seeds the choice, so that two concepts seldom share one. BPE ids are
    ordered by frequency: the rarest tokens have the highest ids. Words in `taken` are left out.

    Raises `UserError` if the vocabulary has none.
    """
    candidates = [token for token in vocabulary if RARE.fullmatch(token)]
    candidates.sort(key=lambda token: -vocabulary[token])
    words = [token.removesuffix("</w>").lstrip("▁Ġ") for token in candidates[:RARE_WORD_POOL]]
    words = [word for word in words if word not in set(taken)]
    if not words:
        raise UserError("This model's tokenizer has no rare words of its own. Give some with --token-words.")
    return min(words, key=lambda word: content_hash(f"{key}/{word}".encode()))


def check_token(token: str, vocabulary: Mapping[str, int]) -> None:
    """Raise `UserError` for a placeholder of several words, and for an ordinary word of the vocabulary.

    Also for one with braces, or with punctuation around it, which prompts would not contain.
    """
    if not token.strip() or " " in token.strip():
        raise UserError(f"The token “{token}” must be one word, like [V] or <dog>.")
    if (bare := token.strip(AROUND)) != token and not PLACEHOLDER.fullmatch(token):
        raise UserError(f"The token “{token}” has marks around it. Write it as {bare or '[V]'} alone.")
    if "{" in token or "}" in token:
        raise UserError(f"The token “{token}” has braces, which stand for what is filled in. Write [V].")
    spellings = (f"{token.lower()}</w>", f"▁{token.lower()}", f"Ġ{token.lower()}")
    if token.isalpha() and any(word in vocabulary for word in spellings) and not RARE.fullmatch(spellings[0]):
        raise UserError(f"The token “{token}” is an ordinary word for this model. Choose one like [{token}].")


def summarize_concepts(concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """The concepts of a run for its JSON record."""
    return [
        {"folder": str(concept.folder), "tokens": concept.tokens, "class": concept.class_noun}
        for concept in concepts
    ]
