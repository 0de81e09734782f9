"What the tests of sweeps share: a tiny notebook, a sweep file for it, and patience."
import json
import subprocess
import sys
import time

DEFAULTS = "seed = 0\nsteps = 10\nrate = 0.5\nmethod = 'posterior'\nsize = (64, 64)\nrun_dir = ''"
BODY = """import random
from daclip_repro.sweeps.records import save_rows
draw = random.Random(f'{seed} {method}')
save_rows([dict(photo=p, psnr=draw.random()) for p in ('chelsea', 'coffee')], run_dir)"""
TINY = dict(grid=dict(method=['sde', 'posterior'], seed=[0, 1, 2]))


def notebook(path, *sources, parameters=DEFAULTS):
    cell = lambda source, *tags: dict(cell_type='code', metadata=dict(tags=tags), source=source, outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    cells = ([cell(parameters, 'parameters')] if parameters else []) + [cell(s) for s in sources]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=4, metadata=kernel, cells=cells)))
    return path


def sweep_file(folder, profile=TINY, *sources, name='tiny', **settings):
    "A sweep file (JSON is YAML) and its notebook."
    notebook(folder/f'{name}.ipynb', *(sources or [BODY]), **settings)
    path = folder/f'{name}.yaml'
    path.write_text(json.dumps(dict(notebook=f'{name}.ipynb', profiles=dict(miniature=dict(time_limit_minutes=5) | profile))))
    return path


def python(code, **kwargs):
    return subprocess.Popen([sys.executable, '-c', code], **kwargs)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.05)
