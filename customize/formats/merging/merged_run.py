"""Write the result of a merge: an adapter file, or a run folder with the tokens of all runs that went into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from backbone.adapters.concept import EDITS, Concept
from backbone.adapters.embeddings import EMBEDDINGS_FILE as WORDS
from backbone.adapters.embeddings import name_vector_tokens
from backbone.adapters.lora import LORA_WEIGHTS, LYCORIS_WEIGHTS
from backbone.io.console import UserError, notify, quote
from backbone.io.files import write_tensors, write_text
from customize.formats.adapter import AdapterFile
from customize.formats.merging.merge import MergeInput
from customize.formats.metadata import build_metadata
from customize.formats.write import check_folder, check_output, fill_output, write_adapter
from customize.methods.weights import CHANGED


def check_destination(out: Path, parts: Sequence[MergeInput]) -> None:
    """Raise `UserError` unless a merge of these can be written to `out`; called before it is computed."""
    if out.suffix == ".safetensors":
        check_output(out)
    else:
        check_folder(out, [part.source for part in parts])


def save_merged(
    out: Path,
    adapter: AdapterFile,
    parts: Sequence[MergeInput],
    *,
    weight_deltas: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write a merge to a .safetensors file, else to a run folder; returns token → the words that the model reads.

    A run folder also holds the learned embeddings of all runs and the weights in `weight_deltas`.
    Raises `UserError`, before anything is written, if `out` cannot hold the merge.
    """
    # Tokens of all runs under names of their own, and what is checked before anything is written
    is_folder = out.suffix != ".safetensors"
    renamed = resolve_tokens([part.concept for part in parts if part.concept is not None])
    tokens = dict(token_and_words for renaming in renamed for token_and_words in renaming.values())
    metadata = build_merged_metadata(adapter, parts, tokens, title=out.name if is_folder else out.stem)
    check_destination(out, parts)
    if not is_folder:
        if weight_deltas or not adapter.layers:
            raise UserError(f"Whole weights do not fit into {out}. Add --rank for a LoRA of them, or --bake.")
        if any(part.words for part in parts):
            notify(f"Learned words are not in {out}: they stay in the {WORDS} of their runs.")
        write_adapter(out, adapter, "peft", metadata=metadata)
        return tokens

    # A run folder: weights, learned words, whole weights, and its record
    concept = next((part.concept for part in parts if part.concept is not None), None)
    if concept is None:
        raise UserError(
            f"None of the merged files is a run, so {out} would not know its model. Let --out end in .safetensors."
        )
    words = rename_embeddings(parts, renamed)
    fields: dict[str, Any] = {
        "weights": "",
        "words": WORDS if words else "",
        "changed": CHANGED if weight_deltas else "",
    }
    with fill_output(out) as unfinished:
        if adapter.layers:
            plain = set(adapter.algorithms) <= {"lora", "dora"}
            fields["weights"] = LORA_WEIGHTS if plain else LYCORIS_WEIGHTS
            write_adapter(unfinished / fields["weights"], adapter, "peft", metadata=metadata)
        if words:
            write_tensors(unfinished / WORDS, words)
        if weight_deltas:
            changed = {name.removeprefix("unet."): value for name, value in weight_deltas.items()}
            write_tensors(unfinished / CHANGED, changed)
        write_text(unfinished / "README.md", _format_readme(out, parts, tokens, concept))
        kind = EDITS if any(part.concept.kind == EDITS for part in parts if part.concept) else "merged"
        replace(concept, kind=kind, tokens=tokens, folder=out, **fields).write(unfinished)
    return tokens


def build_merged_metadata(
    adapter: AdapterFile, parts: Sequence[MergeInput], tokens: Mapping[str, str], *, title: str
) -> dict[str, str]:
    """Metadata of the merged file: that of the first run, all trigger phrases, and what was merged."""
    first = next((part for part in parts if part.concept is not None), parts[0])
    metadata = build_metadata(adapter, source=first.source, title=title) if adapter.layers else {}
    metadata.pop("modelspec.usage_hint", None)
    metadata["modelspec.trigger_phrase"] = ", ".join(tokens.values())
    metadata |= {"limner_token": " ".join(tokens), "limner_words": " ".join(tokens.values())}
    metadata["modelspec.merged_from"] = ", ".join(f"{part.source.stem} × {part.strength:g}" for part in parts)
    return metadata


def resolve_tokens(concepts: Sequence[Concept]) -> list[dict[str, tuple[str, str]]]:
    """For each concept: its token → (token, words) in the merge. A token that is taken gets a number, with a notice.

    Rare words that two concepts share stay, with a warning: a prompt cannot tell the two subjects apart.
    """
    renamings: list[dict[str, tuple[str, str]]] = []
    words_by_token: dict[str, str] = {}
    for concept in concepts:
        renaming: dict[str, tuple[str, str]] = {}
        for token, words in concept.tokens.items():
            # A learned token's words are its own vectors; a rare word may stand for two subjects
            is_learned = words.split()[:1] == [token]
            if words in words_by_token.values() and not is_learned:
                notify(
                    f"“{words}” stands for more than one subject in this merge: a prompt cannot tell them apart."
                )
            # The first free name: [V], [V2], …
            name, number = token, 2
            while name in words_by_token and (is_learned or words_by_token[name] != words):
                name, number = _number_token(token, number), number + 1
            if name != token:
                notify(f"{token} is taken: that of {concept.folder} is {name} from now on.")
            renaming[token] = (
                name,
                " ".join(name_vector_tokens(name, len(words.split()))) if is_learned else words,
            )
            words_by_token[name] = renaming[token][1]
        renamings.append(renaming)
    return renamings


def rename_embeddings(
    parts: Sequence[MergeInput], renamed: Sequence[Mapping[str, tuple[str, str]]]
) -> dict[str, Tensor]:
    """The learned embeddings of all runs under their tokens in the merge, as one file stores them."""
    runs = [part for part in parts if part.concept is not None]
    embeddings: dict[str, Tensor] = {}
    for part, renaming in zip(runs, renamed, strict=True):
        for name, value in part.words.items():
            token = name if name in renaming else name.rpartition("/")[0]  # `token/text_encoder_2`
            embeddings[renaming[token][0] + name.removeprefix(token)] = value
    return embeddings


def _number_token(token: str, number: int) -> str:
    """`[V]` → `[V2]`."""
    closes = token[-1:] in ("]", ">")
    return f"{token[:-1]}{number}{token[-1]}" if closes else f"{token}{number}"


def _format_readme(
    run: Path, parts: Sequence[MergeInput], tokens: Mapping[str, str], concept: Concept
) -> str:
    arguments = " ".join(quote(f"{part.source}:{part.strength:g}") for part in parts)
    lines = [
        f"# {run.name}",
        "",
        f"Merged from {len(parts)} adapters on `{concept.model}`:",
        "",
        f"    customize merge {arguments} --out {quote(run)}",
        "",
        *(f"- `{token}` stands for “{words}”" for token, words in tokens.items()),
        "",
    ]
    return "\n".join(lines)
