"The gallery: what it chooses, what it refuses, and what a kill or a half-copied machine leaves of it."
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from daclip_repro.tables import gallery as ga
from daclip_repro.tables.archive import Archive, fingerprint

PHOTOS, SIDE = ['a', 'b', 'c', 'd'], 24
CLAIM = dict(name='m beats input', metric='psnr', better={'method': 'm', 'steps': 10}, than={'method': 'input'})


def run(root, number, lines, seed=0, words=('hazy', 'noisy'), gain=1.):
    "One run: its pictures, and its rows with a gain that grows from photograph to photograph."
    id = f'{number}' * 16
    folder = root/'runs'/id/'pictures'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    methods = [('HQ', ['any']), ('input', words), *((f'{m} {s}' if s else m, words) for m, s in lines)]
    for k, (_, rows) in enumerate(methods):
        pixels = rng.integers(0, 256, (len(rows) * SIDE, len(PHOTOS) * SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{k}.webp', lossless=True)
    content = dict(photos=PHOTOS, methods=[dict(method=m, file=f'{k}.webp', rows=[*w]) for k, (m, w) in enumerate(methods)])
    (folder/'index.json').write_text(json.dumps(content))
    stamp = dict(seed=seed, protocol='rgb', lpips=None, run=id)
    rows = [dict(photo=p, degradation=w, method=m, steps=s, psnr=20. + (m != 'input') * gain * i, **stamp)
            for w in words for m, s in [('input', 0), *lines] for i, p in enumerate(PHOTOS)]
    return pd.DataFrame(rows)


def archive(*rows):
    facts = [dict(run=r.run[0], point={}, rows=len(r), fingerprint=fingerprint(r), commit='c' * 40, finished='2026-01-01') for r in rows]
    return Archive('made', 'miniature', facts, pd.concat(rows, ignore_index=True))


@pytest.fixture
def made(tmp_path): return archive(run(tmp_path, 1, [('m', 10), ('m', 20)]), run(tmp_path, 2, [('n', 0)], gain=-1.))


def write(made, root, claims=(CLAIM,)): return ga.write_gallery(made, [*claims], root/'runs', root)


def kept(root): return {p.name: p.read_bytes() for p in sorted((root/'gallery/made').iterdir())}


def test_the_claim_ranks_and_every_tile_has_its_own_numbers(made, tmp_path):
    write(made, tmp_path)
    found = ga.read_gallery('made', tmp_path)
    assert [(d['degradation'], d['by']) for d in found['degradations']] == [('hazy', 'm 10'), ('noisy', 'm 10')]
    hazy = found['degradations'][0]
    assert [(c['case'], c['photo'], c['gain']) for c in hazy['cases']] == [('best', 'd', 3.), ('median', 'b', 1.), ('worst', 'a', 0.)]
    assert {t['line']: (t.get('run', '')[:1], t.get('psnr')) for t in hazy['cases'][0]['tiles']} == {
        'input': ('1', 20.), 'm 10': ('1', 23.), 'm 20': ('1', 23.), 'n': ('2', 17.), 'HQ': ('', None)}
    assert all(t['lpips'] is None for t in hazy['cases'][0]['tiles'][:-1])


def test_without_clean_photographs_the_measure_that_needs_none_ranks(tmp_path):
    made = run(tmp_path, 1, [('m', 10)])
    index = tmp_path/'runs'/('1' * 16)/'pictures/index.json'
    content = json.loads(index.read_text())
    change(index, methods=[m for m in content['methods'] if m['method'] != 'HQ'])
    made = archive(made.rename(columns={'psnr': 'niqe'}))
    write(made, tmp_path)
    noisy = ga.read_gallery('made', tmp_path)['degradations'][1]
    assert [(c['case'], c['photo'], c['gain']) for c in noisy['cases']] == [('best', 'a', 0.), ('median', 'c', -2.), ('worst', 'd', -3.)]
    assert [t['line'] for t in noisy['cases'][0]['tiles']] == ['input', 'm 10'] and ga.gallery_problems(made, tmp_path) == []


def test_a_tile_is_cut_where_the_index_says(made, tmp_path):
    write(made, tmp_path)
    noisy = ga.read_gallery('made', tmp_path)['degradations'][1]
    tile = next(t for t in noisy['cases'][0]['tiles'] if t['line'] == 'n')
    sheet = np.asarray(Image.open(tmp_path/'runs'/('2' * 16)/'pictures/2.webp').convert('RGB'))[SIDE:, 3 * SIDE:].astype(int)
    found = np.asarray(Image.open(tmp_path/'gallery/made'/tile['file']).convert('RGB')).astype(int)
    others = [p for p in (tmp_path/'gallery/made').glob('*.webp') if p.name != tile['file']]
    others = [np.asarray(Image.open(p).convert('RGB')).astype(int) for p in others]
    assert found.shape == sheet.shape and np.abs(found - sheet).mean() < min(np.abs(o - sheet).mean() for o in others) / 1.5


@pytest.mark.parametrize('claims, by', [
    ([], 'm 10'), ([dict(better={'method': 'absent', 'steps': 3}), dict(better={'method': 'n'})], 'n'),
    ([dict(better={'method': 'input'})], 'm 10'), ([dict(better={'method': 'n', 'degradation': 'noisy'}), CLAIM], 'm 10'),
    ([dict(better={'method': 'm', 'steps': [10, 20]}), dict(better={'method': 'm', 'steps': 20})], 'm 20'),
    ([dict(better={'method': 'm', 'steps': 20, 'degradation': ['noisy']}),
      dict(better={'method': 'n', 'degradation': ['noisy', 'hazy']})], 'n')])
def test_which_method_ranks(claims, by): assert ga.deciding_line(['input', 'm 10', 'm 20', 'n'], claims, 'hazy') == by


def test_the_smallest_seed_is_shown_and_no_mixture(tmp_path):
    first, later = run(tmp_path, 1, [('m', 10)], seed=2), run(tmp_path, 2, [('m', 10)], seed=1)
    other = run(tmp_path, 3, [('n', 0)], seed=2)
    write(archive(first, later, other), tmp_path)
    found = ga.read_gallery('made', tmp_path)
    assert found['seed'] == 1 and list(found['runs']) == ['2' * 16] and 'n' not in {line for _, line in ga.shown(found)}


def test_without_pictures_what_was_there_stays(made, tmp_path):
    assert ga.write_gallery(made, [CLAIM], tmp_path/'nowhere', tmp_path) is None and not (tmp_path/'gallery').exists()
    write(made, tmp_path)
    before = kept(tmp_path)
    assert ga.write_gallery(made, [CLAIM], tmp_path/'nowhere', tmp_path) is None and kept(tmp_path) == before


def test_a_part_of_the_pictures_replaces_nothing_unless_the_runs_are_others(made, tmp_path):
    write(made, tmp_path)
    before = kept(tmp_path)
    (tmp_path/'runs'/('2' * 16)/'pictures/index.json').unlink()
    assert write(made, tmp_path) is None and kept(tmp_path) == before
    newer = archive(run(tmp_path, 3, [('m', 10)]))
    assert write(newer, tmp_path) and list(ga.read_gallery('made', tmp_path)['runs']) == ['3' * 16]
    assert set(kept(tmp_path)) == {'gallery.json'} | {t['file'] for d in ga.read_gallery('made', tmp_path)['degradations']
                                                      for c in d['cases'] for t in c['tiles']}


@pytest.mark.parametrize('after', [0, 1, 10])
def test_a_kill_while_it_is_written_leaves_the_old_one(made, tmp_path, monkeypatch, after):
    write(made, tmp_path)
    newer, real, count = archive(run(tmp_path, 3, [('m', 10)])), ga.write_file, iter(range(99))
    def killed(path, data):
        if next(count) == after: raise KeyboardInterrupt
        return real(path, data)
    monkeypatch.setattr(ga, 'write_file', killed)
    with pytest.raises(KeyboardInterrupt): write(newer, tmp_path)
    assert ga.gallery_problems(made, tmp_path) == []
    monkeypatch.setattr(ga, 'write_file', real)
    write(newer, tmp_path)
    assert ga.gallery_problems(newer, tmp_path) == []


def test_a_budget_lowers_the_quality_and_then_refuses():
    noise = {k: np.random.default_rng(k).integers(0, 256, (64, 64, 3), dtype=np.uint8) for k in range(4)}
    size = lambda coded: sum(map(len, coded.values()))
    full = size(ga.encode(noise))
    assert size(ga.encode(noise, full - 1)) < full
    with pytest.raises(ValueError, match='expected at most 1000'): ga.encode(noise, 1000)


def change(path, **facts): path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize('fault, said', [
    (lambda p: (p/'index.json').write_text('{'), 'not an index of pictures'),
    (lambda p: change(p/'index.json', methods=[dict(method='m', rows=['hazy'])]), 'not an index of pictures'),
    (lambda p: change(p/'index.json', methods=[dict(method='m', file='../../../x.webp', rows=['hazy'])]), 'no such file beside it'),
    (lambda p: (p/'2.webp').unlink(), '2.webp: no such file beside it'),
    (lambda p: Image.new('RGB', (50, 30)).save(p/'2.webp'), 'expected 4 squares in 2 rows'),
    (lambda p: change(p/'index.json', photos=['a', 'b', 'c', 'x']), 'shows x, hazy, which the rows of run 1111111111111111 lack')])
def test_pictures_that_do_not_fit_are_refused(tmp_path, fault, said):
    made = archive(run(tmp_path, 1, [('m', 10), ('m', 20)]))
    fault(tmp_path/'runs'/('1' * 16)/'pictures')
    with pytest.raises(ValueError, match=said): write(made, tmp_path)
    assert not (tmp_path/'gallery').exists()


def test_the_check_finds_every_contradiction(made, tmp_path):
    file = write(made, tmp_path)
    assert ga.gallery_problems(made, tmp_path) == [] == ga.gallery_problems(made, tmp_path/'nowhere')
    content = json.loads(file.read_text())
    content['degradations'][0]['cases'][0]['tiles'][1]['psnr'] += .01
    file.write_text(json.dumps(content))
    assert 'm 10 on d, hazy: has other numbers than the kept rows of run 1111111111111111' in ga.gallery_problems(made, tmp_path)[0]
    write(made, tmp_path)
    first, second = sorted(file.parent.glob('*.webp'))[:2]
    first.unlink()
    second.write_bytes(b'')
    assert {w.split(': ')[1].split(' (')[0] for w in ga.gallery_problems(made, tmp_path)} == {'is missing', 'was edited'}
    write(made, tmp_path)
    gone = made._replace(rows=made.rows[made.rows.method != 'n'])
    assert all('n on' in w and 'not in the kept rows of run 2222222222222222' in w for w in ga.gallery_problems(gone, tmp_path))
    for text in ('{}', '[', json.dumps(content | dict(experiment='other'))):
        file.write_text(text)
        assert 'not a gallery of made' in ga.gallery_problems(made, tmp_path)[0]
