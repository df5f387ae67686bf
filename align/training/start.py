"""The start of `align train`, before torch is imported: errors in the settings are raised here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.settings import PreparePairs, Settings, resolve_settings
from backbone.cli.values.effects import refuse_idle, require_packages
from backbone.io.console import UserError, notify
from backbone.io.progress import progress
from backbone.io.run_folder import is_prepared, make_absolute, refuse_taken, run_name

if TYPE_CHECKING:
    from align.pairs.prepared import Prepared


def start(requested: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train with the given settings, by field of `Settings`; returns the run folder.

    `vram` is the device's memory in GiB to plan for. Raises `UserError` for settings that contradict each other and
    for records that cannot be read, before any weights load.
    """
    requested = as_saved(requested)
    resolved = resolve_settings(requested, {})
    refuse_idle(resolved, requested)  # contradictions are answered before torch is imported
    require_packages(resolved)
    if requested.get("online"):
        return _start_online(requested, out=out, vram=vram)
    source = requested.get("pairs")
    if source is None:
        raise UserError(
            "Say what to learn from: align train PAIRS (see align train --help), or --online SCORER."
        )
    out = out or Path("runs") / run_name(str(source))
    refuse_taken(out, [str(source)])
    if is_prepared(source):
        return _start_prepared(requested, out=out, vram=vram)
    from align.pairs.read import read_preferences
    from align.pairs.records import check_preferences, describe_doubts, describe_records

    of_source = {name: getattr(resolved, name) for name in ("user", "limit", "split") if name in requested}
    rows = {name: value for name, value in of_source.items() if value != getattr(Settings, name)}
    preferences = check_preferences(
        read_preferences(source, **rows), skip_bad=requested.get("skip_bad", False)
    )
    notify(f"{preferences.source} holds {describe_records(preferences.records)}.")
    for sentence in describe_doubts(preferences.records):
        notify(sentence)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from align.training.run import train_preferences

    return train_preferences(requested, preferences, out=out, vram=vram)


def as_saved(requested: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings with absolute paths, so that the run can be resumed from anywhere."""
    saved = dict(requested)
    for name in ("pairs", "prompts"):
        if name in saved:
            saved[name] = make_absolute(str(saved[name]))
    if "concepts" in saved:
        saved["concepts"] = tuple(make_absolute(str(folder)) for folder in saved["concepts"])
    if "online" in saved:
        saved["online"] = _make_scorer_absolute(str(saved["online"]))
    return saved


def _make_scorer_absolute(name: str) -> str:
    """A scorer's name with absolute paths of its files; `moji` is the embedded one."""
    parts = [part if part == "moji" else make_absolute(part) for part in name.split(":")]
    if name.startswith("like:"):
        return ":".join(parts)
    return parts[0] if len(parts) == 1 else name


def _start_online(requested: dict[str, Any], *, out: Path | None, vram: float | None) -> Path:
    """Train online, on a scorer's scores of the model's own samples."""
    if vram is not None:
        raise UserError("--vram plans for pairs that are there. With --online name the measures yourself.")
    if "pairs" in requested:
        raise UserError("--online draws its own pairs, so it takes no source. Leave out one of the two.")
    if "prompts" not in requested:
        raise UserError("--online needs prompts to draw. Add --prompts FILE.")
    from backbone.io.prompts import read_prompts

    read_prompts(Path(requested["prompts"]))
    out = out or Path("runs") / f"{Path(requested['prompts']).stem}-online"
    refuse_taken(out)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from align.training.online import train_online

    return train_online(requested, out=out)


def _start_prepared(requested: dict[str, Any], *, out: Path | None, vram: float | None) -> Path:
    """Train from a folder of `align prepare`, whose images are already checked."""
    for name in ("skip_bad", "any_model", "split"):
        if name in requested:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect: {requested['pairs']} is prepared. Leave it out, or say it "
                "to align prepare."
            )
    with progress(None, "starting", brief=True):  # torch and diffusers
        from align.pairs.prepared import Prepared
        from align.training.run import train_preferences

        prepared = Prepared(Path(requested["pairs"]))
        notify(f"{prepared.folder} holds {prepared.describe()}.")
    return train_preferences(requested, prepared, out=out, vram=vram)


def start_preparing(options: PreparePairs) -> Prepared:
    """Prepare a source; returns the finished folder.

    Raises `UserError` for a source that cannot be read before torch is imported.
    """
    from align.pairs.read import PairStream, read_preferences, stream_preferences
    from align.pairs.records import Preferences
    from backbone.media.sources.stream import HubDataset, find_stream

    user, limit = options.user or None, options.limit or None
    dataset = HubDataset(options.pairs, options.dataset_config_name, options.split)
    stream = find_stream(dataset, out=options.out, limit=options.limit)
    preferences: Preferences | PairStream
    if stream is None:
        preferences = read_preferences(options.pairs, user=user, limit=limit)
    else:
        preferences = stream_preferences(stream, user=user)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from align.training.prepare import prepare_pairs
        from backbone.distributed import processes
        from backbone.models.model import Backbone
        from backbone.training.prepared import Cropping

    processes.init_process(options.device)
    model = Backbone.open(options.model or "moji", device=options.device, precision=options.precision)
    prepared = prepare_pairs(
        preferences,
        model,
        options.out,
        cropping=Cropping(options.flip, options.random_crop, options.seed),
        any_model=options.any_model,
        skip_bad=options.skip_bad,
        workers=options.num_proc,
        rows={"user": user, "limit": limit},
    )
    processes.end_process()
    return prepared
