"""Sweeps: what is refused, what is noticed, and that a killed sweep ends in the same rows as an undisturbed one."""
import contextlib
import getpass
import json
import os
import pty
import random
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from sweep_tools import BODY, DEFAULTS, TINY, notebook, python, sweep_file, wait_for

from daclip_repro.sweeps.launch import (
    Worker,
    _look,
    cancel,
    describe,
    leftovers,
    logs,
    look,
    make_plan,
    read_rows,
    run_sweep,
    slots,
    status,
)
from daclip_repro.sweeps.papermill import declared_parameters, default_root, execute, load_sweep
from daclip_repro.sweeps.records import (
    PartialRows,
    Progress,
    Run,
    RunningElsewhere,
    code_parts,
    differences,
    imported_names,
    input_parts,
    package_sources,
    run_id,
    save_rows,
    write_atomic,
)


def sweep_process(path, on=subprocess.PIPE, **kwargs):
    return python(f'from daclip_repro.sweeps.launch import run_sweep; s = run_sweep({str(path)!r}); print(s.ran); exit(s.exit_code)',
                  text=True, stdout=on, stderr=on, **kwargs)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A sweep of six runs that nothing disturbed."
    path = sweep_file(tmp_path_factory.mktemp('finished'))
    summary = run_sweep(path, progress=False)
    assert (summary.total, summary.ran, summary.failed) == (6, 6, {})
    return path


# -- faults -----------------------------------------------------------------------------------------------------------

def test_killed_three_times_ends_in_the_same_rows(finished, tmp_path):
    path, moments = sweep_file(tmp_path), random.Random()
    for _ in range(3):
        process = sweep_process(path)
        time.sleep(moments.uniform(.5, 5))
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        psutil.wait_procs(family, timeout=30)
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 'a process outlived its sweep'
        assert set(status(path).status) <= {'done', 'not run'}
    assert run_sweep(path, progress=False).failed == {}
    assert read_rows(path).equals(read_rows(finished))


@pytest.mark.parametrize('retries', [0, 1])
def test_killed_process_of_a_run_harms_no_other(tmp_path, retries):
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1]), retries=retries), 'import time; time.sleep(2)', BODY)
    process = sweep_process(path)
    runs = load_sweep(path).runs()
    wait_for(lambda: any(r.attempts() for r in runs))
    os.kill(next(r for r in runs if r.attempts()).holder()[1], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == (1 - retries)
    if not retries: # the sweep says so, and the next call tries again by itself: it was not the code
        assert 'its process was killed (SIGKILL)' in err
        assert sorted(status(path).status) == ['done', 'failed']
        assert run_sweep(path, progress=False).ran == 1
    assert len(read_rows(path)) == 4 and max(len(k.run.attempts()) for k in make_plan(path).looks) == 2


def test_two_processes_share_the_work(tmp_path):
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1, 2])), f"open(r'{tmp_path}/count', 'a').write('x')", BODY)
    processes = [sweep_process(path) for _ in range(2)]
    ran = [int(p.communicate()[0]) for p in processes]
    assert [p.returncode for p in processes] == [0, 0] and sum(ran) == 3
    assert (tmp_path/'count').read_text() == 'xxx', 'a run was executed twice'
    assert len(read_rows(path)) == 6


def test_ctrl_c_stops_everything_and_blames_nobody(tmp_path):
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1])),
                      BODY, "open(run_dir + '/here', 'w').close()\nimport time; time.sleep(600)", 'seed')
    process = sweep_process(path, start_new_session=True)
    runs = load_sweep(path).runs()
    wait_for(lambda: all((r.folder/'here').exists() for r in runs))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not [p for p in family if p.is_running()]
    assert list(status(path).status) == ['not run', 'not run']
    cells = json.loads((runs[0].folder/'executed.ipynb').read_text())['cells']
    assert [c['metadata']['papermill']['status'] for c in cells] == ['completed', 'completed', 'completed', 'failed', 'pending']


def test_live_table_on_a_terminal(tmp_path):
    counts = """from daclip_repro.sweeps.records import Progress
bar = Progress(run_dir, 9)
import time
for i in range(9): time.sleep(.3); bar.update(i + 1)
if seed: 1 / 0"""
    path = sweep_file(tmp_path, dict(seeds=[0, 1], workers=1), counts, BODY)
    ours, theirs = pty.openpty()
    process = sweep_process(path, stdin=theirs, env=os.environ | dict(COLUMNS='120', TERM='xterm'), on=theirs)
    os.close(theirs)
    seen = b''
    with contextlib.suppress(OSError): # the terminal is gone with the process
        while part := os.read(ours, 4096): seen += part
    os.close(ours)
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', seen.decode())
    assert process.wait() == 1 and re.search(r'  seed=0 .* [1-8]/9', text) and re.search(r'tiny miniature .* 2/2', text)
    assert 'seed=1: In [3]: ZeroDivisionError' in ' '.join(text.split())


