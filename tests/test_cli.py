"The `daclip` command: wrong input ends in one sentence and changes nothing; interrupted commands continue."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from daclip_repro.cli import main
from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.photos import load_image, save_image

DACLIP = str(Path(sys.executable).parent/"daclip")


def tree(folder):
    "Every file below a folder with its content."
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working folder with three small photographs."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DACLIP_TRACEBACK", raising=False)
    for i, name in enumerate(("a", "b", "c")):
        save_image(torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(i)), f"photos/{name}.png")
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# what is put into the folder, the command line, what the sentence has to name
MALFORMED = {
    "unknown command": ({}, "chek photos", "chek"),
    "argument missing": ({}, "check", "folder"),
    "option unknown": ({}, "check photos --fast", "--fast"),
    "option without value": ({}, "degrade photos --out", "--out"),
    "check: no folder": ({}, "check nothere", "nothere"),
    "check: a file": ({"file": "x"}, "check file", "file"),
    "degrade: no folder": ({}, "degrade nothere --out o", "nothere"),
    "degrade: a file": ({"file.png": "x"}, "degrade file.png --out o", "file.png"),
    "degrade: no photographs": ({"empty/readme.txt": "x"}, "degrade empty --out o", "empty"),
    "degrade: no --out": ({}, "degrade photos", "--out"),
    "degrade: unknown word": ({}, "degrade photos --out o --words hazy,foggy", "foggy"),
    "degrade: empty word": ({}, "degrade photos --out o --words ''", "--words"),
    "degrade: negative severity": ({}, "degrade photos --out o --severity -1", "severity"),
    "degrade: severity nan": ({}, "degrade photos --out o --severity nan", "severity"),
    "degrade: severity no number": ({}, "degrade photos --out o --severity strong", "--severity"),
    "degrade: negative seed": ({}, "degrade photos --out o --seed -1", "--seed"),
    "degrade: unknown split": ({}, "degrade photos --out o --split test", "test"),
    "degrade: out among the photographs": ({}, "degrade photos --out photos/o", "photos/o"),
    "degrade: out is a file": ({"o": "x"}, "degrade photos --out o", "o"),
    "degrade: empty file": ({"photos/z.png": b""}, "degrade photos --out o", "z.png"),
    "degrade: not an image": ({"photos/z.png": b"GIF89?"}, "degrade photos --out o", "z.png"),
    "degrade: same stem": ({"photos/a.jpg": b"x"}, "degrade photos --out o", "a.jpg"),
    "train: no folder": ({}, "train --photos nothere --out o", "nothere"),
    "train: no configuration": ({}, "train --photos photos --out o --config nothere.yaml", "nothere.yaml"),
    "train: configuration is no YAML": ({"c.yaml": "a: [1"}, "train --photos photos --out o --config c.yaml", "c.yaml"),
    "train: configuration is a list": ({"c.yaml": "- 1"}, "train --photos photos --out o --config c.yaml", "c.yaml"),
    "train: unknown key": ({"c.yaml": "stepz: 3"}, "train --photos photos --out o --config c.yaml", "stepz"),
    "train: neither photographs nor pairs": ({}, "train --out o", "--photos or --pairs"),
    "train: photographs and pairs": ({}, "train --out o --photos photos --pairs photos", "one of the two"),
    "train: pairs for a CLIP": ({}, "train --out o --pairs photos --config clip-miniature", "labelled photographs"),
    "train: pairs for a prior": ({}, "train --out o --pairs photos --config prior-miniature", "photographs: give --photos and --captions"),
    "train: pairs for an autoencoder": ({}, "train --out o --pairs photos --config autoencoder-miniature", "photographs: give --photos"),
    "train: a DA-CLIP without captions":
        ({"c.yaml": "base: daclip-miniature\ncontent: caption"}, "train --out o --photos photos --config c.yaml", "has no caption"),
    "train: photographs to hold out of pairs": ({}, "train --out o --pairs photos --held-out photos", "their own folder val"),
    "train: photographs to hold out of a CLIP's":
        ({}, "train --out o --photos photos --held-out photos --config clip-miniature", "--held-out"),
    "train: wild pairs": ({"c.yaml": "chain: wild\ncondition: none"}, "train --out o --pairs photos --config c.yaml", "chain is 'wild'"),
    "train: unknown chain": ({"c.yaml": "chain: tame"}, "train --out o --photos photos --config c.yaml", "words, wild"),
    "train: too gray": ({"c.yaml": "gray: 1.5"}, "train --out o --photos photos --config c.yaml", "gray"),
    "train: no steps": ({}, "train --photos photos --out o --steps 0", "--steps"),
    "sweep: no file": ({}, "sweep nothere.yaml", "nothere.yaml"),
    "sweep: no YAML": ({"s.yaml": "a: [1"}, "sweep s.yaml", "s.yaml"),
    "sweep: empty": ({"s.yaml": ""}, "sweep s.yaml", "s.yaml"),
    "sweep: binary": ({"s.yaml": b"\xff\x00\x80"}, "sweep s.yaml", "s.yaml"),
    "sweep: unknown key": ({"s.yaml": "notebok: x.ipynb\nprofiles: {}\n"}, "sweep s.yaml", "notebook"),
    "sweep: no workers": ({}, "sweep s.yaml --workers 0", "--workers"),
    "status: no file": ({}, "status nothere.yaml", "nothere.yaml"),
    "tables: no file": ({}, "tables nothere.yaml", "nothere.yaml"),
    "readme: outside of the repository": ({}, "readme", "settings.ini"),
}


