"""`python -m edit` is the command `edit`."""

from edit.cli import main

if __name__ == "__main__":
    main()
