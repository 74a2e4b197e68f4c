"""Files of a Debian package that holds data: where it is installed, given by hand, or fetched without being root."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from declip.errors import UserError

FOLDER_VARIABLE = "DECLIP_DEBIAN"
INSTALLED = Path("/")
PATIENCE = 1800
"""Seconds to fetch a package; the larger has 81 MB."""


@dataclass(frozen=True)
class DebianPackage:
    """A package, as it lies below a root folder.

    Attributes:
        name: Such as "tuxpaint-stamps-default".
        data: Where its data is below the root.
        size: Of the download, in words.
    """

    name: str
    data: str
    size: str


@dataclass(frozen=True)
class Unpacked:
    """A package's files.

    Attributes:
        data: The folder of its data.
        notice: Its copyright file, None where that is missing.
        version: Debian's version, "unknown" where nothing tells it.
    """

    data: Path
    notice: Path | None
    version: str


@contextmanager
def unpacked(package: DebianPackage) -> Iterator[Unpacked]:
    """Find a package's files, or fetch them into a folder that is removed afterwards.

    First the folder that the environment names, then what is installed, then `apt-get download`, which needs no root.

    Args:
        package: Which one.

    Raises:
        UserError: It is nowhere and cannot be fetched; the message says what to install or which folder to give.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        root = Path(given).expanduser()
        if not (root / package.data).is_dir():
            raise UserError(
                f"{FOLDER_VARIABLE} is '{given}', but there is no '{package.data}' below it. Unpack "
                f"{package.name} there: `dpkg-deb -x {package.name}_*.deb '{given}'`."
            )
        yield _at(root, package, "unknown")
    elif (INSTALLED / package.data).is_dir():
        yield _at(INSTALLED, package, _told("dpkg-query", "-W", "-f=${Version}", package.name))
    else:
        with tempfile.TemporaryDirectory() as folder:
            archive = _download(package, Path(folder))
            root = Path(folder, "root")
            _run(package, "dpkg-deb", "-x", str(archive), str(root))
            if not (root / package.data).is_dir():
                raise UserError(f"{archive.name} holds no '{package.data}'. {_by_hand(package)}")
            yield _at(root, package, _told("dpkg-deb", "-f", str(archive), "Version"))


def _at(root: Path, package: DebianPackage, version: str) -> Unpacked:
    notice = root / "usr/share/doc" / package.name / "copyright"
    return Unpacked(root / package.data, notice if notice.is_file() else None, version)


def _download(package: DebianPackage, folder: Path) -> Path:
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise UserError(f"There is no {' and no '.join(missing)} here to fetch {package.name}. {_by_hand(package)}")
    # apt fetches as another user where it can, and says so at length where the folder is not for all.
    folder.chmod(0o755)
    _run(package, "apt-get", "download", "-q", package.name, cwd=folder)
    found = sorted(folder.glob(f"{package.name}_*.deb"))
    if not found:
        raise UserError(f"apt-get brought no {package.name}. {_by_hand(package)}")
    return found[0]


def _run(package: DebianPackage, *command: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} took more than {PATIENCE} s for {package.name}. Try again later.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        why = lines[-1].removeprefix("E:").strip() if lines else "it gave no reason"
        raise UserError(f"{command[0]} could not fetch {package.name}: {why}. {_by_hand(package)}")


def _told(*command: str) -> str:
    """What a command prints, "unknown" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if not done.returncode and done.stdout.strip() else "unknown"


def _by_hand(package: DebianPackage) -> str:
    return (
        f"On Debian or Ubuntu, run `apt-get update` and then `apt-get install {package.name}` ({package.size}). "
        f"Elsewhere, fetch the package {package.name} from a Debian mirror, unpack it into a folder so that this holds "
        f"'{package.data}', and set {FOLDER_VARIABLE} to the folder."
    )
