"""Making the embedded model, part by part. Every recipe goes on where it was stopped; `--device cuda` uses a GPU.

python -m recipes.moji.data.pictures --scenes 40000     rendered scenes and textures      (needs the emoji font)
python -m recipes.moji.data.tokenizer
python -m recipes.moji.text_encoder                pretraining, before the denoiser trains it
python -m recipes.moji.autoencoder                 then, any time: --decoder-only
python -m recipes.moji.denoiser encode             the scenes' latents
python -m recipes.moji.denoiser train --processes 2
python -m recipes.moji.scorer
python -m recipes.moji.classifier                       for the benchmarks only
python -m recipes.moji.denoiser export --out backbone/moji
"""
