"What is kept of a sweep: every edit is found, nothing is half-written, and the tables follow from it alone."
import json
import re

import pandas as pd
import pytest

from daclip_repro.cli import main
from daclip_repro.sweeps.records import save_rows
from daclip_repro.tables import archive as ar
from daclip_repro.tables.statistics import synthetic_rows

SWEEP = """notebook: made.ipynb
profiles:
  miniature:
    grid: {seed: [0, 1]}
claims:
  - {name: posterior wins, metric: psnr, better: {method: posterior}, than: {method: sde}}
"""
NOTEBOOK = {'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {'tags': ['parameters']}, 'execution_count': None, 'outputs': [],
                       'source': "seed = 0\nrun_dir = ''"}], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}


def rows(seed):
    made = synthetic_rows(photos=6, steps=(10,), seeds=1, degradations=('hazy', 'noisy'), seed=seed)
    return made.drop(columns=['run', 'experiment', 'scale', 'steps']).assign(seed=seed)


def finish(run, made):
    with run.lock():
        run.begin()
        save_rows(made.to_dict('records'), str(run.folder))
        (run.folder/'provenance.json').write_text(json.dumps(dict(commit='c' * 40, dirty=False, finished='2026-01-01', python='3.11',
            packages={'torch': '2', 'pandas': '3', 'open-clip-torch': '3'})))
        run.seal()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A repository with one sweep of two finished runs."
    from daclip_repro.sweeps.papermill import load_sweep
    (tmp_path/'experiments').mkdir()
    (tmp_path/'results').mkdir()
    (tmp_path/'experiments/made.yaml').write_text(SWEEP)
    (tmp_path/'experiments/made.ipynb').write_text(json.dumps(NOTEBOOK))
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(tmp_path/'experiments/made.yaml')
    for run in sweep.runs('miniature'): finish(run, rows(run.parameters['seed']))
    return tmp_path


def runs():
    from daclip_repro.sweeps.papermill import load_sweep
    return load_sweep('experiments/made.yaml').runs('miniature')


def test_what_is_kept_can_be_read_again(lab):
    kept = ar.archived(runs(), 'miniature')
    ar.write_archive(kept)
    again = ar.read_archive('made')
    assert again.scale == 'miniature' and [r['run'] for r in again.runs] == [r.id for r in runs()] and len(again.rows) == len(kept.rows)
    assert again.runs[0]['versions'] == {'torch': '2', 'open-clip-torch': '3'} and again.runs[0]['commit'] == 'c' * 40
    merged = again.rows.merge(kept.rows, on=['run', 'photo', 'degradation', 'method'])
    assert (merged.psnr_x / merged.psnr_y - 1).abs().max() < 1e-5


def test_rows_of_runs_with_other_columns_keep_their_fingerprint(tmp_path):
    a, b = rows(0).assign(run='a'), rows(1).assign(run='b', steps=10, extra='x').drop(columns='ssim')
    facts = [dict(run=r.run[0], point={}, rows=len(r), fingerprint=ar.fingerprint(r)) for r in (a, b)]
    ar.write_archive(ar.Archive('mixed', 'miniature', facts, pd.concat([a, b])), tmp_path)
    assert len(ar.read_archive('mixed', tmp_path).rows) == len(a) + len(b)


def test_an_unfinished_run_is_not_kept(lab):
    one = runs()[0]
    (one.folder/'rows.csv').write_text('photo\n')
    with pytest.raises(ValueError, match=f'{one.id} is not done: rows.csv was edited'): ar.archived(runs(), 'miniature')


def edit_number(text): return re.sub(r'(\d)\.(\d)', lambda m: f'{(int(m[1]) + 1) % 10}.{m[2]}', text, count=1)
def drop_line(text): return text[:text.rindex('\n', 0, -1) + 1]
def add_stranger(text): return text + text.splitlines()[-1].replace(runs()[1].id, 'f' * 16) + '\n'


@pytest.mark.parametrize('spoil, why', [(edit_number, 'a row of run {0} was edited'), (drop_line, 'rows of run {1}, made.json says'),
    (add_stranger, 'has rows of run ffffffffffffffff, which made.json does not know'), (lambda t: '', 'not a readable CSV file'),
    (lambda t: t.replace('run', 'ran', 1), "expected a column 'run'")])
def test_every_edit_is_found(lab, spoil, why, capsys):
    assert main(['tables']) == 0 and main(['tables', '--check']) == 0
    path = lab/'results/records/made.csv'
    path.write_text(spoil(path.read_text()))
    capsys.readouterr()
    before = {p: p.read_bytes() for p in lab.rglob('*') if p.is_file()}
    assert main(['tables', '--check']) == 1
    assert why.format(*(r.id for r in runs())) in capsys.readouterr().err
    assert {p: p.read_bytes() for p in lab.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('text', ['', '[]', '{"runs": 3}', '{"runs": [{}], "scale": "x"}'])
def test_a_broken_record_is_one_sentence(lab, text):
    ar.write_archive(ar.archived(runs(), 'miniature'))
    (lab/'results/records/made.json').write_text(text)
    with pytest.raises(ValueError, match='made.json: not a record of runs'): ar.read_archive('made')


def test_an_edited_table_is_found(lab, capsys):
    main(['tables'])
    table = lab/'results/tables/made.md'
    table.write_text(edit_number(table.read_text()))
    assert main(['tables', '--check']) == 1
    assert capsys.readouterr().err.strip() == 'results/tables/made.md: is not what results/records gives; daclip tables writes it'
    table.unlink()
    assert main(['tables', '--check']) == 1 and 'made.md: is missing' in capsys.readouterr().err


def test_tables_outlive_their_runs(lab, capsys):
    "When code has moved on, tables come from what was kept, and the command says so."
    import shutil
    main(['tables'])
    before = {p.name: p.read_bytes() for p in (lab/'results/tables').iterdir()}
    shutil.rmtree(runs()[0].root)
    capsys.readouterr()
    assert main(['tables']) == 0
    assert f'no run is done with the code as it is now; from what was kept of commit {"c" * 10}' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (lab/'results/tables').iterdir()} == before


def test_a_deleted_run_says_not_run(lab):
    import shutil
    main(['tables'])
    shutil.rmtree(runs()[1].folder)
    assert main(['tables']) == 0
    assert json.loads((lab/'results/records/made.json').read_text())['runs'][0]['run'] == runs()[0].id
    assert len(ar.read_archive('made').runs) == 1 and main(['tables', '--check']) == 0


def test_nothing_was_run(lab, capsys):
    import shutil
    shutil.rmtree(runs()[0].root)
    assert main(['tables']) == 0 and capsys.readouterr().out == 'experiments/made.yaml: not run\n'
    assert main(['tables', 'experiments/made.yaml']) == 2 and 'no run of profile miniature is done' in capsys.readouterr().err
