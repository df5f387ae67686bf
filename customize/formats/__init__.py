"""Adapter files of diffusers, peft, kohya, LyCORIS and ComfyUI: read, write, convert, merge, bake into a model."""
