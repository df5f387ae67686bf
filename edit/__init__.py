"""Changes a picture by changing its prompt: inversion, prompt-to-prompt, SDEdit. Being built; see `cli`."""