def test_failures_say_why_and_leave_no_record(tmp_path):
    # the alarm of the time limit is set off early, so that it certainly rings in the middle of a cell
    body = (f'{BODY}\nimport os, signal, time\nif seed == 1: raise RuntimeError("no such luck")\n'
            'if seed == 2: os.kill(os.getpid(), signal.SIGKILL)\nif seed == 3: os.kill(os.getppid(), signal.SIGALRM), time.sleep(600)')
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1, 2, 3]), retries=0), body, 'seed')
    summary = run_sweep(path, progress=False)
    assert summary.exit_code == 1 and summary.ran == 1
    assert summary.failed['seed=1'].endswith('RuntimeError: no such luck')
    assert 'kernel died' in summary.failed['seed=2'] and 'time limit of 5 minutes' in summary.failed['seed=3']
    for run, kind in zip(load_sweep(path).runs()[1:], ['code', 'kernel died', 'time limit']):
        assert run.status() == 'failed' and run.failure()['kind'] == kind
        assert not (run.folder/'record.json').exists() and (run.folder/'executed.ipynb').exists()
        cells = json.loads((run.folder/'executed.ipynb').read_text())['cells']
        assert [c['metadata']['papermill']['status'] for c in cells if c['cell_type'] == 'code'][-2:] == ['failed', 'pending']
    assert list(read_rows(path).seed) == [0, 0]


def test_time_limit_ends_a_run(tmp_path):
    path = sweep_file(tmp_path, dict(time_limit_minutes=.02), 'import time; time.sleep(600)', BODY)
    assert 'time limit of 0.02 minutes' in next(iter(run_sweep(path, progress=False).failed.values()))
    assert status(path).status[0] == 'failed'


def test_without_rows_a_run_is_not_done(tmp_path):
    path = sweep_file(tmp_path, {}, 'seed')
    assert 'without writing rows.csv' in run_sweep(path, progress=False).failed[load_sweep(path).runs()[0].label]


def test_edit_during_the_run_is_noticed(tmp_path):
    path = sweep_file(tmp_path, {}, BODY, "nb = open('tiny.ipynb').read().replace('0.5', '0.6')\nopen('tiny.ipynb', 'w').write(nb)")
    assert 'was edited during the run' in next(iter(run_sweep(path, progress=False).failed.values()))


def test_kernel_start_is_tried_again(tmp_path, monkeypatch):
    from jupyter_client.manager import AsyncKernelManager
    start, attempts = AsyncKernelManager.start_kernel, []
    async def fails_twice(self, **kwargs):
        attempts.append(1)
        if len(attempts) < 3: raise RuntimeError('Kernel died before replying to kernel_info')
        return await start(self, **kwargs)
    monkeypatch.setattr(AsyncKernelManager, 'start_kernel', fails_twice)
    execute(notebook(tmp_path/'a.ipynb', BODY), tmp_path/'out.ipynb', dict(run_dir=tmp_path))
    assert len(attempts) == 3 and (tmp_path/'rows.csv').exists()


def test_points_and_seeds(tmp_path):
    path = sweep_file(tmp_path, dict(grid=dict(method=['sde']), points=[dict(method='ode', steps=20)], seeds=[3, 4],
                                     exclude=[dict(steps=20, seed=3)]))
    assert [r.point for r in load_sweep(path).runs()] == [dict(method='sde', seed=3), dict(method='sde', seed=4),
                                                          dict(method='ode', steps=20, seed=4)]


def test_code_that_failed_is_left_alone_until_asked_for(tmp_path):
    path = sweep_file(tmp_path, dict(seeds=[0, 1]), 'if seed: 1 / 0', BODY)
    assert len(run_sweep(path, progress=False).failed) == 1
    run = load_sweep(path).runs()[1]
    again = run_sweep(path, progress=False)
    assert (again.skipped, again.exit_code, len(run.attempts())) == (1, 1, 1) and 'ZeroDivisionError' in again.failed['seed=1']
    assert run_sweep(path, progress=False, retry='failed').exit_code == 1 and len(run.attempts()) == 2


def test_machine_that_fails_is_tried_again_with_pauses(tmp_path):
    path = sweep_file(tmp_path, dict(retries=2), "import errno\nraise OSError(errno.ENOSPC, 'No space left on device')")
    sweep = load_sweep(path)
    run, = sweep.runs()
    worker = Worker(sweep, 'miniature', run, pause=.1)
    wait_for(lambda: (ended := worker.poll()) and ended[0] == 'failed' and 'No space left' in ended[1])
    assert (len(run.attempts()), run.failure()['kind']) == (3, 'machine')
    assert [k.run.id for k in make_plan(path).todo] == [run.id] # a later call tries it again


def test_only_some_runs(tmp_path):
    path = sweep_file(tmp_path)
    chosen = [k.run.point for k in make_plan(path, only=['method=sde', 'seed=0', 'seed=2']).todo]
    assert chosen == [dict(method='sde', seed=0), dict(method='sde', seed=2)]
    for text, expected in [('method', 'expected key=value'), ('metod=sde', "did you mean 'method'?"), ('seed=9', 'no run of this profile'),
                           ('seed=[', 'is not a value in YAML'), ('rate=0.5', 'does not vary')]:
        with pytest.raises(ValueError, match=re.escape(expected)): make_plan(path, only=[text])
    for wrong in (dict(retry='all'), dict(cluster='cloud')):
        with pytest.raises(ValueError, match='expected one of'): run_sweep(path, **wrong)


