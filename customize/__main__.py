"""`python -m customize` is the command `customize`."""

from customize.cli import main

if __name__ == "__main__":
    main()
