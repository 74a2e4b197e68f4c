"""The command ``declip``, also as ``python -m declip``."""

import sys
import warnings


def main() -> None:
    """Run the command without warnings of libraries, which are for programmers; ours are logged."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from declip.cli.app import main as run  # not before: some libraries warn while they are imported

    run()


if __name__ == "__main__":
    main()
