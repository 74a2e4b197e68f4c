"""Workflows, issue templates and constraints: files that only a host or an installer reads."""

import os
import re
import shutil
import subprocess
import tomllib
from datetime import UTC, datetime

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.blocks import ROOT

HOSTED = ROOT / ".github"
WORKFLOWS = sorted((HOSTED / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def read(path):
    """A YAML file; the key `on` is true in YAML 1.1."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(job):
    return [step.get("run") or step["uses"].partition("@")[0] for step in job["steps"]]


def test_there_are_workflows_for_every_change_and_for_a_release():
    assert [path.stem for path in WORKFLOWS] == ["ci", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_complete_and_trusts_pinned_actions_alone(path):
    workflow = read(path)
    assert {"name", True, "permissions", "jobs"} <= workflow.keys()
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "steps", "timeout-minutes"} <= job.keys(), name
        assert set(job.get("needs", [])) <= workflow["jobs"].keys(), name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name
    used = [
        line.strip(" -")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    assert [line for line in used if not PINNED.match(line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_targets_that_the_makefile_has(path):
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"run: make ([\w-]+)", path.read_text(encoding="utf-8")))
    assert named <= targets


def test_tests_run_with_the_oldest_python_that_is_allowed_and_a_newer_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=")
    jobs = read(HOSTED / "workflows" / "ci.yml")["jobs"]
    pythons = {entry["python"] for entry in jobs["test"]["strategy"]["matrix"]["include"]}
    assert oldest in pythons
    assert len(pythons) > 1
    [torch] = [each for each in project["dependencies"] if each.startswith("torch>=")]
    assert f"torch=={torch.removeprefix('torch>=')}.*" in str(jobs["minimal"]["steps"])


def test_constraints_are_used_where_a_new_release_must_not_break_a_change():
    jobs = read(HOSTED / "workflows" / "ci.yml")["jobs"]
    tested = [entry.get("constraints") for entry in jobs["test"]["strategy"]["matrix"]["include"]]
    assert {None, "constraints.txt"} <= set(tested)
    for job in ("lint", "docs"):
        [environment] = [step["env"] for step in jobs[job]["steps"] if "env" in step]
        assert environment["PIP_CONSTRAINT"].endswith("/constraints.txt"), job


def test_a_release_is_tested_elsewhere_and_published_without_a_secret():
    workflow = read(HOSTED / "workflows" / "release.yml")
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {}
    assert "actions/checkout" not in steps_of(jobs["test"])
    assert {"build", "test", "attest"} <= set(jobs["publish"]["needs"])
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (HOSTED / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_a_release_is_cited_by_its_commit(tmp_path):
    [command] = [
        step["run"]
        for step in read(HOSTED / "workflows" / "release.yml")["jobs"]["build"]["steps"]
        if "CITATION.cff" in step.get("run", "")
    ]
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    host = {
        "GITHUB_SERVER_URL": "https://host",
        "GITHUB_REPOSITORY": "a/b",
        "GITHUB_SHA": "1f" * 20,
    }
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | host, check=True)
    before, after = read(ROOT / "CITATION.cff"), read(tmp_path / "CITATION.cff")
    added = {key: str(value) for key, value in after.items() if key not in before}
    today = datetime.now(UTC).date().isoformat()
    assert added == {
        "commit": "1f" * 20,
        "date-released": today,
        "repository-code": "https://host/a/b",
    }


def test_issue_forms_have_the_fields_that_a_form_needs():
    forms = [
        path for path in sorted((HOSTED / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"
    ]
    assert forms
    for path in forms:
        form = read(path)
        assert {"name", "description", "body"} <= form.keys()
        names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(names) == len(set(names))


def test_constraints_pin_what_development_requires_without_paths_and_hosts():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = dict(line.split("==") for line in lines)
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [
        *project["dependencies"],
        *extras["dev"],
        *extras["onnx"],
        *extras["hf"],
        *extras["docs"],
    ]
    for each in map(Requirement, needed):
        if each.name != "declip":
            assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each
