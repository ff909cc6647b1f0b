"""Mutation testing: does some test fail whenever a line of a snippet is changed?

    python tools/mutants.py [attention | attention/multi-head]

Every line and branch of a chapter has to be run by its tests before it is worth
changing. Then mutmut changes the snippets one spot at a time and runs the tests. This
fails if a change survives that tests/equivalent_mutants.toml does not explain, if a
run of the tests hangs or crashes (others count that as a kill), if an explanation is
out of date, or if more than 5 % of all changes need one.
"""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests/equivalent_mutants.toml"
LIMIT = 0.05

# mutmut forks after torch is imported. Threads don't survive that: with two of them the
# children hang. (tests/conftest.py calls torch.set_num_threads(1) as well.)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

SETTINGS = """
[tool.mutmut]
source_paths = ["snippets/{chapter}"]
only_mutate = ["snippets/{chapter}/{concept}.py"]
pytest_add_cli_args_test_selection = ["tests/{chapter}"]
"""


def main(target: str = "") -> int:
    chapter, _, concept = target.replace("-", "_").strip("/").partition("/")
    files = sorted(ROOT.glob(f"snippets/{chapter or '*'}/{concept or '*'}.py"))
    if not files:
        sys.exit(f"no snippet is called {target!r}")
    chapters = sorted({file.parent.name for file in files})
    return max([run(chapter, concept or "*") for chapter in chapters])


def run(chapter: str, concept: str) -> int:
    """Tests the mutants of a chapter; returns 1 if there is a complaint, else 0."""
    started = time.monotonic()
    if concept == "*" and not covered(chapter):
        return 1
    scratch = copy(chapter, concept)
    if mutmut(scratch, "run").returncode:
        print(f"{chapter}: mutmut failed")
        return 1
    found = mutmut(scratch, "results", "--all", "true").stdout.split("\n")
    mutants = dict(line.strip().split(": ") for line in found if ": " in line)

    known = tomllib.loads(EQUIVALENT.read_text()).get("equivalent", [])
    known = [e for e in known if Path(e["file"]).match(f"{chapter}/{concept}.py")]
    unused, equivalent, complaints = list(known), 0, []
    for name, status in mutants.items():
        if status == "killed":
            continue
        diff = mutmut(scratch, "show", name).stdout
        file = "/".join(name.split(".")[:3]) + ".py"
        change = file, lines(diff, "-"), lines(diff, "+")
        matches = [e for e in known if (e["file"], e["before"], e["after"]) == change]
        if status == "survived" and matches:
            equivalent += 1
            unused = [e for e in unused if e not in matches]
        else:
            complaints.append(diff)
    for e in unused:
        complaints.append(f"{EQUIVALENT.name}: no such mutant is alive any more: {e}\n")
    if concept == "*" and equivalent > LIMIT * len(mutants):
        complaints.append(f"more than {LIMIT:.0%} of the mutants need an explanation\n")

    statuses = list(mutants.values())
    counts = {s: statuses.count(s) for s in ("killed", "survived", "timeout")}
    other = len(mutants) - sum(counts.values())
    print(*complaints, sep="\n", end="")
    print(
        f"{chapter if concept == '*' else f'{chapter}/{concept}'}: "
        f"{len(mutants)} mutants, {counts['killed']} killed, {equivalent} equivalent, "
        f"{counts['survived'] - equivalent} alive, {counts['timeout']} timed out, "
        f"{other} untested or crashed, in {time.monotonic() - started:.0f} s"
    )
    return int(bool(complaints) or not mutants)


def covered(chapter: str) -> bool:
    """Whether the tests of a chapter run every line and branch of its snippets."""
    flags = ["-q", f"--cov=snippets/{chapter}", "--cov-branch"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{chapter}", *flags],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return done.returncode == 0


def copy(chapter: str, concept: str) -> Path:
    """Lays out a small project of one chapter, for mutmut to work in."""
    scratch = ROOT / "mutants" / chapter
    shutil.rmtree(scratch, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in (f"snippets/{chapter}", f"tests/{chapter}"):
        shutil.copytree(ROOT / folder, scratch / folder, ignore=ignored)
    shutil.copy(ROOT / "tests/conftest.py", scratch / "tests")
    settings = SETTINGS.format(chapter=chapter, concept=concept)
    pyproject = (ROOT / "pyproject.toml").read_text() + settings
    (scratch / "pyproject.toml").write_text(pyproject)
    return scratch


def mutmut(scratch: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=scratch,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return done


def lines(diff: str, sign: str) -> str:
    """The lines that a diff takes out ("-") or puts in ("+"), without their margins."""
    found = [line for line in diff.splitlines() if line.startswith(sign)]
    return "\n".join(line[1:].strip() for line in found if line[:3] != 3 * sign)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
