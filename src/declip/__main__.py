"""``python -m declip`` is the command ``declip``."""

from declip.cli import main

if __name__ == "__main__":
    main()
