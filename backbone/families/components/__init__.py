"""Components of models, as several families have them: loading, latents, language models."""
