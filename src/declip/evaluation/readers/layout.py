"""What a data set's folder must hold, and the error when it does not."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from declip.data.pair import printable
from declip.errors import UserError


def require(name: str, root: Path, expected: Sequence[str]) -> None:
    """Check that files and folders are there.

    Args:
        name: Name of the set.
        root: The folder given for it.
        expected: What is read, relative to `root`; a folder ends in "/".

    Raises:
        UserError: some are not; the message names them and all that is expected.
    """
    missing = [path for path in expected if not _exists(root, path)]
    if missing:
        raise UserError(
            f"'{name}' is not complete in '{root}': {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"there. Expected below that folder: {', '.join(expected)}."
        )


def require_one(name: str, root: Path, choices: Iterable[Sequence[str]]) -> int:
    """Find which of several layouts a folder has; the first that is whole counts.

    Returns:
        Its number.

    Raises:
        UserError: none is whole; the message names them all.
    """
    choices = list(choices)
    for number, expected in enumerate(choices):
        if all(_exists(root, path) for path in expected):
            return number
    layouts = "; or ".join(" with ".join(expected) for expected in choices)
    raise UserError(f"'{name}' is not complete in '{root}'. Expected below that folder: {layouts}.")


def opened(name: str, root: Path, make: Callable[[], Any]) -> Any:
    """Call a library's reader; what it says of damaged or unexpected files becomes an error of the user's data.

    Raises:
        UserError: the files that are there are not those of the set.
    """
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # a library's reader meets a damaged file in any way
        said = printable(str(error).split(" You can use download")[0].rstrip("."))
        raise UserError(
            f"The files of '{name}' in '{root}' are there but are not what was published, or are damaged "
            f"({type(error).__name__}: {said}). Unpack the original archive again."
        ) from error


def below(root: Path, paths: Iterable[str | Path]) -> list[str]:
    """Paths relative to a folder that they all lie in, with forward slashes."""
    start = root.as_posix().rstrip("/") + "/"
    return [Path(path).as_posix().removeprefix(start) for path in paths]


def _exists(root: Path, path: str) -> bool:
    return (root / path).is_dir() if path.endswith("/") else (root / path).is_file()