def test_cancel_stops_a_run_on_this_machine(tmp_path):
    body = "open(run_dir + '/here', 'w').close()\nimport time; time.sleep(600)"
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1]), workers=1), body)
    process = sweep_process(path)
    runs = load_sweep(path).runs()
    wait_for((runs[0].folder/'here').exists)
    assert cancel(path)[0].startswith('seed=0: asked to stop (its sweep goes on') and cancel(path, only=['seed=1']) == []
    wait_for((runs[1].folder/'here').exists) # the sweep goes on with the next
    assert len(cancel(path)) == 1
    _, err = process.communicate()
    assert process.returncode == 1 and 'seed=0: stopped' in err
    assert [k.state for k in make_plan(path).looks] == ['not run', 'not run']


def test_cancel_leaves_the_jobs_of_another_profile_alone(tmp_path, monkeypatch):
    path = sweep_file(tmp_path, dict(seeds=[0]))
    for token, profile in [('aaaa', 'miniature'), ('bbbb', 'paper')]:
        (tmp_path/'runs'/'tiny'/'.jobs'/token).mkdir(parents=True)
        (tmp_path/'runs'/'tiny'/'.jobs'/token/'sent.json').write_text(json.dumps(dict(profile=profile, runs=['0' * 16], job='7')))
    queue = lambda experiment, tokens: {(t, 0): (f'job of {t}', 'RUNNING') for t in tokens}
    monkeypatch.setattr('daclip_repro.sweeps.launch._queue', queue)
    asked = []
    monkeypatch.setattr('daclip_repro.sweeps.launch._asked', lambda *command: asked.append(command))
    assert cancel(path) == ['job job of aaaa of an earlier version cancelled'] and asked == [('scancel', 'job of aaaa')]


def test_debug_shows_and_stops_at_the_first_failure(tmp_path):
    path = sweep_file(tmp_path, dict(seeds=[0, 1, 2]), "print('seen', seed)\nif seed == 1: 1 / 0", BODY)
    process = python(f'from daclip_repro.sweeps.launch import run_sweep; print(run_sweep({str(path)!r}, cluster="debug").failed)',
                     text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate()[0]
    assert 'seen 0' in said and 'seen 1' in said and 'seen 2' not in said and 'ZeroDivisionError' in said.splitlines()[-1]
    assert [k.state for k in make_plan(path).looks] == ['done', 'failed', 'not run']
    again = run_sweep(path, cluster='debug', only=['seed=1']) # what failed is what one wants to debug
    assert list(again.failed) == ['seed=1'] and len(load_sweep(path).runs()[1].attempts()) == 2
    with pytest.raises(ValueError, match='workers: not for cluster debug'): run_sweep(path, cluster='debug', workers=2)


def test_leftovers_are_the_runs_that_nobody_asks_for(tmp_path):
    path = sweep_file(tmp_path, dict(grid=dict(seed=[0, 1])))
    old = load_sweep(path).runs()
    for run in old: run.begin(), save_rows([dict(a=1)], str(run.folder)), run.seal()
    assert leftovers(path) == []
    sweep_file(tmp_path, dict(grid=dict(seed=[1, 2])))
    (path.parent/'runs'/'tiny'/'notes').mkdir() # not a run
    assert leftovers(path) == [old[0].folder]
    with old[0].lock(): assert leftovers(path) == []


def test_logs_of_a_run(finished):
    run = load_sweep(finished).runs()[0]
    (run.folder.parent/'abc123').mkdir()
    (run.folder.parent/'abc123'/'log.txt').write_text('hello\n')
    assert logs('abc', run.root) == 'hello' and logs(run.id, run.root)
    for text, expected in [('../..', 'is not the id of a run'), ('g1', 'is not the id'), ('', 'is not the id'), ('0' * 16, 'no run')]:
        with pytest.raises(ValueError, match=expected): logs(text, run.root)


def test_edited_result_is_put_aside_and_not_deleted(tmp_path):
    run = Run('toy', {}, {}, tmp_path)
    run.begin(), save_rows([dict(a=1)], str(run.folder)), run.seal()
    (run.folder/'rows.csv').write_text('a\n2\n')
    run.begin()
    assert run.status() == 'not run' and [p.read_text() for p in tmp_path.glob('toy/.edited/*/rows.csv')] == ['a\n2\n']


def test_job_that_ended_says_nothing_about_a_run_that_goes_on_here(tmp_path):
    run = Run('toy', {}, {}, tmp_path)
    assert _look(run, 'running', ('6_1', 'CANCELLED', False), None).job == ''
    assert _look(run, 'running', ('6_1', 'RUNNING', True), None).job == '6_1'


def test_processes_that_share_a_long_look_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1})
    runs = load_sweep(sweep_file(tmp_path, dict(seeds=list(range(4000))))).runs()
    for run in (runs[7], runs[8], runs[3999]): run.begin()
    for run in (runs[7], runs[3999]):
        save_rows([dict(psnr=1.)], run.folder)
        run.seal()
    runs[8].fail('code', 'ZeroDivisionError')
    save_rows([dict(psnr=9.)], runs[3999].folder)
    special = {i: (k.state, k.note) for i, k in enumerate(look(runs)) if k.state != 'not run'}
    assert special == {7: ('done', ''), 8: ('failed', 'ZeroDivisionError'), 3999: ('tampered', 'rows.csv was edited')}


