"""Sweeps on a real Slurm: whatever is done to one, it ends in the table of an undisturbed one, nothing lost and nothing done twice."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sweep_tools import python, sweep_file, wait_for

from daclip_repro.sweeps.launch import cancel, leftovers, logs, make_plan, read_rows, run_sweep
from daclip_repro.sweeps.papermill import load_sweep

# Photographs that take a while each. What is finished is kept; `computed` tells whether anything was computed twice.
SLOW = """import random, time
from pathlib import Path
from daclip_repro.sweeps.records import PartialRows, save_rows
photos = [f'photo {i}' for i in range(8)]
kept = PartialRows(run_dir, total=len(photos))
for photo in photos:
    if photo in kept: continue
    time.sleep(pause)
    with Path(run_dir, 'computed').open('a') as f: f.write(photo + '\\n')
    kept.add(photo, [dict(photo=photo, psnr=random.Random(f'{seed} {photo}').random())])
save_rows(kept.all(photos), run_dir)"""
PARAMETERS = "seed = 0\npause = 0.0\nrun_dir = ''"
RESOURCES = dict(partition='main', cpus=1, grace_seconds=10)


def slow_sweep(folder, runs=3, pause=.7, **resources):
    profile = dict(parameters=dict(pause=pause), seeds=list(range(runs)), resources=RESOURCES | resources)
    return sweep_file(folder, profile, SLOW, name='slow', parameters=PARAMETERS)


def send(path): return run_sweep(path, cluster='slurm')


def ended(path): return all(k.state not in ('queued', 'running') for k in make_plan(path).looks)


def kept(run):
    try: return len((run.folder/'computed').read_text().splitlines())
    except FileNotFoundError: return 0


def running(path, items=2):
    "The runs, once every one that is going on has kept some items."
    runs = load_sweep(path).runs()
    wait_for(lambda: sum(kept(r) >= items for r in runs) >= min(len(runs), 3), 120)
    return runs


def check_table(path, restarts=1):
    "The table is that of an undisturbed sweep, and at most one item was computed twice for each restart: the one that was cut off."
    runs, rows = load_sweep(path).runs(), read_rows(path)
    assert [k.state for k in make_plan(path).looks] == ['done'] * len(runs)
    expected = [(r.id, r.parameters['seed'], f'photo {i}') for r in runs for i in range(8)]
    assert list(zip(rows.run, rows.seed, rows.photo)) == expected
    from random import Random
    assert list(rows.psnr) == [Random(f'{seed} {photo}').random() for _, seed, photo in expected]
    assert all(8 <= kept(r) <= 8 + restarts for r in runs)


def number(path):
    "The number of the only job that was sent."
    sent, = (path.parent/'runs'/path.stem/'.jobs').glob('*/sent.json')
    return json.loads(sent.read_text())['job']


@pytest.fixture
def busy(slurm, tmp_path, monkeypatch):
    "A sweep of three runs that go on in the cluster at this moment."
    monkeypatch.delenv('DACLIP_RUNS', raising=False)
    path = slow_sweep(tmp_path)
    assert send(path).queued == 3
    running(path)
    return path


# -- faults -----------------------------------------------------------------------------------------------------------

def test_array_of_twelve_gives_the_table_of_a_local_sweep(slurm, tmp_path):
    tables = []
    for cluster in ('slurm', 'local'):
        folder = tmp_path/cluster
        folder.mkdir()
        path = sweep_file(folder, dict(grid=dict(method=['sde', 'posterior'], seed=[0, 1, 2, 3, 4, 5]), resources=RESOURCES))
        summary = run_sweep(path, cluster=cluster, progress=False)
        if cluster == 'slurm': assert (summary.queued, len(summary.jobs)) == (12, 1)
        wait_for(lambda path=path: ended(path))
        tables.append(read_rows(path))
    assert len(tables[0]) == 24 and tables[0].equals(tables[1])


def test_requeued_by_an_administrator(slurm, busy):
    slurm.run('scontrol', 'requeue', f'{number(busy)}_1')
    wait_for(lambda: ended(busy))
    check_table(busy)
    assert [len(r.attempts()) for r in load_sweep(busy).runs()] == [1, 2, 1]


@pytest.mark.parametrize('grace', [0, 8])
def test_preempted_by_somebody_more_important(slurm, tmp_path, grace):
    slurm.run('scontrol', 'update', 'PartitionName=main', f'GraceTime={grace}')
    path = slow_sweep(tmp_path, cpus=3) # two nodes of four CPUs: the third run waits
    send(path)
    runs = load_sweep(path).runs()
    wait_for(lambda: sum(kept(r) > 1 for r in runs) == 2)
    urgent = slurm.submit('sleep 2', '--partition=urgent', '--cpus-per-task=4', '--nodes=2')
    wait_for(lambda: ended(path))
    slurm.wait(urgent, 'COMPLETED')
    check_table(path)
    assert sum(len(r.attempts()) for r in runs) > 3
    slurm.run('scontrol', 'update', 'PartitionName=main', 'GraceTime=0')


def test_time_limit_in_the_middle_of_a_run(slurm, tmp_path):
    path = slow_sweep(tmp_path, runs=2, pause=8., minutes=1, grace_seconds=40) # 64 seconds of work: never done within the limit
    send(path)
    wait_for(lambda: ended(path))
    check_table(path, restarts=5)
    assert max(len(r.attempts()) for r in load_sweep(path).runs()) > 1, 'the limit was never reached'


def test_cancelled_and_tried_again(slurm, busy):
    slurm.run('scancel', f'{number(busy)}_2')
    wait_for(lambda: ended(busy))
    look = make_plan(busy).looks[2]
    assert (look.state, look.kind) == ('failed', 'job') and f'its job {number(busy)}_2 ended (cancelled' in look.note
    assert send(busy).queued == 1
    wait_for(lambda: ended(busy))
    check_table(busy)


def test_kernel_is_killed(slurm, busy):
    run = load_sweep(busy).runs()[0]
    kernel = [p for p in psutil.Process(run.holder()[1]).children() if 'ipykernel' in ' '.join(p.cmdline())]
    kernel[0].kill()
    wait_for(lambda: ended(busy))
    check_table(busy)
    assert len(run.attempts()) == 2


def test_controller_is_killed_and_comes_back(slurm, busy):
    start = time.time()
    wait_for(lambda: (slurm.folder/'slurmctld'/'job_state').stat().st_mtime > start) # newer jobs than it has saved are lost with it
    slurm.restart('slurmctld', sig=signal.SIGKILL)
    wait_for(lambda: ended(busy))
    check_table(busy)


def test_node_goes_down_and_comes_back(slurm, busy):
    slurm.set_node('down', 'n1')
    wait_for(lambda: any(len(r.attempts()) > 1 or k.state == 'queued' for r, k in zip(load_sweep(busy).runs(), make_plan(busy).looks)))
    slurm.set_node('resume', 'n1')
    wait_for(lambda: ended(busy))
    check_table(busy)


def test_sender_is_killed_after_sending(slurm, tmp_path):
    path = slow_sweep(tmp_path)
    send_and_stay = f'run_sweep({str(path)!r}, cluster="slurm"); import time; time.sleep(600)'
    sender = python(f'from daclip_repro.sweeps.launch import run_sweep; {send_and_stay}')
    running(path)
    sender.kill(), sender.wait()
    assert send(path).queued == 0
    wait_for(lambda: ended(path))
    check_table(path)


def test_sender_is_killed_while_sending(slurm, tmp_path, monkeypatch):
    "After sbatch has accepted the jobs, and before anybody has noted their number."
    real, fake = shutil.which('sbatch'), tmp_path/'bin'/'sbatch'
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n{real} "$@"\nkill -9 $PPID\n')
    fake.chmod(0o755)
    path = slow_sweep(tmp_path)
    sender = python(f'from daclip_repro.sweeps.launch import run_sweep; run_sweep({str(path)!r}, cluster="slurm")',
                    env=os.environ | dict(PATH=f'{fake.parent}:{os.environ["PATH"]}'))
    assert sender.wait() == -signal.SIGKILL
    plan = make_plan(path)
    assert len(plan.going) == 3 and number(path) is None and send(path).queued == 0 # known by their name
    assert len(cancel(path)) == 3
    wait_for(lambda: ended(path))
    assert send(path).queued == 3
    wait_for(lambda: ended(path))
    check_table(path)


def test_sent_twice_at_once(slurm, tmp_path):
    path = slow_sweep(tmp_path)
    senders = [python(f'from daclip_repro.sweeps.launch import run_sweep; print(run_sweep({str(path)!r}, cluster="slurm").queued)',
                      text=True, stdout=subprocess.PIPE) for _ in range(2)]
    assert sorted(int(s.communicate()[0]) for s in senders) == [0, 3]
    wait_for(lambda: ended(path))
    check_table(path, restarts=0)
    assert [len(r.attempts()) for r in load_sweep(path).runs()] == [1, 1, 1]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.getuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting a small disk takes root')
    yield disk
    subprocess.run(['umount', '--lazy', disk], check=True)


def test_disk_is_full(slurm, tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv('DACLIP_RUNS', str(small_disk))
    path = slow_sweep(tmp_path, runs=2)
    send(path)
    runs = load_sweep(path).runs()
    wait_for(lambda: all(kept(r) > 1 for r in runs))
    with open(small_disk/'ballast', 'wb') as f:
        try:
            while True: f.write(bytes(65536)), f.flush()
        except OSError: pass
    wait_for(lambda: ended(path))
    looks = make_plan(path).looks
    assert all(k.state == 'failed' and k.kind in ('machine', 'job') for k in looks), looks
    (small_disk/'ballast').unlink()
    assert send(path).queued == 2 # by itself: it was not the code
    wait_for(lambda: ended(path))
    check_table(path, restarts=4)


def test_failure_of_the_code_is_not_repeated_and_harms_no_other(slurm, tmp_path):
    path = sweep_file(tmp_path, dict(seeds=[0, 1, 2], resources=RESOURCES), 'if seed == 1: 1 / 0', SLOW, parameters=PARAMETERS)
    send(path)
    wait_for(lambda: ended(path))
    plan = make_plan(path)
    assert [k.state for k in plan.looks] == ['done', 'failed', 'done'] and 'ZeroDivisionError' in plan.looks[1].note
    assert plan.todo == [] and len(make_plan(path, retry='failed').todo) == 1
    job = (path.parent/'runs'/'tiny'/'.jobs')
    assert slurm.states(json.loads(next(job.glob('*/sent.json')).read_text())['job']) == ['COMPLETED', 'FAILED', 'COMPLETED']
    said = logs(plan.looks[1].run.id[:8], plan.looks[1].run.root)
    assert 'ZeroDivisionError' in said and 'failed (code) at' in said and 'submitit INFO' in said
    assert [p.parent.name for p in leftovers(path)] == ['.jobs'] # the notes of jobs that have ended


# -- training ---------------------------------------------------------------------------------------------------------

TRAIN = """import time, torch
from dataclasses import replace
from daclip_repro.photos import packaged_photos
from daclip_repro.sweeps.records import Progress, save_rows
from daclip_repro.loop import make_config, to_bytes
from daclip_repro.training import CONFIGS, RestorerTrainer
network = dict(nf=8, ch_mult=(1, 2), scale=.5)
config = make_config(dict(network=network, condition='none', steps=steps, batch=2, patch=16, warmup=2), CONFIGS['sampling-miniature'])
trainer = RestorerTrainer(config, run_dir, 'cpu')
bar = Progress(run_dir, steps, trainer.step)
def watch(trainer):
    time.sleep(pause)
    bar.update(trainer.step)
