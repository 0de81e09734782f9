"The repository keeps its own rules: what tools would break silently, what must stay light, what must stay in step."
import ast
import configparser
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import daclip_repro
from daclip_repro.cli import app

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT/"experiments").glob("*.ipynb"))
HEAVY = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "papermill", "open_clip", "nbformat"}


def settings():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def project_files():
    "What is committed or would be: tracked and new files, without ignored ones."
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT/os.fsdecode(o) for o in out.split(b"\0") if o and (ROOT/os.fsdecode(o)).is_file()]


def python(code, **kw):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kw)


# --- the `parameters` tag

def tags_after_clean(folder, config):
    "Tags of a parameters cell after the real nbdev_clean under the given settings."
    cell = dict(cell_type="code", execution_count=1, id="p", metadata=dict(tags=["parameters"]), outputs=[], source=["steps = 2"])
    (folder/"settings.ini").write_text(config)
    (folder/"exp.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    nowhere = dict(XDG_CONFIG_HOME=str(folder), XDG_CONFIG_DIRS=str(folder), HOME=str(folder))  # a developer's own nbdev settings stay out
    done = subprocess.run([Path(sys.executable).parent/"nbdev_clean", "--fname", "exp.ipynb"],
                          cwd=folder, env=os.environ | nowhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after = json.loads((folder/"exp.ipynb").read_text())["cells"][0]
    assert after["execution_count"] is None, "nbdev_clean did not run"
    return after["metadata"].get("tags")


def test_parameters_tag_survives_nbdev_clean_because_of_the_setting(tmp_path):
    config = (ROOT/"settings.ini").read_text()
    assert tags_after_clean(tmp_path, config) == ["parameters"]
    without = re.sub(r"^allowed_cell_metadata_keys.*\n", "", config, flags=re.M)
    assert without != config
    assert tags_after_clean(tmp_path, without) is None


# --- light imports

def command_paths(command, path=()):
    "Every command of the app, found in the app."
    yield path
    for name, sub in getattr(command, "commands", {}).items(): yield from command_paths(sub, (*path, name))


def test_importing_the_package_is_light():
    out = python(f"import sys, daclip_repro; print(*{HEAVY!r} & set(sys.modules))")
    assert (out.returncode, out.stdout.strip()) == (0, ""), out.stdout + out.stderr


@pytest.mark.parametrize("path", list(command_paths(typer.main.get_command(app))), ids=lambda p: " ".join(p) or "daclip")
def test_help_is_light(path):
    ask = f"import sys; from daclip_repro.cli import main; code = main({[*path, '--help']!r})"
    out = python(f"{ask}; print('loaded:', *{HEAVY!r} & set(sys.modules)); sys.exit(code)")
    assert out.returncode == 0, out.stderr
    assert "Usage:" in out.stdout and out.stdout.splitlines()[-1].strip() == "loaded:", out.stdout.splitlines()[-1]


# --- what is written once

def test_one_version():
    assert settings()["version"] == metadata.version("daclip_repro") == daclip_repro.__version__


def test_command_is_installed():
    assert [e.value for e in metadata.entry_points(group="console_scripts", name="daclip")] == ["daclip_repro.cli:main"]


def test_readme_is_in_step():
    from daclip_repro.readme import write_readme
    assert write_readme(ROOT, check=True) == [], "run: daclip readme"


# --- requirements

def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT/"constraints.txt").read_text().splitlines()]
    pairs = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if line]
    assert all(pairs), "constraints.txt holds a line that is no exact pin"
    return {canonicalize_name(m[1]): m[2] for m in pairs}


def test_everything_that_is_needed_is_pinned_and_installed_so():
    pinned, seen = pins(), set()
    todo = [*settings()["requirements"].split(), *settings()["dev_requirements"].split(), "setuptools", "wheel"]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen: continue
        seen.add(name)
        installed = metadata.version(name)
        assert pinned.get(name) == installed, f"{name} {installed} is installed, constraints.txt says {pinned.get(name)}"
        needs = [Requirement(r) for r in metadata.requires(name) or []]
        todo += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split(".")[0]


def test_requirements_name_every_import():
    "A package that comes only because another one needs it may go when that one changes."
    listed = {k: {canonicalize_name(o) for o in settings()[k].split()} for k in ("requirements", "dev_requirements")}
    owners, missing = metadata.packages_distributions(), set()
    for path in (ROOT/"daclip_repro").rglob("*.py"):
        allowed = listed["requirements"]
        if path.name in ("readme.py", "website.py"): allowed = allowed | listed["dev_requirements"]  # made by developers
        for module in set(imports_of(path)) - sys.stdlib_module_names - {"daclip_repro"}:
            if not allowed & {canonicalize_name(o) for o in owners.get(module, [])}: missing.add(f"{path.name}: {module}")
    assert not missing, f"not in settings.ini: {sorted(missing)}"


# --- what must not be in it

def test_no_paths_of_a_developers_machine():
    names = "|".join(["wo" "rk/", "ro" "ot/", "tmp/" "bash_jobs", "ho" "me/[a-z]", "Us" "ers/[a-z]"])
    path = re.compile(rb"(?<![\w+/.:-])/(" + names.encode() + rb")")  # not inside a URL or a picture's base64
    found = [f"{f.relative_to(ROOT)}: {m[0].decode()}" for f in project_files() for m in path.finditer(f.read_bytes())]
    assert not found, found


def test_package_data_stays_small():
    sizes = {f: f.stat().st_size for f in project_files() if f.is_relative_to(ROOT/"daclip_repro"/"weights")}
    assert sum(sizes.values()) <= 60e6, sizes


# --- experiments

def test_there_are_experiments():
    assert EXPERIMENTS


def processor_seconds():
    "Of this process and the kernels it has ended: unlike the clock on the wall, the same on a busy machine."
    return sum(os.times()[:4])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_runs_with_its_defaults(path, tmp_path):
    from daclip_repro.sweeps.papermill import execute
    cells = json.loads(path.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1, "expected exactly one cell with the tag `parameters`"
    before = {p: p.stat().st_mtime_ns for p in path.parent.rglob("*")}
    start = processor_seconds()
    execute(path, tmp_path/"out.ipynb")
    assert processor_seconds() - start < 60, "the defaults are a smoke test: they have to end in seconds"
    assert {p: p.stat().st_mtime_ns for p in path.parent.rglob("*")} == before, "the notebook wrote beside itself"
    outputs = [o for c in json.loads((tmp_path/"out.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert any(mime.startswith("image/") for o in outputs for mime in o.get("data", {})), "a report without a picture"


def test_each_experiment_has_a_sweep_file():
    from daclip_repro.sweeps.papermill import load_sweep
    for path in EXPERIMENTS: load_sweep(path.with_suffix(".yaml"))