def test_slots_give_each_run_gpus_of_its_own(tmp_path, monkeypatch):
    settings = lambda **k: load_sweep(sweep_file(tmp_path, k)).file.profiles['miniature']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,2,5,7,9')
    two = settings(resources=dict(gpus=2))
    assert slots(two) == [dict(CUDA_VISIBLE_DEVICES='0,2'), dict(CUDA_VISIBLE_DEVICES='5,7')] and len(slots(two, 1)) == 1
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    with pytest.raises(ValueError, match='a run needs 2, this machine has none: use --cluster slurm'): slots(two)
    assert slots(settings(workers=3)) == [{}] * 3 and slots(settings(workers=3), 5) == [{}] * 5
    assert len(slots(settings(threads=10**6))) == 1


def test_weights_that_do_not_exist_are_missed_before_anything_starts(tmp_path):
    path = sweep_file(tmp_path, dict(parameters=dict(weights='big.safetensors')), BODY,
                      parameters="weights = ''\nseed = 0\nmethod = ''\nrun_dir = ''")
    with pytest.raises(ValueError, match='weights: big.safetensors: no such file'): run_sweep(path)
    assert 'missing: weights: big.safetensors: no such file' in describe(make_plan(path)) and not (tmp_path/'runs').exists()


# -- records ----------------------------------------------------------------------------------------------------------

def test_second_call_is_quick_and_light(finished):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = python(f'import sys; from daclip_repro.sweeps.launch import run_sweep; print(run_sweep({str(finished)!r}).skipped); '
                     'print({"torch", "papermill", "pandas", "nbformat"} & set(sys.modules))', text=True, stdout=subprocess.PIPE)
    assert process.communicate()[0].split() == ['6', 'set()']
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize('file', ['parameters.json', 'provenance.json', 'executed.ipynb', 'rows.csv', 'log.txt', 'attempts.jsonl',
                                  'record.json'])
@pytest.mark.parametrize('deleted', [True, False])
def test_tampering_is_noticed(finished, file, deleted):
    run = load_sweep(finished).runs()[0]
    path, content = run.folder/file, (run.folder/file).read_bytes()
    edited = content.replace(b'tiny', b'tidy') if file == 'record.json' else content + b'\n'
    try:
        path.unlink() if deleted else path.write_bytes(edited)
        assert run.status() == ('not run' if deleted and file == 'record.json' else 'tampered')
        assert len(read_rows(finished)) == 10
    finally: path.write_bytes(content)
    assert run.status() == 'done'


def test_tampered_run_is_made_again(tmp_path, finished):
    path = sweep_file(tmp_path, dict(grid=dict(method=['sde'], seed=[0])))
    run_sweep(path, progress=False)
    run = load_sweep(path).runs()[0]
    (run.folder/'rows.csv').write_text('photo,psnr\nchelsea,99\n')
    assert (list(status(path).status), len(read_rows(path))) == (['tampered'], 0)
    assert run_sweep(path, progress=False).ran == 1
    assert list(read_rows(path).psnr) == list(read_rows(finished).psnr[:2])


def test_records_name_no_user_and_no_path(finished):
    for run in load_sweep(finished).runs()[:2]:
        for path in run.folder.glob('*.json'):
            host = f'"host": "{socket.gethostname()}"' # provenance.json says where, once
            text = path.read_text().replace(host, '')
            assert str(Path.home()) not in text and str(finished.parent) not in text and socket.gethostname() not in text
            assert f'"{getpass.getuser()}"' not in text
        source = json.loads((run.folder/'provenance.json').read_text())
        assert source['packages']['papermill'] and source['seed'] == run.parameters['seed']
        assert json.loads((run.folder/'executed.ipynb').read_text())['metadata']['papermill']['output_path'] == 'executed.ipynb'


def test_rows_keep_every_digit_and_carry_their_parameters(finished):
    rows = read_rows(finished)
    draw = random.Random('1 posterior')
    mine = rows[(rows.seed == 1) & (rows.method == 'posterior')]
    assert list(mine.psnr) == [draw.random(), draw.random()]
    assert list(mine.steps) == [10, 10] and list(mine['size']) == ['[64,64]'] * 2 and mine.run.nunique() == 1


def test_lock_is_held_until_the_last_heir_is_gone(tmp_path):
    run = Run('toy', {}, {}, tmp_path)
    with run.lock() as fd:
        heir = python('import time; time.sleep(60)', pass_fds=[fd])
        with pytest.raises(RunningElsewhere), run.lock(): pass
    assert run.running()
    heir.kill(), heir.wait()
    assert not run.running()


def test_begin_keeps_what_a_notebook_resumes_from(tmp_path):
    run = Run('toy', {}, {}, tmp_path)
    run.begin()
    (run.folder/'checkpoint.pt').write_text('step 100')
    (run.folder/'rows.csv').write_text('half')
    run.begin()
    assert sorted(p.name for p in run.folder.iterdir()) == ['attempts.jsonl', 'checkpoint.pt', 'parameters.json']
    assert len(run.attempts()) == 2


