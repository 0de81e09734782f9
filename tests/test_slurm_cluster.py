"The tests' own Slurm does what a big one does: everything that later tests rely on, and it leaves nothing behind."
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import slurm_cluster as sc
import submitit
from slurm_cluster import Cluster, wait_until

ENDED = 'COMPLETED', 'FAILED', 'TIMEOUT'


def accounted(slurm, job, tasks=1):
    "State and exit code of each task by the accounting, which learns of them a moment after the queue does, one by one."
    def ended():
        rows = [line.split('|') for line in slurm.run('sacct', '-X', '-n', '-P', '-o', 'State,ExitCode', '-j', job).splitlines()]
        return len(rows) == tasks and all(state in ENDED for state, _ in rows) and [' '.join(row) for row in rows]
    return wait_until(ended, f'sacct does not know how {job} ended')


def command(folder, *args, **kwargs):
    return subprocess.Popen([sys.executable, sc.__file__, *args], env=os.environ | dict(DACLIP_SLURM=str(folder)), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def appending(log): return f'--output={log}', '--open-mode=append'


def wait_until_saved(cluster):
    "Slurm writes its queue to disk only every few seconds, and loses what is newer when it is killed."
    start = time.time()
    wait_until(lambda: (cluster.folder/'slurmctld'/'job_state').stat().st_mtime > start, 'the queue is not saved')


# --- what a job lives through

def test_a_job_runs_and_accounting_knows_how_it_ended(slurm, tmp_path):
    wishes = '--gres=gpu:a100:1', '--constraint=a100', '--mem=8G', '--cpus-per-task=3'
    good, bad = slurm.submit('echo "$SLURM_JOB_PARTITION $SLURMD_NODENAME"', f'--output={tmp_path}/%j.log', *wishes), slurm.submit('exit 3')
    assert accounted(slurm, good) == ['COMPLETED 0:0'] and accounted(slurm, bad) == ['FAILED 3:0']
    partition, node = (tmp_path/f'{good}.log').read_text().split()
    assert partition == 'main' and node in slurm.nodes()


def test_the_tasks_of_an_array_end_each_in_its_own_way(slurm):
    job = slurm.submit('exit $SLURM_ARRAY_TASK_ID', '--array=0-3%2')
    assert accounted(slurm, job, 4) == ['COMPLETED 0:0', 'FAILED 1:0', 'FAILED 2:0', 'FAILED 3:0']


def test_a_setting_takes_effect_on_the_running_cluster_and_the_queue_stays(slurm):
    held = slurm.submit('true', '--hold')
    slurm.configure(MaxArraySize=4)
    try:
        assert slurm.states(held) == ['PENDING']
        with pytest.raises(RuntimeError, match='Invalid job array specification'): slurm.submit('true', '--array=0-4')
        slurm.wait(slurm.submit('true', '--array=0-3'), 'COMPLETED')
    finally: slurm.configure(MaxArraySize=1001)


def test_a_requeued_job_runs_again_and_knows_it(slurm, tmp_path):
    log = tmp_path/'log'
    job = slurm.submit('echo run ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60', *appending(log))
    wait_until(lambda: log.exists() and log.read_text(), 'the job does not write')
    slurm.run('scontrol', 'requeue', job)
    slurm.wait(job, 'COMPLETED')
    lines = log.read_text().splitlines()
    assert lines[0] == 'run 0' and lines[-1] == 'run 1'


def test_an_urgent_job_takes_the_place_of_a_running_one(slurm, tmp_path):
    log = tmp_path/'log'
    job = slurm.submit('echo run ${SLURM_RESTART_COUNT:-0}; sleep 2', '--exclusive', '--nodes=2', *appending(log))
    slurm.wait(job, 'RUNNING')
    urgent = slurm.submit('sleep 1', '--partition=urgent')
    slurm.wait(urgent, 'COMPLETED')
    slurm.wait(job, 'COMPLETED')
    assert [line for line in log.read_text().splitlines() if line.startswith('run')] == ['run 0', 'run 1']


def test_a_job_that_passes_its_time_limit_ends_as_timeout(slurm):
    job = slurm.submit('sleep 60', '--time=1')
    slurm.wait(job, 'RUNNING')
    slurm.run('scontrol', 'update', f'JobId={job}', 'EndTime=now+1')  # a limit is in whole minutes, an end is not; looked at every 30 s
    slurm.wait(job, 'TIMEOUT', timeout=60)
    assert accounted(slurm, job) == ['TIMEOUT 0:0']


# --- what the cluster lives through

def test_the_queue_outlives_a_controller_that_is_killed(slurm, tmp_path):
    running = slurm.submit(f'until [ -e {tmp_path}/go ]; do sleep .1; done')
    held = slurm.submit('true', '--hold')
    slurm.wait(running, 'RUNNING')
    wait_until_saved(slurm)
    slurm.stop('slurmctld', signal.SIGKILL)
    (tmp_path/'go').touch() # the job ends while there is nobody to tell
    slurm.start('slurmctld')
    slurm.wait(running, 'COMPLETED')
    assert slurm.states(held) == ['PENDING']
    slurm.run('scontrol', 'release', held)
    slurm.wait(held, 'COMPLETED')


def test_a_job_moves_away_from_a_node_that_goes_down(slurm, tmp_path):
    log = tmp_path/'log'
    job = slurm.submit('echo $SLURMD_NODENAME; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60', '--nodelist=n1', *appending(log))
    wait_until(lambda: log.exists() and log.read_text(), 'the job does not write')
    slurm.set_node('down', 'n1')
    wait_until(lambda: slurm.states(job) == ['PENDING'], 'the job is not put back')
    slurm.run('scontrol', 'update', f'JobId={job}', 'NodeList=n2')
    slurm.wait(job, 'COMPLETED')
    nodes = [line for line in log.read_text().splitlines() if line in slurm.nodes()] # beside Slurm's notes
    assert nodes == ['n1', 'n2']
    slurm.set_node('resume', 'n1')
    slurm.wait(slurm.submit('true', '--nodelist=n1'), 'COMPLETED')


def test_submitit_runs_arrays_on_it(slurm, tmp_path):
    executor = submitit.AutoExecutor(tmp_path/'jobs', cluster='slurm')
    executor.update_parameters(timeout_min=1, slurm_array_parallelism=4, mem_gb=.5)
    jobs = executor.map_array(divmod, [7, 8, 9], [2, 3, 0])
    for job in jobs: wait_until(job.done, f'{job.job_id} does not end')
    assert [job.result() for job in jobs[:2]] == [(3, 1), (2, 2)]
    assert 'ZeroDivisionError' in str(jobs[2].exception())
    states = lambda: [job.watcher.get_state(job.job_id, mode='force') for job in jobs]
    wait_until(lambda: states() == ['COMPLETED', 'COMPLETED', 'FAILED'], 'submitit does not see how they ended')


# --- up and down

def test_up_again_changes_nothing(slurm):
    before = {name: process.pid for name, process in slurm.running().items()}
    assert slurm.is_up() and set(before) == set(slurm.daemons())
    assert slurm.up() is False
    assert {name: process.pid for name, process in slurm.running().items()} == before


def test_a_second_cluster_is_brought_up_killed_and_taken_down(slurm, tmp_path):
    "Beside the first; twice at once; after kill -9 of everything, with its queue; with a job that ignores every signal."
    folder = slurm.folder.with_name(slurm.folder.name + '-2')
    cluster = Cluster(folder)
    try:
        ups = [command(folder, 'up', 'nodes=1', 'cpus=2', 'KillWait=30') for _ in range(2)]
        said = [up.communicate(timeout=60) for up in ups]
        assert sorted(out.split('(')[0].split('.')[0] for out, _ in said) == ['Slurm is up ', 'Slurm was up'], said
        assert all(f'export SLURM_CONF={folder}/slurm.conf' in out for out, _ in said)
        assert 'KillWait                = 30 sec' in cluster.run('scontrol', 'show', 'config')

        held = cluster.submit('true', '--hold')
        wait_until_saved(cluster)
        for process in cluster.processes(): process.kill()
        wait_until(lambda: not cluster.running(), 'SIGKILL is survived')
        assert cluster.up() is True
        cluster.run('scontrol', 'release', held)
        cluster.wait(held, 'COMPLETED')

        cluster.submit(f'trap "" TERM CONT INT; touch {tmp_path}/runs; while :; do sleep .1; done')
        wait_until((tmp_path/'runs').exists, 'the job does not start')
        ours, theirs = set(cluster.processes()), set(slurm.processes())
        assert len(ours) > len(cluster.daemons()) and not ours & theirs
        out, err = command(folder, 'down').communicate(timeout=60)
        assert (out, err) == ('Slurm is down.\n', '')
        assert not cluster.processes() and not folder.exists()
        assert not [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert slurm.is_up()
        out, err = command(folder, 'down').communicate(timeout=60)
        assert out.startswith('There is no cluster in')
    finally: cluster.down()


def test_it_ends_with_the_process_that_it_was_for(tmp_path):
    with subprocess.Popen(['sleep', '60']) as owner:
        folder = tmp_path/'cluster'
        folder.mkdir()
        (folder/sc.MARK).touch()
        down = command(folder, 'down', '--after', str(owner.pid))
        time.sleep(.5)
        assert down.poll() is None and folder.exists()
        owner.kill()
    assert down.communicate(timeout=20)[0] == 'Slurm is down.\n' and not folder.exists()


# --- what is refused

def test_a_folder_that_is_no_cluster_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sc, 'missing', list)
    (tmp_path/'thesis.tex').write_text('years of work')
    for act in (Cluster(tmp_path).up, Cluster(tmp_path).down):
        with pytest.raises(ValueError, match='DACLIP_SLURM'): act()
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
    with pytest.raises(ValueError, match='too long for a socket'): Cluster(tmp_path/('x' * 100)).up()


def test_without_slurm_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(sc, 'find', lambda program: None)
    with pytest.raises(sc.NoSlurm, match='slurm-wlm'): Cluster(tmp_path/'s').up()
    with pytest.raises(sc.NoSlurm, match='as root: apt-get install .*slurm-wlm'): sc.install()
    assert not (tmp_path/'s').exists()


def test_a_wrong_setting_is_refused(tmp_path):
    for args, part in ((['up', 'MaxArraySize'], 'KEY=VALUE'), (['up', 'a=1\nb=2'], 'KEY=VALUE')):
        run = command(tmp_path/'s', *args)
        assert part in run.communicate(timeout=20)[1] and run.returncode == 2
