"""The command ``declip``, also as ``python -m declip``."""

import gc
import sys
import warnings


def main() -> None:
    """Run the command without warnings of libraries, which are for programmers; ours are logged."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Searching for garbage by default takes a twelfth of the time in which torch and timm are imported
    gc.set_threshold(20_000)
    # Not before: some libraries warn while they are imported
    from declip.cli.app import main as run

    try:
        run()
    finally:
        gc.freeze()  # else all objects are searched at the end, which takes another second


if __name__ == "__main__":
    main()
