"""A run on the hub: the metadata of its card, and the upload."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from backbone.adapters.concept import mentions, word_pattern
from backbone.adapters.embeddings import EMBEDDINGS_FILE as WORDS
from backbone.io.console import UserError, format_count, quote, quote_text
from backbone.io.files import read_header
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.locate import OWN
from backbone.models.model import Backbone
from customize.data.dataset import preserves
from customize.settings import METHODS, OWN_WORDS, SHEET, Settings, as_command
from customize.training.reporting.public import copy_without_paths

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def format_card(settings: Settings, model: Backbone) -> str:
    """A model card's metadata, as the hub reads it: base, library, tags, instance prompt, a picture."""
    adapter = settings.method in ("lora", "pivotal")
    tags = ["text-to-image", "diffusers", "dreambooth", settings.adapter if adapter else settings.method]
    first = settings.subjects()[0]
    prompt = replace(first, token=first.token_words).fill(settings.instance_prompt)
    lines = [
        "---",
        *_name_base(model),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"instance_prompt: {quote_yaml(prompt)}",
        f"tags: [{', '.join(tags)}]",
        "widget:",
        f"- text: {quote_yaml(prompt)}",
        "  output:",
        "    url: sheet.png",
        "---",
        "",
        "",
    ]
    return "\n".join(lines)


def format_edit_card(settings: Settings, model: Backbone) -> str:
    """The metadata of the card of a run that learned edits."""
    tags = ["image-to-image", "instruct-pix2pix", settings.adapter if settings.method == "lora" else "full"]
    lines = [
        "---",
        *_name_base(model),
        "library_name: diffusers",
        "pipeline_tag: image-to-image",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        "",
    ]
    return "\n".join(lines)


def _name_base(model: Backbone) -> list[str]:
    """The line that names the base model, if it is on the hub."""
    source = model.location.source
    return [f"base_model: {source}"] if HUB_ID.fullmatch(source) and not Path(source).exists() else []


def push(run: Path, repository: str) -> str:
    """Upload a run folder, without checkpoints and without local paths; return its URL.

    Raises `UserError` if it cannot. A new repository is private: the sheet and the report show the subject's
    pictures.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True, private=True)
        with TemporaryDirectory() as temporary:
            public = Path(temporary) / run.name
            copy_without_paths(run, public)
            api.upload_folder(repo_id=url.repo_id, folder_path=public)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The run is finished in {run}, but it could not be uploaded as {repository} ({reason}). "
            f"Log in with: hf auth login; then: customize train --resume {quote(run)}"
        ) from error
    return str(url)


def quote_yaml(text: str) -> str:
    """A text as YAML's double-quoted scalar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def format_readme(
    run: Path, settings: Settings, model: Backbone, prompts: list[str], seconds: dict[str, float]
) -> str:
    """The run's README.md."""
    first = settings.subjects()[0]
    instance, prior = first.fill(settings.instance_prompt), first.fill(settings.class_prompt)
    prompt_shown = next((prompt for prompt in prompts if mentions(prompt, first.token)), instance)
    further = len(settings.further_prompts)
    preservation = (
        f"and {format_count(further, 'further prompt')} of it kept what they were"
        if further
        else "kept what it was"
    )
    preserved = f" “{prior}” {preservation}." if preserves(settings) else ""
    lines = [
        f"# {settings.name_in_prompt()}",
        "",
        f"A concept learned by `customize train` from `{settings.images}` on `{settings.model}`: "
        f"{describe_training(settings)}, {settings.steps} steps of {settings.batch} in {seconds['train']:.0f} s "
        f"({seconds['all']:.0f} s in all).",
        "",
        f"Write `{settings.token}` in a prompt; the model reads “{settings.token_words}”. Trained on “{instance}”."
        + preserved,
        *(
            f"Also `{other.token}`, a {other.class_noun}, from `{other.images}`."
            for other in settings.subjects()[1:]
        ),
        "",
        f"![the subject above, samples below]({SHEET})",
        "",
        "Again:",
        "",
        f"    {as_command(settings, run)}",
        "",
        "Pictures:",
        "",
        f"    customize sample {quote_text(prompt_shown)} --concept {quote(run)}",
        "",
        *explain_diffusers(run, settings, model, instance),
        "",
    ]
    return "\n".join(lines)


