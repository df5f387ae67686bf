"""A model of any family, opened: where it is, how it is placed in memory, what is cached of it, how it samples."""
