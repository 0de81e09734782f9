"""What a sweep costs besides the work of its notebooks: `python tests/bench_sweeps.py`, or `make bench`.

The same function once as a run, with all that belongs to it, and once called in a fresh Python process, alternating, so that a machine
that is busy for a while is busy for both. Then the commands that look at large sweeps.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sweep_tools import BODY, sweep_file

from daclip_repro.sweeps.launch import Worker
from daclip_repro.sweeps.papermill import load_sweep


def as_a_run(path, seed):
    sweep = load_sweep(path)
    worker = Worker(sweep, 'miniature', sweep.runs()[seed])
    while not (ended := worker.poll()): time.sleep(.005)
    assert ended == ('done', ''), ended


def as_a_script(path, seed):
    code = f"seed, method, run_dir = {seed}, 'posterior', {str(path.parent)!r}\n{BODY}"
    subprocess.run([sys.executable, '-c', code], check=True)


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def overhead(folder, rounds):
    path = sweep_file(folder, dict(seeds=list(range(rounds + 1))))
    pairs = [(timed(as_a_run, path, i), timed(as_a_script, path, i)) for i in range(rounds + 1)][1:]  # the first warms the disk cache
    extra = [a - b for a, b in pairs]
    print(f'a run {statistics.median(a for a, _ in pairs):.2f} s, the same function in a fresh process '
          f'{statistics.median(b for _, b in pairs):.2f} s: overhead {statistics.median(extra):.2f} s '
          f'({min(extra):.2f} to {max(extra):.2f}, {rounds} rounds)')


def large(folder, n):
    path = sweep_file(folder, dict(grid=dict(steps=list(range(1, n // 100 + 1))), seeds=list(range(100))))
    runs = load_sweep(path).runs()
    for run in runs:
        run.begin()
        for name in ('log.txt', 'rows.csv', 'executed.ipynb', 'provenance.json'): (run.folder/name).write_text('psnr\n30.1\n')
        run.seal()
    daclip = Path(sys.executable).parent/'daclip'
    command = lambda *words: subprocess.run([daclip, *words, path], check=True, capture_output=True, text=True)
    assert f'{n} done' in command('status').stdout
    seconds = [timed(command, 'status') for _ in range(5)]
    print(f'daclip status, {n} finished runs: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})')
    sweep_file(folder, dict(seeds=list(range(1000, 1000 + n // 10))))
    assert f'{n // 10} to do' in command('sweep', '--dry-run').stdout
    seconds = [timed(command, 'sweep', '--dry-run') for _ in range(5)]
    print(f'daclip sweep --dry-run, {n // 10} runs: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--runs', type=int, default=10_000, help='finished runs to look at')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: overhead(Path(folder), args.rounds)
    with tempfile.TemporaryDirectory() as folder: large(Path(folder), args.runs)