trainer.fit(to_bytes(packaged_photos()[:2], 32), save_every=1, log_every=1, watch=(watch,), progress=False)
save_rows([dict(photo='all', loss=trainer.log[-1]['loss'])], run_dir)"""


def test_training_requeued_five_times_ends_with_the_same_weights(slurm, tmp_path):
    import torch
    profile = dict(parameters=dict(pause=1.), resources=RESOURCES)
    weights = []
    for name, pause in (('disturbed', 1.), ('undisturbed', 0.)):
        folder = tmp_path/name
        folder.mkdir()
        path = sweep_file(folder, profile | dict(parameters=dict(pause=pause)), TRAIN, name='train', parameters=PARAMETERS + '\nsteps = 24')
        run, = load_sweep(path).runs()
        send(path)
        for times in range(5 if name == 'disturbed' else 0):
            begun = run.progress()[0] if run.progress() else 0
            wait_for(lambda r=run, n=times, b=begun: len(r.attempts()) == n + 1 and r.running() and (r.progress() or [0])[0] >= b + 2)
            slurm.run('scontrol', 'requeue', number(path))
        wait_for(lambda path=path: ended(path))
        assert run.status() == 'done' and len(run.attempts()) == (6 if name == 'disturbed' else 1)
        weights.append(torch.load(run.folder/'checkpoint.pt', weights_only=True))
    for part in ('model', 'average'):
        assert all(torch.equal(a, b) for a, b in zip(weights[0][part].values(), weights[1][part].values(), strict=True))


# -- size -------------------------------------------------------------------------------------------------------------

def test_a_thousand_runs(slurm, tmp_path, monkeypatch):
    real, fake = shutil.which('sbatch'), tmp_path/'bin'/'sbatch'
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho >>{tmp_path}/calls\nexec {real} "$@"\n')
    fake.chmod(0o755)
    path = sweep_file(tmp_path, dict(seeds=list(range(1000)), resources=RESOURCES), SLOW, parameters=PARAMETERS)
    before = slurm.conf.read_text()
    try:
        slurm.up(MaxArraySize=301)
        slurm.set_node('down')
        daclip = Path(sys.executable).parent/'daclip'
        said = subprocess.run([daclip, 'sweep', path, '--cluster', 'slurm', '--dry-run'], capture_output=True, text=True)
        assert '1000 to do' in said.stdout and 'job arrays: 4' in said.stdout and 'GPU-hours' in said.stdout, said
        assert not (tmp_path/'calls').exists() and not (tmp_path/'runs').exists()
        monkeypatch.setenv('PATH', f'{fake.parent}:{os.environ["PATH"]}')
        assert send(path).queued == 1000 and len((tmp_path/'calls').read_text()) <= 4 + 1
        assert [k.state for k in make_plan(path).looks] == ['queued'] * 1000 and send(path).queued == 0
        assert len(cancel(path, only=['seed=7'])) == 1 and len(make_plan(path).going) == 999
        assert len(cancel(path)) == 999
    finally:
        slurm.conf.write_text(before)
        slurm.clear()
        slurm.restart('slurmctld')


# -- refused before anything starts -----------------------------------------------------------------------------------

@pytest.mark.parametrize('resources, expected', [
    (dict(partition='mian'), "resources.partition: this cluster has no partition 'mian'; did you mean 'main'?"),
    (dict(constraint='h999'), 'Slurm refused the jobs: sbatch: error:'), (dict(gpus=64), 'Slurm refused the jobs: sbatch: error:')])
def test_what_the_cluster_cannot_do(slurm, tmp_path, resources, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error: send(slow_sweep(tmp_path, **resources))
    assert '\n' not in str(error.value) and not slurm.run('squeue', '--noheader')
    assert not list((tmp_path/'runs').glob('*/.jobs/*/')), 'a note of jobs that do not exist'


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(Path(sys.executable).parent))
    expected = 'sinfo: not found; is this a machine from which Slurm jobs can be sent?'
    with pytest.raises(ValueError, match=re.escape(expected)): send(slow_sweep(tmp_path))


def test_no_answer_from_slurm(slurm, tmp_path):
    slurm.stop('slurmctld')
    with pytest.raises(ValueError, match=r'Slurm \(sinfo\): .*'): send(slow_sweep(tmp_path))


