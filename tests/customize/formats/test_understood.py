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
        "sd-scripts, LyCORIS, OneTrainer, SimpleTuner, XLabs and ComfyUI.",
        "`python -m tests.customize.formats.test_understood` generates this page.",
        "",
        "## Names of layers",
        "",
        "Limner looks names up among the networks' own layers, with dots or underscores, in diffusers' names or those",
        "of the original code. If no network has the name, it refuses the file and prints the name.",
        "",
        "| prefix of the name | layer of |",
        "| --- | --- |",
        *(f"| `{prefix}` | {COMPONENTS[component]} |" for prefix, (component, _) in PREFIXES.items()),
        "| none of these | the denoiser, or else the first CLIP |",
        "",
        f"peft's `{PEFT_PREFIX}` may come before or after the prefix.",
        "",
        "| network | known layers (`#`: any number) | names of the original code |",
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
            "T5's layers are not supported. Limner splits a joint layer of queries, keys and values; of a LoKr only if",
            "its blocks end at the boundaries.",
            "",
            "## Kinds of factors",
            "",
            "| kind | read | in a run (`import`) | `export` |",
            "| --- | --- | --- | --- |",
            "| LoRA, LoCon (also with `lora_mid`), as matrices or kernels | yes | yes | all |",
            "| DoRA, scales over outputs `[out, 1]` | yes | yes | all |",
            "| DoRA, scales over inputs `[1, in]` (OneTrainer's) | yes | refused: `merge --bake` it | kohya, comfyui |",
            "| DoRA from `export --to comfyui`, whose scales belong to one base | `info` | yes | after `import` |",
            "| full differences of matrices and kernels (`.diff`) | yes | as an equivalent LoRA | all |",
            "| LoHa, LoKr of any division and factorisation | yes | yes | kohya, comfyui |",
            "| DoRA of a LoHa or LoKr; several kinds in one file | yes | as an equivalent LoRA | kohya, comfyui |",
            "",
            "α comes from the file's `.alpha` tensors, its metadata, or peft's `adapter_config.json` (with rsLoRA,",
            "rank and alpha patterns). If none gives it, Limner assumes α = rank; for peft's names a message says so.",
            "It refuses an α of 0 (tools treat it differently), values that are not finite, layers that lack a",
            "factor, and these:",
            "",
            *(
                f"- {what}: " + ", ".join(f"`{'<word>' if end == '>' else end}`" for end in ends)
                for ends, what in OTHER_METHODS.items()
            ),
            "",
            "## Learned words",
            "",
            "`customize import` turns a file of one learned word (an embedding, textual inversion) into a run, `info`",
            "describes it, and `export` writes it for another tool. `.pt` and `.bin` are pickles and refused.",
            "",
            "| keys | written by | vectors of |",
            "| --- | --- | --- |",
            f"| {', '.join(f'`{key}`' for key in ALONE)} | A1111, kohya, OneTrainer | the model's only encoder |",
            f"| {', '.join(f'`{key}`' for key in SLOTS)} | ComfyUI, kohya, OneTrainer, diffusers' advanced scripts "
            "| the encoder that each key names |",
            "| the word itself, like `<cat-toy>` | diffusers | the only encoder; for Stable Diffusion XL's second, "
            "put `learned_embeds_2.safetensors` beside it |",
            "",
            "A file must have vectors for every CLIP of the model, of its width. T5 learns no words beside a CLIP;",
            "Limner refuses its vectors and names the tensors.",
            "",
        ]
    )


def test_the_page_of_adapter_files_is_what_the_code_understands() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
