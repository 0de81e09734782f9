"What is kept of a sweep: every edit is found, nothing is half-written, and the tables follow from it alone."
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from daclip_repro.cli import main
from daclip_repro.sweeps.records import save_rows
from daclip_repro.tables import archive as ar
from daclip_repro.tables.formats import write_tables
from daclip_repro.tables.statistics import synthetic_rows

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize('name', ['made.csv', 'made.md', 'made.html', 'made.tex', 'made_claims.csv'])
def test_an_edited_table_is_found(lab, name, capsys):
    main(['tables'])
    table = lab/'results/tables'/name
    table.write_text(edit_number(table.read_text()))
    assert main(['tables', '--check']) == 1
    assert capsys.readouterr().err.strip() == f'results/tables/{name}: is not what results/records gives; daclip tables writes it'
    table.unlink()
    assert main(['tables', '--check']) == 1 and f'{name}: is missing' in capsys.readouterr().err


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


def test_a_deleted_run_is_no_longer_kept(lab):
    import shutil
    main(['tables'])
    shutil.rmtree(runs()[1].folder)
    assert main(['tables']) == 0
    assert json.loads((lab/'results/records/made.json').read_text())['runs'][0]['run'] == runs()[0].id
    assert len(ar.read_archive('made').runs) == 1 and main(['tables', '--check']) == 0


# ---- the committed records

@pytest.fixture
def committed(tmp_path):
    "A copy of the results of the sampling sweep."
    import shutil
    for part in ('records', 'tables'): shutil.copytree(ROOT/'results'/part, tmp_path/part)
    shutil.copy(ROOT/'results/published.csv', tmp_path)
    return tmp_path


def tables(folder, *options): return main(['tables', str(ROOT/'experiments/sampling.yaml'), '--out', str(folder), *options])


def test_one_number_changed_by_hand_names_its_run(committed, capsys):
    file = committed/'records/sampling.csv'
    lines = file.read_text().splitlines(keepends=True)
    columns, row = lines[0].strip().split(','), lines[100].strip('\n').split(',')
    assert tables(committed, '--check') == 0
    at = columns.index('psnr')
    row[at] = f'{float(row[at]) + .01:.6g}'
    file.write_text(''.join([*lines[:100], ','.join(row) + '\n', *lines[101:]]))
    capsys.readouterr()
    assert tables(committed, '--check') == 1
    assert capsys.readouterr().err == f"{file}: a row of run {row[columns.index('run')]} was edited\n"


def test_a_run_taken_out_says_not_run_in_every_format(committed, monkeypatch, capsys):
    monkeypatch.setattr('daclip_repro.tables.everything.write_results', lambda found, out, *_: write_tables(*found[:2], out, found.by))
    file, table = committed/'records/sampling.json', committed/'records/sampling.csv'
    facts, rows = json.loads(file.read_text()), pd.read_csv(table, dtype=str)
    gone = next(r for r in facts['runs'] if r['point']['degradation'] == 'noisy' and r['point']['steps'] == [100])
    facts['runs'].remove(gone)
    file.write_text(json.dumps(facts))
    rows[rows.run != gone['run']].to_csv(table, index=False)
    assert tables(committed, '--check') == 1 and 'sampling.md: is not what' in capsys.readouterr().err
    before = {f: (committed/f'tables/sampling.{f}').read_text() for f in ('md', 'html', 'tex')}
    assert tables(committed) == 0
    after = {f: (committed/f'tables/sampling.{f}').read_text() for f in before}
    lines = {'md': r'^\| noisy +\|.*', 'html': r'(?s)row">noisy</th>.*?</tr>', 'tex': r'^noisy &.*'}
    for form, text in after.items():
        found = re.findall(lines[form], text, re.M)
        assert len(found) == 3 and all(line.count('not run') == 3 for line in found), form
        assert not re.search(r'(?<!`)not run(?!`)', re.sub('<code>.*?</code>|texttt.not run', '', before[form])), form


def test_nothing_was_run(lab, capsys):
    import shutil
    shutil.rmtree(runs()[0].root)
    assert main(['tables']) == 0 and capsys.readouterr().out == 'experiments/made.yaml: not run\n'
    assert main(['tables', 'experiments/made.yaml']) == 2 and 'no run of profile miniature is done' in capsys.readouterr().err
