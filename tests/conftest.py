"A real Slurm for the tests, brought up for the first that asks for it, gone with the last, whatever happens; a real LaTeX and browser."
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import browser as br
import latex
import pytest
import slurm_cluster as sc

# Started in the background by a script, pytest ignores Ctrl-C, and so does every process that it starts: tests of Ctrl-C would hang.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def slurm_cluster():
    "A running `Cluster`: each worker of `pytest -n` has its own, since tests stop daemons and nodes. Most tests want `slurm`."
    folder = tempfile.mkdtemp(prefix='slurm-')  # not pytest's own folder: its path is too long for a socket
    cluster, here = sc.Cluster(folder), str(os.getpid())
    nowhere = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
    guard = subprocess.Popen([sys.executable, sc.__file__, 'down', '--after', here],  # also when pytest is killed
                             env=os.environ | dict(DACLIP_SLURM=folder), start_new_session=True, **nowhere)
    try:
        try: cluster.up()
        except sc.NoSlurm as e: (pytest.fail if os.environ.get('CI') else pytest.skip)(str(e))
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
        guard.kill(); guard.wait()


@pytest.fixture
def slurm(slurm_cluster, monkeypatch):
    "The running cluster with all its daemons and nodes and without jobs; Slurm's commands, and submitit, find it."
    for key in [k for k in os.environ if k.startswith(('SLURM_', 'SBATCH_'))]: monkeypatch.delenv(key)
    for key, value in slurm_cluster.env.items(): monkeypatch.setenv(key, value)
    yield slurm_cluster
    slurm_cluster.up()
    slurm_cluster.clear()


@pytest.fixture(scope='session')
def typeset():
    "Compiles a LaTeX file and gives the log."
    if packages := latex.missing():
        (pytest.fail if os.environ.get('CI') else pytest.skip)(f"LaTeX is not installed; missing: {' '.join(packages)}")
    return latex.typeset


@pytest.fixture(scope='session')
def chromium():
    "A headless Chromium, driven by Playwright."
    try:
        with br.chromium() as browser: yield browser
    except br.NoBrowser as e: (pytest.fail if os.environ.get('CI') else pytest.skip)(str(e))