def test_partial_rows_survive_a_torn_line(tmp_path):
    kept = PartialRows(str(tmp_path), total=3)
    kept.add(dict(photo='a', seed=0), [dict(psnr=float('inf')), dict(psnr=1.5)])
    kept.add('b', [dict(psnr=2.)])
    with (tmp_path/'partial.jsonl').open('a') as f: f.write('["\\"c\\"", [{"psn')
    again = PartialRows(str(tmp_path), total=3)
    assert dict(seed=0, photo='a') in again and 'b' in again and 'c' not in again
    again.add('c', [dict(psnr=3.)])
    everything = PartialRows(str(tmp_path)).all(['c', dict(photo='a', seed=0), 'b'])
    assert everything == [dict(psnr=3.), dict(psnr=float('inf')), dict(psnr=1.5), dict(psnr=2.)]
    in_memory = PartialRows('')
    in_memory.add('d', [dict(size=(1, 2))])
    assert in_memory.all(['d']) == [dict(size=[1, 2])] # as it would be read back


def test_progress_counts_from_where_this_attempt_began(tmp_path, monkeypatch):
    clock = [1000.]
    monkeypatch.setattr('time.time', lambda: clock[0])
    run = Run('toy', {}, {}, tmp_path)
    run.begin()
    assert run.progress() is None
    bar = Progress(str(run.folder), 100, done=40)
    assert run.progress() == (40, 100, None)
    clock[0] += 10
    bar.update(60)
    assert run.progress() == (60, 100, 20.) # 20 steps in 10 seconds, 40 to go
    bar.update(61)
    assert run.progress()[0] == 60 # at most once a second
    bar.update(100)
    assert run.progress() == (100, 100, 0.)
    save_rows([dict(a=1)], str(run.folder)), run.seal()
    assert not (run.folder/'progress.json').exists() and run.status() == 'done'


def test_edit_that_keeps_the_size_is_noticed(tmp_path):
    run = Run('toy', {}, {}, tmp_path)
    run.begin(), save_rows([dict(a=1)], str(run.folder)), run.seal()
    (run.folder/'rows.csv').write_text('a\r\n2\r\n')
    assert run.status() == 'tampered' and run.problem() == 'rows.csv was edited'
    (run.folder/'rows.csv').write_text('a\r\n1\r\n') # as it was, but written later
    assert run.status() == 'done' and run.problem() is None


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    (tmp_path/'a').write_text('old')
    with pytest.raises(UnicodeEncodeError): write_atomic(tmp_path/'a', 'x' * 10**6 + '\ud800')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'old')]


@pytest.mark.parametrize('rows', [[], [dict(a=1), dict(b=1)]])
def test_save_rows_refuses(rows, tmp_path):
    with pytest.raises(ValueError, match='rows.csv: needs'): save_rows(rows, str(tmp_path))
    assert not list(tmp_path.iterdir())


# -- identity ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def toy(tmp_path):
    files = {'pkg/__init__.py': '', 'pkg/a.py': 'from . import b', 'pkg/b.py': 'def f():\n    from .sub.c import x',
             'pkg/sub/__init__.py': '', 'pkg/sub/c.py': 'x = 1', 'pkg/other.py': '', 'pkg/_modidx.py': '', 'pkg/table.json': '{}',
             'pkg/by_name.py': 'import importlib\nimportlib.import_module("pkg.other")', 'pkg/weights/w.safetensors': '1',
             'pkg/weights/w.md': 'card', 'pkg/weights/w2.safetensors': '2', 'photos/a.png': 'a', 'own/w.safetensors': '3'}
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    return tmp_path


@pytest.mark.parametrize('code, reached', [
    ('import pkg.a', {'a.py', 'b.py', 'sub/c.py', 'sub/__init__.py'}), ('from pkg import other', {'other.py'}),
    ('from pkg.sub.c import *', {'sub/c.py', 'sub/__init__.py'}), ('import torch', None),
    ('from pkg import by_name', {'a.py', 'b.py', 'sub/c.py', 'sub/__init__.py', 'other.py', 'by_name.py'}),
    ('not valid python', {'a.py', 'b.py', 'sub/c.py', 'sub/__init__.py', 'other.py', 'by_name.py'})])
def test_sources_follow_imports(toy, code, reached):
    expected = {'table.json'} | ({'__init__.py'} | reached if reached else set())
    assert set(package_sources(code, toy/'pkg')) == expected


def test_scripts_beside_the_notebook_count_with_what_they_import(tmp_path):
    nb = notebook(tmp_path/'a.ipynb', 'import subprocess')
    assert set(code_parts(nb)) == {'notebook', 'package'}
    (tmp_path/'train.py').write_text('from daclip_repro.sweeps.records import now')
    before = code_parts(nb)
    assert set(before['scripts']) == {'train.py'} and 'sweeps/records.py' in before['package']
    (tmp_path/'train.py').write_text('from daclip_repro.sweeps.records import  now')
    assert differences(before, code_parts(nb)) == ['scripts: train.py']