@pytest.mark.parametrize("files,line,names", MALFORMED.values(), ids=MALFORMED)
def test_malformed_input_is_one_sentence(files, line, names, here, capsys):
    import shlex
    for name, content in files.items(): write(here/name, content)
    before = tree(here)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"daclip: [^\n]+\n", err), err
    assert names in err and "Traceback" not in err and "Errno" not in err, err
    assert tree(here) == before, "something was left behind"


def test_real_command_has_one_line_and_exit_code(here):
    done = subprocess.run([DACLIP, "check", "nothere"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "daclip: nothere: no such folder\n")


def test_truncated_photograph_stops_before_anything_is_written(here, capsys):
    whole = Path("photos/c.png").read_bytes()
    Path("photos/c.png").write_bytes(whole[:len(whole)//2])
    assert main(["degrade", "photos", "--out", "o"]) == 2
    assert "c.png" in capsys.readouterr().err and not Path("o").exists()


def test_traceback_on_request(here, monkeypatch):
    monkeypatch.setenv("DACLIP_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError): main(["check", "nothere"])


def test_our_own_mistakes_keep_their_traceback(here, monkeypatch):
    def broken(*a, **k): raise KeyError("bug")
    monkeypatch.setattr("daclip_repro.photos.check_pairs", broken)
    with pytest.raises(KeyError): main(["check", "photos"])


def test_no_arguments_is_help(capsys):
    assert main([]) == 0
    assert "degrade" in capsys.readouterr().out


def test_closed_pipe_is_silent(here):
    main(["degrade", "photos", "--out", "o", "--words", "noisy"])
    shutil.rmtree("o/train/noisy/GT")
    done = subprocess.run(["bash", "-c", f"'{DACLIP}' check o | true"], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


# --- degrade and check

def test_degrade_makes_the_layout_that_check_accepts(here, capsys):
    assert main(["degrade", "photos", "--out", "o"]) == 0
    assert main(["check", "o"]) == 0
    files = [p for p in tree(here/"o") if p.endswith(".png")]
    assert len(files) == 3 * len(DEGRADATIONS) * 2
    assert {p.split("/")[0] for p in files} == {"train", "val"}
    assert torch.equal(load_image("o/val/noisy/GT/a.png"), load_image("photos/a.png"))
    assert not torch.equal(load_image("o/val/noisy/LQ/a.png"), load_image("photos/a.png"))
    os.remove("o/train/hazy/LQ/b.png")
    capsys.readouterr()
    assert main(["check", "o"]) == 1
    assert "hazy" in capsys.readouterr().out


def test_degrade_again_changes_nothing_and_other_options_are_refused(here, capsys):
    line = ["degrade", "photos", "--out", "o", "--words", "noisy,rainy"]
    assert main(line) == 0
    times = {p: p.stat().st_mtime_ns for p in Path("o").rglob("*")}
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("6 pairs of 3 photographs, 0 new")
    for other in (["--seed", "1"], ["--severity", ".5"]): assert main(line + other) == 2
    assert "o/" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("o").rglob("*")} == times


def test_a_photograph_that_is_added_changes_no_other_pair(here):
    assert main(["degrade", "photos", "--out", "o", "--split", "train"]) == 0
    before = tree(here/"o")
    save_image(torch.rand(3, 20, 20), "photos/a_new.png")
    assert main(["degrade", "photos", "--out", "o", "--split", "train"]) == 0
    after = tree(here/"o")
    assert {k: after[k] for k in before} == before and len(after) == len(before) + 2 * len(DEGRADATIONS)


def test_names_that_would_collide_are_refused(here, capsys):
    save_image(torch.rand(3, 8, 8), "photos/x/a.png")
    save_image(torch.rand(3, 8, 8), "photos/x_a.png")
    assert main(["degrade", "photos", "--out", "o", "--split", "val"]) == 2
    assert "same file name" in capsys.readouterr().err and not Path("o").exists()


@pytest.mark.parametrize("sig,code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "kill -9"])
def test_interrupted_degrade_continues_to_the_same_files(here, sig, code):
    for i in range(20): save_image(torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(i)), f"photos/p{i}.png")
    assert main(["degrade", "photos", "--out", "whole"]) == 0
    run = subprocess.Popen([DACLIP, "degrade", "photos", "--out", "o"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(Path().glob("o/*/*/LQ/*.png"))) < 5 and run.poll() is None and time.monotonic() < deadline: time.sleep(.005)
    run.send_signal(sig)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    if sig == signal.SIGINT: assert err.strip().splitlines()[-1].startswith("daclip: interrupted") and "Traceback" not in err
    done = tree("o")
    assert len(done) < len(tree("whole")), "it was not interrupted"
    for name, content in done.items():
        if name.endswith(".png"): assert content == tree("whole")[name], "a half-written file"
    assert main(["degrade", "photos", "--out", "o"]) == 0
    after = {k: v for k, v in tree("o").items() if not k.endswith(".tmp")}
    assert after == tree("whole")
