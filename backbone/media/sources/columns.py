"""The columns of lists and tables that hold images, their names, and captions."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from backbone.io.console import UserError, notify_first, notify_once
from backbone.io.prompts import CONTROL, compose, drop_unseen

CAPTION_COLUMNS = ("text", "prompt", "caption")
# Beside ours, those of musubi-tuner and of lists of films
NAME_COLUMNS = ("image_file_name", "image_path", "video_path", "video")

# A character as web pages write it: &amp; &#39; &#x27;
ENTITY = re.compile(r"&(#\d{1,7}|#[xX][\da-fA-F]{1,6}|[A-Za-z][A-Za-z\d]*);")
# What programs that write captions leave around them: marks of their own tokenizer, which one of ours may end a text at
MARK = re.compile(r"</?s>|<(?:pad|bos|eos|unk)>|<\|[a-z_]+\|>")


@dataclass(frozen=True)
class Columns:
    """The columns that the user has named, if any."""

    caption: str | None
    image: str | None

    def choose(self, names: Sequence[str], pictures: Collection[str], where: str) -> tuple[str, str | None]:
        """A table's image column, which may be any of `pictures`, and its caption column, if it has one."""
        image = self.find("image", names, where) or next((name for name in names if name in pictures), None)
        if image is None:
            raise UserError(
                f"{where} has no image column; it has {', '.join(names)}. Name one with image_column."
            )
        return image, self.find("caption", names, where)

    def find(self, wanted: str, names: Sequence[str], where: str) -> str | None:
        """The caption or image column among `names`, or None; `UserError` if a requested column is missing."""
        requested, defaults = {
            "caption": (self.caption, CAPTION_COLUMNS),
            "image": (self.image, ("file_name", "image", *NAME_COLUMNS)),
        }[wanted]
        if requested is not None and requested not in names:
            raise UserError(
                f"{where} has no column {requested!r}; it has {', '.join(map(repr, names))}. Name one of them."
            )
        by_word = {name.strip().lower(): name for name in reversed(names)}
        return requested or next((by_word[word] for word in defaults if word in by_word), None)

    def say_of_captions(self, words: Sequence[str], where: str) -> None:
        """Say that none of a table's columns of `words` is its captions', or which of several is."""
        if self.caption is not None:
            return
        chosen = self.find("caption", words, where)
        further = [
            name for name in words if name.strip().lower() in CAPTION_COLUMNS and name not in (chosen, None)
        ]
        if further:
            notify_once(
                f"{where} has captions in {chosen} and in {' and in '.join(further)}: {chosen} is read. Name another "
                "with caption_column."
            )
        elif chosen is None:
            others = [name for name in words if name != self.find("image", words, where)]
            if others:
                notify_once(
                    f"{where} has no column {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}, so no captions "
                    f"come from it. It has {', '.join(others[:6])}: name the one with caption_column."
                )


def column_of(key: str) -> str:
    """The column whose files a key names, as `datasets` has them: `chosen_file_name` are the images of `chosen`."""
    word = key.strip()
    return word[: -len("_file_name")] if word.lower().endswith("_file_name") else word


def join_lines(caption: str | None, where: str | Path) -> str | None:
    """A caption on one line, in plain characters where a web page's stand (`&amp;`); None where nothing is left.

    Of these, and of marks that nobody sees or that a captioner left (`</s>`), which are left out, it is said.
    """
    plain = caption or ""
    for _ in range(2):  # &amp;quot; is written twice
        plain = ENTITY.sub(lambda found: html.unescape(found[0]), plain)
    if plain != (caption or ""):
        notify_first(
            str(where), "has characters as web pages write them (&amp;). They are read as what they mean."
        )
    if MARK.search(plain):
        notify_first(
            str(where), "has marks of the program that wrote its caption (as </s>). They are left out."
        )
        plain = MARK.sub(" ", plain)
    text = " ".join(plain.split())
    seen = drop_unseen(text)
    if seen not in compose(text):  # they are not around it alone
        notify_first(str(where), "has zero-width characters inside its caption. They are left out.")
    return seen or None


def refuse_control(caption: str, where: str | Path) -> str:
    """The caption, of a file that can be written anew; `UserError` for control characters, as terminals are sent."""
    if odd := CONTROL.search(caption):
        near = caption[max(0, odd.start() - 20) : odd.end() + 20]
        raise UserError(
            f"{where} holds a control character (in {near!r}), and a caption is plain text. Remove it."
        )
    return caption
