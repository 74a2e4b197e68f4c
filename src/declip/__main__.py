"""The command ``declip``, also as ``python -m declip``."""

import gc
import sys
import warnings


def main() -> None:
    """Run the command without warnings of libraries, which are for programmers; ours are logged."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    gc.set_threshold(
        20_000
    )  # by default the search for garbage takes a twelfth of the time of torch's and timm's import
    from declip.cli.app import main as run  # not before: some libraries warn while they are imported

    run()


if __name__ == "__main__":
    main()
