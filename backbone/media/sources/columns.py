"""The columns of lists and tables that hold images, their names, and captions."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from backbone.io.console import UserError, notify_first, notify_once
from backbone.io.prompts import CONTROL, compose, drop_invisible

CAPTION_COLUMNS = ("text", "prompt", "caption")
# Besides ours, the names of musubi-tuner and of lists of films
NAME_COLUMNS = ("image_file_name", "image_path", "video_path", "video")

# A character reference of HTML: &amp; &#39; &#x27;
ENTITY = re.compile(r"&(#\d{1,7}|#[xX][\da-fA-F]{1,6}|[A-Za-z][A-Za-z\d]*);")
# Marks of a captioner's own tokenizer, which programs leave around captions; a text encoder may end the text at one
MARK = re.compile(r"</?s>|<(?:pad|bos|eos|unk)>|<\|[a-z_]+\|>")


@dataclass(frozen=True)
class Columns:
    """The columns that the user has named, if any."""

    caption: str | None
    image: str | None

    def choose(
        self, names: Sequence[str], image_columns: Collection[str], location: str
    ) -> tuple[str, str | None]:
        """A table's image column, which may be any of `image_columns`, and its caption column, if it has one."""
        image = self.find("image", names, location) or next(
            (name for name in names if name in image_columns), None
        )
        if image is None:
            raise UserError(
                f"{location} has no image column; it has {', '.join(names)}. Name one with image_column."
            )
        return image, self.find("caption", names, location)

    def find(self, kind: str, names: Sequence[str], location: str) -> str | None:
        """The caption or image column among `names`, or None; `UserError` if a requested column is missing."""
        requested, defaults = {
            "caption": (self.caption, CAPTION_COLUMNS),
            "image": (self.image, ("file_name", "image", *NAME_COLUMNS)),
        }[kind]
        if requested is not None and requested not in names:
            raise UserError(
                f"{location} has no column {requested!r}; it has {', '.join(map(repr, names))}. Name one of them."
            )
        by_word = {name.strip().lower(): name for name in reversed(names)}
        return requested or next((by_word[word] for word in defaults if word in by_word), None)

    def say_caption_column(self, names: Sequence[str], location: str) -> None:
        """Say that none of a table's text columns `names` holds its captions, or which of several is read."""
        if self.caption is not None:
            return
        chosen = self.find("caption", names, location)
        further = [
            name for name in names if name.strip().lower() in CAPTION_COLUMNS and name not in (chosen, None)
        ]
        if further:
            notify_once(
                f"{location} has captions in {chosen} and in {' and in '.join(further)}: {chosen} is read. Name "
                "another with caption_column."
            )
        elif chosen is None:
            others = [name for name in names if name != self.find("image", names, location)]
            if others:
                notify_once(
                    f"{location} has no column {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}, so no "
                    f"captions come from it. It has {', '.join(others[:6])}: name the one with caption_column."
                )


def find_column(key: str) -> str:
    """The column of a key of file names, as in `datasets`: `chosen_file_name` names the images of `chosen`."""
    word = key.strip()
    return word[: -len("_file_name")] if word.lower().endswith("_file_name") else word


def join_lines(caption: str | None, location: str | Path) -> str | None:
    """A caption on one line, with a web page's `&amp;` as plain characters; None if nothing is left.

    Invisible characters and a captioner's marks (`</s>`) are left out. A line is printed for each of these changes.
    """
    decoded = caption or ""
    for _ in range(2):  # &amp;quot; is written twice
        decoded = ENTITY.sub(lambda match: html.unescape(match[0]), decoded)
    if decoded != (caption or ""):
        notify_first(
            str(location), "has characters as web pages write them (&amp;). They are read as what they mean."
        )
    if MARK.search(decoded):
        notify_first(
            str(location), "has marks of the program that wrote its caption (as </s>). They are left out."
        )
        decoded = MARK.sub(" ", decoded)
    text = " ".join(decoded.split())
    visible = drop_invisible(text)
    if visible not in compose(text):  # invisible characters inside, not only around it
        notify_first(str(location), "has zero-width characters inside its caption. They are left out.")
    return visible or None


def refuse_control(caption: str, location: str | Path) -> str:
    """The caption; `UserError` for control characters, as are sent to terminals."""
    if match := CONTROL.search(caption):
        context = caption[max(0, match.start() - 20) : match.end() + 20]
        raise UserError(
            f"{location} holds a control character (in {context!r}), and a caption is plain text. Remove it."
        )
    return caption