def test_large_files_are_hashed_again_only_when_they_changed(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    (tmp_path/'photos').mkdir()
    big = tmp_path/'photos'/'big.png'
    big.write_bytes(bytes(2**16))
    first = input_parts(dict(photos='photos'), tmp_path)
    monkeypatch.setattr('daclip_repro.sweeps.records.hash_file', lambda path: 1 / 0)
    assert input_parts(dict(photos='photos'), tmp_path) == first
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    big.write_bytes(bytes(2**16 - 1) + b'1')
    assert input_parts(dict(photos='photos'), tmp_path) != first


def test_relative_imports(): assert imported_names('from ..photos import load', 'pkg.sub') == {'pkg.photos', 'pkg.photos.load'}


def test_weights_and_photos_count_by_content(toy):
    def id(**parameters): return run_id(parameters, input_parts(parameters, toy, toy/'pkg'))
    one = dict(weights='w', teacher_weights='own/w.safetensors', photos='photos')
    start = id(**one)
    for file, changes in {'pkg/weights/w.safetensors': True, 'pkg/weights/w.md': False, 'pkg/weights/w2.safetensors': False,
                          'own/w.safetensors': True, 'photos/a.png': True, 'photos/b.png': True}.items():
        old = (toy/file).read_text() if (toy/file).exists() else None
        (toy/file).write_text('changed')
        assert (id(**one) != start) == changes, file
        (toy/file).write_text(old) if old else (toy/file).unlink()
    assert id(**one) == start
    absent = dict(weights={'weights: absent': 'no such file'}, photos={'photos: ': 'no such folder'})
    assert input_parts(dict(weights='absent', photos=''), toy, toy/'pkg') == absent
    assert 'scikit-image 0' in input_parts(dict(photos='packaged'), toy)['photos']['photos: packaged']


def test_resources_and_order_are_not_identity(tmp_path):
    ids = lambda: {r.id for r in load_sweep(tmp_path/'tiny.yaml').runs()}
    sweep_file(tmp_path)
    first = ids()
    sweep_file(tmp_path, dict(grid=dict(seed=[2, 1, 0], method=['posterior', 'sde']), workers=7, threads=3, time_limit_minutes=1))
    assert ids() == first
    nb = json.loads((tmp_path/'tiny.ipynb').read_text())
    nb['cells'][1]['outputs'] = [dict(output_type='stream', name='stdout', text='hi')]
    (tmp_path/'tiny.ipynb').write_text(json.dumps(nb))
    assert ids() == first
    notebook(tmp_path/'tiny.ipynb', BODY + '\n')
    assert not ids() & first


def test_int_for_a_float_and_list_for_a_tuple_are_the_same_run(tmp_path):
    id = lambda **p: load_sweep(sweep_file(tmp_path, dict(parameters=p))).runs()[0].id
    assert id(rate=1, size=[32, 32]) == id(size=[32, 32], rate=1.0)
    assert id(seed=0) == id()


def test_status_says_why_a_run_is_stale(tmp_path):
    path = sweep_file(tmp_path, {})
    run = load_sweep(path).runs()[0]
    run.begin(), save_rows([dict(a=1)], str(run.folder)), run.seal()
    assert status(path).status[0] == 'done'
    notebook(tmp_path/'tiny.ipynb', BODY, '1 + 1')
    assert (status(path).status[0], status(path).note[0]) == ('stale', 'changed: notebook')
    notebook(tmp_path/'tiny.ipynb', BODY, parameters=DEFAULTS.replace('steps = 10', 'steps = 20'))
    assert status(path).note[0] == '' # a single run has no place in a grid
    path = sweep_file(tmp_path, dict(seeds=[0, 1]), name='grid')
    for run in load_sweep(path).runs(): run.begin(), save_rows([dict(a=1)], str(run.folder)), run.seal()
    notebook(tmp_path/'grid.ipynb', BODY, parameters=DEFAULTS.replace('steps = 10', 'steps = 20\nnew = 1'))
    assert list(status(path).note) == ['changed: notebook, parameters: new, parameters: steps'] * 2
    assert differences(dict(package=dict(a=1)), dict(package=dict(a=1, b=2))) == ['package: b']
    assert set(code_parts(tmp_path/'tiny.ipynb')['package']) >= {'sweeps/records.py'}


# -- strict parameters ------------------------------------------------------------------------------------------------

def test_values_arrive_as_they_are(tmp_path):
    values = dict(text='a "quoted" \\ {brace} \n ü', pair=(1, (2, 3)), table={'k': [1, None, True]}, path=tmp_path/'x', small=1e-9)
    folder = tmp_path/'{odd} {0} name'
    folder.mkdir()
    cell = "text = ''\npair: tuple[int, tuple] = (0, (0,))\ntable = {}\npath = ''\nsmall = 0.1"
    nb = notebook(folder/'{nb}.ipynb', 'repr((text, pair, table, path, small))', parameters=cell)
    execute(nb, folder/'{out}.ipynb', values)
    shown = json.loads((folder/'{out}.ipynb').read_text())['cells'][-1]['outputs'][0]['data']['text/plain']
    expected = repr((values['text'], values['pair'], values['table'], str(values['path']), values['small']))
    assert eval(''.join(shown)) == expected  # noqa: S307


@pytest.mark.parametrize('name, value', [
    ('seed', '0'), ('seed', True), ('seed', 1.0), ('seed', None), ('rate', '0.5'), ('rate', float('nan')), ('method', 1), ('size', 64),
    ('method', object()), ('sede', 0)])
def test_wrong_values_never_start(tmp_path, name, value):
    with pytest.raises(ValueError, match=name) as error: execute(notebook(tmp_path/'a.ipynb', BODY), tmp_path/'out.ipynb', {name: value})
    assert '\n' not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ['a.ipynb']


@pytest.mark.parametrize('cell, expected', [
    ('a = 1\nb = a + 1', 'line 2: b needs a plain value'), ('import os', "line 1: expected 'name = value'"),
    ('a = ', 'line 1: invalid syntax'), ('a, b = 1, 2', "'name = value'"), ('a: Path = "x"', 'the type of a must be made of'),
    ('a: __import__("os") = 1', 'the type of a must be made of'), ('a: int = "x"', "'x' is not of type int"),
    ('a = {1, 2}', 'is not plain data')])
def test_parameters_cell_is_checked(tmp_path, cell, expected):
    with pytest.raises(ValueError) as error: declared_parameters(notebook(tmp_path/'a.ipynb', parameters=cell))
    assert expected in str(error.value) and '\n' not in str(error.value)


def test_annotations_are_types(tmp_path):
    cell = "a: list[int] = []\nb: int|None = None\nc: Literal['x', 'y'] = 'x'\nd = None"
    declared = declared_parameters(notebook(tmp_path/'a.ipynb', parameters=cell))
    assert (declared['a'].fit([1]), declared['b'].fit(3), declared['c'].fit('y'), declared['d'].fit('any')) == ([1], 3, 'y', 'any')
    for name, value in [('a', ['1']), ('b', 'x'), ('c', 'z')]:
        with pytest.raises(ValueError, match='is not of type'): declared[name].fit(value)


# -- malformed sweep files --------------------------------------------------------------------------------------------

GOOD = 'notebook: tiny.ipynb\nprofiles:\n  miniature:\n    grid: {seed: [0, 1]}\n'
MALFORMED = {
    'unknown key': (GOOD + 'sede: 1', "line 5: sede: unknown key"),
    'unknown key beside': (GOOD + 'beside: {paper: x, tables: [y], lines: {a: {b: c}}, line: {}}',
                           "line 5: beside.line: unknown key; did you mean 'lines'?"),
    'no table beside': (GOOD + 'beside: {paper: x, tables: [], lines: {a: {method: a}}}', 'line 5: beside.tables: must not be empty'),
    'unknown key of a profile': (GOOD.replace('grid', 'gird'), "line 4: profiles.miniature.gird: unknown key; did you mean 'grid'?"),
    'empty grid': (GOOD.replace('{seed: [0, 1]}', '{}'), 'line 4: profiles.miniature.grid: must not be empty'),
    'empty list': (GOOD.replace('[0, 1]', '[]'), 'line 4: profiles.miniature.grid.seed: must not be empty'),
    'wrong type in the grid': (GOOD.replace('[0, 1]', '[0, one]'), "line 4: profiles.miniature.grid.seed.1: 'one' is not of type int"),
    'not a list': (GOOD.replace('[0, 1]', '3'), 'profiles.miniature.grid.seed: should be a valid list'),
    'wrong type of a setting': (GOOD + '    workers: two', "line 5: profiles.miniature.workers: should be a valid integer"),
    'no workers': (GOOD + '    workers: 0', 'profiles.miniature.workers: should be greater than or equal to 1'),
    'unknown parameter': (GOOD.replace('seed', 'sede'),
                          "line 4: profiles.miniature.grid.sede: unknown parameter of tiny.ipynb; did you mean 'seed'?"),
    'unknown fixed parameter': (GOOD + '    parameters: {stepz: 3}',
                                "line 5: profiles.miniature.parameters.stepz: unknown parameter of tiny.ipynb; did you mean 'steps'?"),
    'wrong fixed type': (GOOD + '    parameters:\n      rate: 1e-4',
                         "line 6: profiles.miniature.parameters.rate: '1e-4' is not of type float, "
                         'as the default 0.5 in the notebook; YAML'),
    'date': (GOOD.replace('seed: [0, 1]', 'method: [2024-01-01]'), 'is not plain data'),
    'not finite': (GOOD.replace('seed: [0, 1]', 'rate: [.inf]'), 'is not plain data'),
    'run_dir': (GOOD.replace('seed: [0, 1]', 'run_dir: [x]'), 'is set by the sweep itself'),
    'twice in the grid': (GOOD.replace('[0, 1]', '[0, 0]'), 'a value stands there twice'),
    'fixed and varied': (GOOD + '    parameters: {seed: 1}', 'stands in parameters, and varies between the runs as well'),
    'object tag': (GOOD.replace('[0, 1]', '!!python/object/apply:os.system ["touch pwned"]'), 'line 4: tags (!...) are not allowed here'),
    'not YAML': (GOOD + '  }{', 'line 5: '),
    'unclosed': (GOOD.replace(']}', ''), 'tiny.yaml, line'),
    'key twice': (GOOD + '    grid: {seed: [2]}', "line 5: the key 'grid' stands here a second time"),
    'empty file': ('', 'expected a mapping'),
    'not a mapping': ('- a\n- b', 'expected a mapping'),
    'binary': (b'\xff\xfe\x00', 'not a text file in UTF-8'),
    'control characters': ('a: \x07', 'not valid YAML'),
    'self-reference': ('&a [*a]', 'tiny.yaml'),
    'too deep': ('[' * 600, 'not valid YAML'),
    'missing notebook key': (GOOD.replace('notebook: tiny.ipynb\n', ''), 'notebook: this key is missing'),
    'missing notebook': (GOOD.replace('tiny.ipynb', 'tony.ipynb'), 'line 1: notebook: no such notebook'),
    'notebook elsewhere': (GOOD.replace('tiny', '../tiny'), 'line 1: notebook: expected the file name of a notebook in the same folder'),
    'absolute notebook': (GOOD.replace('tiny', '/etc/tiny'), 'expected the file name of a notebook in the same folder'),
    'not a notebook': (GOOD.replace('tiny.ipynb', 'text.ipynb'), 'text.ipynb: not a Jupyter notebook'),
    'no parameters cell': (GOOD.replace('tiny.ipynb', 'bare.ipynb'), "bare.ipynb: expected one cell tagged 'parameters', found none"),
    'no run_dir': (GOOD.replace('tiny.ipynb', 'lost.ipynb'), "lost.ipynb: the parameters cell needs the line run_dir = ''"),
    'exclusion of nothing': (GOOD + '    exclude: [{seed: 7}]', 'line 5: profiles.miniature.exclude.0: excludes nothing'),
    'exclusion of everything': (GOOD + '    exclude: [{seed: [0, 1]}]', 'leaves no run'),
    'exclusion by another key': (GOOD + '    exclude: [{sead: 0}]', "is not in the grid; did you mean 'seed'?"),
    'unknown resource':
        (GOOD + '    resources: {gpu: 1}', "line 5: profiles.miniature.resources.gpu: unknown key; did you mean 'gpus'?"),
    'resource of the wrong type': (GOOD + '    resources: {gpus: two}', 'profiles.miniature.resources.gpus: should be a valid integer'),
    'no time to work':
        (GOOD + '    resources: {minutes: 1}', 'line 5: profiles.miniature.resources: minutes: 1 leaves no time to work'),
    'line break for sbatch':
        (GOOD + '    resources: {partition: "a\\n#SBATCH --uid=0"}', 'holds a character that sbatch does not take here'),
    'seeds twice':
        (GOOD + '    seeds: [1]', "line 5: profiles.miniature.seeds: 'seed' stands in the grid or in points as well"),
    'seed repeated':
        (GOOD.replace('grid: {seed: [0, 1]}', 'seeds: [1, 1]'), 'line 4: profiles.miniature.seeds: a value stands there twice'),
    'seed of text': (GOOD.replace('grid: {seed: [0, 1]}', 'seeds: [one]'), 'profiles.miniature.seeds.0: should be a valid integer'),
    'unknown parameter of a point': (GOOD + '    points: [{sead: 3}]', 'line 5: profiles.miniature.points.0.sead: unknown parameter'),
    'point of the wrong type': (GOOD + '    points: [{seed: x}]', "profiles.miniature.points.0.seed: 'x' is not of type int"),
    'point of the grid': (GOOD + '    points: [{seed: 1}]', 'profiles.miniature.points: a combination stands there twice'),
    'nameless claim': (GOOD + 'claims: [{row: 1}]', "line 5: claims.0: a claim needs a 'name'"),
    'claim of text': (GOOD + 'claims: [better]', 'claims.0: expected a mapping'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed_sweep_files(tmp_path, case):
    text, expected = MALFORMED[case]
    notebook(tmp_path/'tiny.ipynb', BODY)
    notebook(tmp_path/'bare.ipynb', BODY, parameters=None)
    notebook(tmp_path/'lost.ipynb', BODY, parameters='seed = 0')
    (tmp_path/'text.ipynb').write_text('hello')
    (tmp_path/'tiny.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as error: run_sweep(tmp_path/'tiny.yaml', progress=False)
    assert expected in str(error.value) and '\n' not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before and not Path('pwned').exists()


def test_what_is_not_there(tmp_path):
    path = sweep_file(tmp_path)
    with pytest.raises(ValueError, match="no profile 'minature'; did you mean 'miniature'?"): run_sweep(path, 'minature')
    with pytest.raises(FileNotFoundError, match='no such sweep file'): load_sweep(tmp_path/'absent.yaml')
    with pytest.raises(ValueError, match='workers: expected at least 1'): run_sweep(path, workers=0)


def test_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(NotADirectoryError): run_sweep(sweep_file(tmp_path), root=tmp_path/'file')


def test_exclusions_and_order(tmp_path):
    path = sweep_file(tmp_path, TINY | dict(exclude=[dict(method='sde', seed=[0, 1]), dict(seed=2, method='posterior')]))
    expected = [dict(method='sde', seed=2), dict(method='posterior', seed=0), dict(method='posterior', seed=1)]
    assert [r.point for r in load_sweep(path).runs()] == expected
    path = sweep_file(tmp_path, dict(grid=dict(size=[[64, 64], [32, 32]], rate=[1, 2]), exclude=[dict(size=[32, 32], rate=1)]))
    assert [r.point['size'] for r in load_sweep(path).runs()] == [(64, 64), (64, 64), (32, 32)]


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.delenv('DACLIP_RUNS', raising=False)
    (tmp_path/'experiments').mkdir()
    assert default_root(tmp_path/'experiments'/'a.yaml') == tmp_path/'experiments'/'runs'
    (tmp_path/'settings.ini').touch()
    assert default_root(tmp_path/'experiments'/'a.yaml') == tmp_path/'results'/'runs'
    monkeypatch.setenv('DACLIP_RUNS', str(tmp_path/'elsewhere'))
    assert default_root(tmp_path/'experiments'/'a.yaml') == tmp_path/'elsewhere'
