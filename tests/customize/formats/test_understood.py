"""The page that says which adapter files are understood is what the code understands."""

from __future__ import annotations

from pathlib import Path

from backbone.adapters.config import PEFT_PREFIX
from customize.formats.layers.known import NETWORK_NAMES, list_known_layers
from customize.formats.layers.originals import original_layers
from customize.formats.layers.translate import PREFIXES
from customize.formats.read import OTHER_METHODS
from customize.formats.words import ALONE, SLOTS

PAGE = Path(__file__).parents[3] / "docs" / "adapter-files.md"
COMPONENTS = {
    "": "the denoiser or a text encoder",
    "denoiser": "the denoiser",
    "text_encoder": "the first CLIP",
    "text_encoder_2": "the second CLIP",
}


def page() -> str:
    """The page, from the tables that reading uses."""
    lines = [
        "# Other tools' adapter files",
        "",
        "`customize import`, `export`, `info`, `merge` and `resize` read the files of diffusers, peft, kohya's",
        "sd-scripts, LyCORIS, OneTrainer, SimpleTuner, XLabs and ComfyUI. This page is written by",
        "`python -m tests.customize.formats.test_understood`.",
        "",
        "## Names of layers",
        "",
        "A name is looked up among the layers of the networks themselves, with dots or underscores, in diffusers'",
        "names or in those of the original code. A file with a name that no network has is refused, and the name said.",
        "",
        "| the name begins with | it is a layer of |",
        "| --- | --- |",
        *(f"| `{prefix}` | {COMPONENTS[component]} |" for prefix, (component, _) in PREFIXES.items()),
        "| none of these | the denoiser, or else the first CLIP |",
        "",
        f"peft's `{PEFT_PREFIX}` may stand before or after it.",
        "",
        "| network | layers that are known (`#`: any number) | names of the original code |",
        "| --- | --- | --- |",
    ]
    for network, name in NETWORK_NAMES.items():
        originals = ", ".join(f"`{layer.name}`" for layer in original_layers(network))
        if network == "unet":
            starts = (
                "input_blocks.…",
                "middle_block.…",
                "output_blocks.…",
                "time_embed.…",
                "label_emb.…",
                "out.2",
            )
            originals = ", ".join(f"`{start}`" for start in starts)
        lines.append(f"| {name} | {len(list_known_layers(network))} kinds | {originals or '–'} |")
    return "\n".join(
        [
            *lines,
            "",
            "T5's layers are refused. Queries, keys and values in one layer are split; those of a LoKr",
            "where its blocks end at the edges.",
            "",
            "## Kinds of factors",
            "",
            "| kind | read | in a run (`import`) | `export` |",
            "| --- | --- | --- | --- |",
            "| LoRA, LoCon (also with `lora_mid`), as matrices or kernels | yes | yes | all |",
            "| DoRA, scales over outputs `[out, 1]` | yes | yes | all |",
            "| DoRA, scales over inputs `[1, in]` (OneTrainer's) | yes | refused: `merge --bake` it | kohya, comfyui |",
            "| DoRA that `export --to comfyui` wrote, whose scales are of one base | `info` | yes | once it is a run |",
            "| whole differences of matrices and kernels (`.diff`) | yes | as a LoRA of equal change | all |",
            "| LoHa, LoKr of any division and factorisation | yes | yes | kohya, comfyui |",
            "| DoRA of a LoHa or LoKr; several kinds in one file | yes | as a LoRA of equal change | kohya, comfyui |",
            "",
            "α comes from the file's `.alpha` tensors, its metadata, or peft's `adapter_config.json` (rsLoRA,",
            "rank and alpha patterns too). Where none says it, α = rank is assumed, and for peft's names that is said.",
            "An α of 0 is refused (tools differ there), and so are values that are not finite, layers that",
            "lack a factor, and these:",
            "",
            *(
                f"- {what}: " + ", ".join(f"`{'<word>' if end == '>' else end}`" for end in ends)
                for ends, what in OTHER_METHODS.items()
            ),
            "",
            "## Learned words",
            "",
            "A file of one learned word (an embedding, textual inversion) becomes a run by `customize import`, is",
            "described by `info` and written for another tool by `export`; `.pt` and `.bin` are pickles and refused.",
            "",
            "| keys | written by | the vectors are |",
            "| --- | --- | --- |",
            f"| {', '.join(f'`{key}`' for key in ALONE)} | A1111, kohya, OneTrainer | of the model's only encoder |",
            f"| {', '.join(f'`{key}`' for key in SLOTS)} | ComfyUI, kohya, OneTrainer, diffusers' advanced scripts "
            "| of the encoder that each names |",
            "| the word itself, as `<cat-toy>` | diffusers | of the only encoder; those of Stable Diffusion XL's "
            "second lie beside, in `learned_embeds_2.safetensors` |",
            "",
            "A file must have vectors for every CLIP of the model, of its width. T5 learns no words beside a CLIP, and",
            "is refused with the name of its tensors.",
            "",
        ]
    )


def test_the_page_of_adapter_files_is_what_the_code_understands() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
