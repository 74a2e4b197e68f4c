"""``python -m declip`` is the command ``declip``."""

from declip.cli.app import main

if __name__ == "__main__":
    main()