def describe_training(settings: Settings) -> str:
    """The method of training, in a phrase."""
    if settings.pairs and settings.method == "full":
        return "all of the denoiser's weights"
    if settings.method in ("lora", "pivotal"):
        adapter = f"{settings.adapter} of rank {settings.rank}"
        return adapter if settings.method == "lora" else f"{settings.num_vectors} new words, then {adapter}"
    return METHODS[settings.method]


def load_words_in_diffusers(path: Path) -> list[str]:
    """The lines that load learned embeddings into diffusers' pipeline, for each text encoder."""
    names = list(read_header(path).shapes)
    if len(names) == 1 and "/" not in names[0]:
        return [f"pipeline.load_textual_inversion({str(path)!r})"]
    lines = ["from safetensors.torch import load_file", "", f"words = load_file({str(path)!r})"]
    for name in names:
        token, _, side = name.rpartition("/")
        if not token:  # several words of one encoder; diffusers reads one from a file
            lines.append(f"pipeline.load_textual_inversion(words[{name!r}], token={name!r})")
            continue
        tokenizer = side.replace("text_encoder", "tokenizer")
        lines.append(
            f"pipeline.load_textual_inversion(words[{name!r}], token={token!r}, "
            f"text_encoder=pipeline.{side}, tokenizer=pipeline.{tokenizer})"
        )
    return lines


def open_in_diffusers(model: Backbone) -> list[str]:
    """The lines that open the model as diffusers' pipeline."""
    location = model.location
    kind = str(location.index["_class_name"])
    if location.name in OWN:
        place = f'files("backbone") / "{location.name}"'
        imports = ["from importlib.resources import files", ""]
        return [*imports, f"from diffusers import {kind}", "", f"pipeline = {kind}.from_pretrained({place})"]
    if location.parts:  # diffusers does not open three separate files
        hub_id = next(iter(model.family.hub_ids.values()))
        opened = f"pipeline = {kind}.from_pretrained({hub_id!r})  # or what these files are of"
        return [f"from diffusers import {kind}", "", opened]
    opens = "from_single_file" if location.file else "from_pretrained"
    return [f"from diffusers import {kind}", "", f"pipeline = {kind}.{opens}({location.source!r})"]


def draw_in_diffusers(model: Backbone) -> dict[str, float]:
    """Arguments to diffusers' pipeline for the model's own steps and guidance.

    Only for pipelines whose guidance scale means the same as ours. Ancestral steps are DDIM's with η = 1.
    """
    import diffusers

    kind = str(model.location.index["_class_name"])
    if not kind.startswith(("StableDiffusion", "PixArt")):
        return {}
    defaults = get_sampling_defaults(model)
    call = inspect.signature(getattr(diffusers, kind).__call__).parameters
    stochastic = {"eta": 1.0} if defaults.sampler == "ancestral" and "eta" in call else {}
    return {"num_inference_steps": defaults.steps, "guidance_scale": defaults.guidance, **stochastic}


def explain_diffusers(run: Path, settings: Settings, model: Backbone, instance: str) -> list[str]:
    """How to use the concept in diffusers, where it reads these files."""
    import diffusers

    lines: list[str] = []
    kind = str(model.location.index["_class_name"])
    if settings.method in OWN_WORDS and not hasattr(getattr(diffusers, kind), "load_textual_inversion"):
        return [f"diffusers' {kind} reads no learned words; `customize sample` does."]
    if settings.method in OWN_WORDS:
        lines += load_words_in_diffusers(run / WORDS)
    if settings.method in ("lora", "pivotal") and settings.adapter in ("lora", "dora"):
        lines.append(f"pipeline.load_lora_weights({str(run)!r})")
    elif settings.method != "textual-inversion":
        return ["For other programs, bake it into a pipeline: `customize merge --help`."]
    # diffusers itself writes out a word of several vectors, but only one in small letters
    writes_out_token = settings.method in OWN_WORDS and settings.token == settings.token.lower()
    prompt = (
        instance
        if writes_out_token
        else re.sub(word_pattern(settings.token), lambda _: settings.token_words, instance)
    )
    arguments = "".join(f", {name}={value}" for name, value in draw_in_diffusers(model).items())
    drawn = [f"image = pipeline({prompt!r}{arguments}).images[0]", 'image.save("picture.png")']
    return ["In diffusers:", "", "```python", *open_in_diffusers(model), *lines, *drawn, "```"]
