"Tables, statistics and figures: what must hold whatever the experiment."
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from daclip_repro.tables import everything
from daclip_repro.tables import figures as fig
from daclip_repro.tables import statistics as st
from daclip_repro.tables import tables as tb
from daclip_repro.tables.formats import write_tables

PUBLISHED = Path(__file__).parent.parent/'results'/'published.csv'
CLAIM = dict(name='posterior beats sde', metric='psnr', better={'method': 'posterior', 'steps': 100}, than={'method': 'sde', 'steps': 100})


@pytest.fixture(scope='module')
def rows(): return st.synthetic_rows(photos=7, steps=(10, 100), seeds=2, degradations=('hazy', 'noisy', 'rainy'), seed=1)


def averages(table): return tb.section_markdown(tb.average_section(table))
def by_degradation(table, metric): return tb.section_markdown(tb.degradation_section(table, metric))
def claimed(judged, rows): return tb.section_markdown(tb.claims_section(judged, tb.sampling_table(rows)))


def line(table, method, steps=100, degradation='average', metric='psnr'):
    return table.query('method == @method and steps == @steps and degradation == @degradation and metric == @metric').iloc[0]


# ---- statistics

def simulated(n, shape, tables=1000):
    rng = np.random.default_rng([n, 11])
    photo = rng.normal(0, 1, (n, 1, tables)) if shape == 'normal' else rng.gamma(4, .5, (n, 1, tables)) - 2
    return st.photo_values(photo + rng.normal(0, .4, (n, 4, tables)))


@pytest.mark.parametrize('n', [5, 7, 30])
@pytest.mark.parametrize('shape', ['normal', 'skewed'])
def test_intervals_cover(n, shape):
    found = st.intervals(simulated(n, shape))
    assert .93 <= np.mean((found.low <= 0) & (found.high >= 0)) <= .97


def test_coverage_can_fail():
    x = simulated(7, 'normal')
    low, high = np.quantile(st.draws(7).counts @ x / 7, [.025, .975], axis=0)
    assert np.mean((low <= 0) & (high >= 0)) < .92


@pytest.mark.parametrize('k, luck', [(3, 0.), (3, .3), (3, 3.), (5, 3.)])
def test_intervals_over_trainings_cover(k, luck):
    rng = np.random.default_rng([k, 12])
    x = rng.normal(0, 1, (12, 1, 1000)) + luck * rng.normal(0, 1, (1, k, 1000)) + rng.normal(0, .4, (12, k, 1000))
    found = st.crossed_intervals(x)
    assert .92 <= np.mean((found.low <= 0) & (found.high >= 0)) <= .975


def test_what_trainings_leave_open():
    x = np.random.default_rng(0).normal(0, 1, (6, 3, 4))
    x[0, :, 0], x[0, 1, 1], x[:, 1:, 2], x[:, :, 3] = np.nan, np.nan, np.nan, np.nan
    found = st.crossed_intervals(x)
    assert found.n.tolist() == [5, 6, 6, 0] and np.isfinite(found.mean).tolist() == [True, True, True, False]
    assert np.isfinite(found.low).tolist() == [True, False, False, False]
    assert np.allclose([found.low[0], found.high[0]], np.ravel(st.crossed(x[1:, :, :1])))


def test_seeds_are_not_photographs():
    "Thirty seeds of one photograph do not make an interval narrower than seven photographs allow."
    rng = np.random.default_rng(0)
    photo, seed = np.repeat(np.arange(7), 30), rng.normal(0, .01, 210)
    x = (np.arange(7.)[photo] + seed)[:, None]
    found = st.intervals(st.photo_values(st.by_photo(x, photo, np.zeros(210, int), (7, 1))))
    low, _ = st.student_t(np.arange(7.)[:, None])
    assert found.low[0] < found.mean[0] - .5 * (3 - low[0])


def test_photo_values_both_designs():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(12, 4, 2))
    assert np.allclose(st.photo_values(x), x.mean(1))
    own = np.where((np.arange(12)[:, None] % 4 == np.arange(4))[..., None], x, np.nan)
    v = st.photo_values(own)
    assert np.allclose(v.mean(0), np.nanmean(np.nanmean(own, 0), 0))
    assert np.allclose(v.var(0, ddof=1) / 12, (np.nanvar(own, axis=0, ddof=1) / 3).sum(0) / 16)


def test_lone_photograph_of_a_degradation_gives_no_interval():
    x = np.ones((6, 2, 1)) * np.arange(6)[:, None, None]
    x[1:, 1] = np.nan
    found = st.intervals(st.photo_values(x))
    assert np.isnan(found.low[0]) and np.isfinite(st.macro_mean(x)[0])


def test_intervals_do_not_depend_on_the_other_columns():
    x = np.random.default_rng(0).normal(size=(9, 5))
    x[7:, 2] = np.nan
    together, alone = st.intervals(x), st.intervals(x[:, [2]])
    assert np.allclose(together.low[2], alone.low[0], atol=1e-12) and together.n.tolist() == [9, 9, 7, 9, 9]


def test_intervals_of_few_and_equal_photographs():
    few = np.where(np.arange(4)[:, None] < [4, 2, 1, 0], np.arange(4.)[:, None], np.nan)
    found = st.intervals(few)
    assert found.n.tolist() == [4, 2, 1, 0]
    assert np.isclose(found.low[0], stats.ttest_1samp(np.arange(4.), 0).confidence_interval().low)
    assert np.isnan(found.low[2:]).all() and found.mean[2] == 0
    assert st.intervals(np.full((7, 1), 2.5)).low[0] == 2.5


def test_pairing_cancels_the_photograph(rows):
    sides = [rows.query('method == @m and steps == 100') for m in ('posterior', 'sde')]
    pairs = st.paired_differences(*sides, 'psnr')
    assert len(pairs) == 7 * 3 * 2
    assert pairs.groupby('photo').difference.mean().std() < sides[0].groupby('photo').psnr.mean().std() / 3
    shuffled = st.paired_differences(sides[0].sample(frac=1, random_state=0), sides[1].sample(frac=1, random_state=1), 'psnr')
    assert shuffled.equals(pairs)
    assert np.allclose(st.paired_differences(*sides, 'psnr', higher_is_better=False).difference, -pairs.difference)
    assert len(st.paired_differences(sides[0].iloc[5:], sides[1].iloc[:-3], 'psnr')) == 7 * 3 * 2 - 8


def test_wins(): assert np.array_equal(st.wins(np.array([2., 0, -1, np.nan])), [1, .5, 0, np.nan], equal_nan=True)


@pytest.mark.parametrize('low, high, n, margin, expected', [
    (.1, .4, 7, 0, 'reproduced'), (.1, .4, 4, 0, 'too close to tell'), (-.4, -.1, 7, 0, 'not reproduced'),
    (-.1, .1, 7, 0, 'too close to tell'),
    (-.2, -.1, 7, -.3, 'reproduced'), (-.5, -.4, 7, -.3, 'not reproduced'), (-.4, -.2, 7, -.3, 'too close to tell'),
    (.1, .4, 7, .5, 'not reproduced'),
    (0, 0, 7, 0, 'too close to tell'), (np.nan, np.nan, 1, 0, 'too close to tell'), (np.nan, np.nan, 0, 0, 'not run')])
def test_verdict(low, high, n, margin, expected): assert st.verdict(low, high, n, margin) == expected


# ---- tables

def test_values_and_gains_are_means_of_means(rows):
    table = tb.sampling_table(rows)
    mean = rows.groupby(['method', 'steps', 'degradation', 'photo']).psnr.mean().groupby(['method', 'steps', 'degradation']).mean()
    assert np.isclose(line(table, 'sde', degradation='noisy').value, mean['sde', 100, 'noisy'])
    assert np.isclose(line(table, 'sde').value, mean['sde', 100].mean())
    assert np.isclose(line(table, 'sde').gain, mean['sde', 100].mean() - mean['input', 0].mean())
    lower = line(table, 'posterior', metric='stlpips')
    assert lower.gain > 0 > lower.value - line(table, 'input', 0, metric='stlpips').value
    assert (lower.n_photos, lower.n_seeds, lower.n_images, lower.missing) == (7, 2, 42, 0)


def test_an_average_weighs_degradations_not_images(rows):
    uneven = rows[(rows.degradation != 'noisy') | (rows.photo < 'photo0002')]
    table = tb.sampling_table(uneven)
    assert np.isclose(line(table, 'sde').value, np.mean([line(table, 'sde', degradation=d).value for d in ('hazy', 'noisy', 'rainy')]))


def test_ties_are_marked_by_pairs(rows):
    table = tb.sampling_table(rows)
    assert line(table, 'posterior').mark == 'best' and line(table, 'ode').mark == '' and line(table, 'input', 0).mark == ''
    ode = rows.query("method == 'ode' and steps == 100")
    alike = ode.assign(method='twin', psnr=ode.psnr + 5 + np.tile([.2, -.2], len(ode) // 2))
    marked = tb.sampling_table(pd.concat([rows, alike, alike.assign(method='ahead', psnr=ode.psnr + 5)]), ['psnr'])
    assert {line(marked, 'twin').mark, line(marked, 'ahead').mark} == {'best', 'tie'} and line(marked, 'posterior').mark == ''
    assert (tb.sampling_table(rows[rows.photo < 'photo0004']).mark == '').all()


def test_a_group_without_all_photographs_is_not_marked(rows):
    table = tb.sampling_table(rows.query("not (method == 'posterior' and photo == 'photo0000')"))
    best = line(table, 'posterior')
    assert best.mark == best.mark_headline == '' and best.missing == 6 and '| 36 of 42' in averages(table)


def bold(text): return {r['degradation']: {c for c in r if r[c].startswith('**')} for r in records(text)}


def records(text):
    "The lines of a Markdown table, column → text."
    cells = [[c.strip() for c in r.strip('|').split('|')] for r in text.splitlines() if r.startswith('|')]
    return [dict(zip(cells[0], r)) for r in cells[2:]]


@pytest.fixture(scope='module')
def worse(rows):
    "Posterior sampling wins in 10 steps and is far behind in 100, the steps of the per-degradation tables."
    return rows.assign(psnr=rows.psnr - 5 * ((rows.method == 'posterior') & (rows.steps == 100)))


def test_bold_means_best_of_the_columns_shown(worse):
    "What is not in a table cannot take its bold print away, and the table of averages still compares all lines."
    table = tb.sampling_table(worse)
    assert line(table, 'posterior', 10).mark == 'best' and (table.query("steps != 10 and metric == 'psnr'").mark == '').all()
    assert (table.query('steps == 10').mark_headline == '').all() and line(table, 'sde').mark_headline == 'best'
    shown = bold(by_degradation(table, 'psnr'))
    assert list(shown) == ['hazy', 'noisy', 'rainy', 'average'] and all(b == {'sde'} for b in shown.values())
    assert [r['steps'] for r in records(averages(table)) if '**' in r['PSNR (dB) ↑']] == ['10']
    alone = tb.sampling_table(worse.query('steps != 10'))
    assert (alone.mark == alone.mark_headline).all()
    both = table.query('steps != 10').reset_index(drop=True)
    assert both.mark_headline.tolist() == alone.mark.tolist()


def test_ties_and_the_input_are_bold_among_the_columns_shown(worse):
    ode = worse.query("method == 'ode' and steps == 100")
    sde = worse.query("method == 'sde' and steps == 100").psnr.to_numpy()
    twin = ode.assign(method='twin', psnr=sde + np.tile([.2, -.2], len(ode) // 2))
    assert bold(by_degradation(tb.sampling_table(pd.concat([worse, twin]), ['psnr']), 'psnr'))['average'] == {'sde', 'twin'}
    lost = worse.assign(psnr=worse.psnr - 9 * (worse.steps == 100))
    assert bold(by_degradation(tb.sampling_table(lost, ['psnr']), 'psnr'))['average'] == {'input'}
    few = tb.sampling_table(worse[worse.photo < 'photo0004'], ['psnr'])
    assert (few.mark_headline == '').all()


def test_without_steps_all_lines_are_headline(rows):
    made = rows.query("steps == 100").rename(columns={'method': 'training'}).drop(columns='steps')
    table = tb.sampling_table(made, by=['training'], baseline={'training': 'ode'})
    assert tb.headline(table, {'training': 'ode'}).all() and table.mark_headline.equals(table.mark) and (table.mark == 'best').any()


# ---- narrow tables

def test_what_every_line_shares_is_a_sentence(rows):
    text = averages(tb.sampling_table(rows))
    assert list(records(text)[0]) == ['method', 'steps', 'PSNR (dB) ↑', 'SSIM ↑', 'ST-LPIPS ↓']
    assert text.endswith('In every line: photos 7, seeds 2, images 42, protocol rgb, scale synthetic, published numbers not available, '
                         'LPIPS not available.')
    mixed = averages(tb.sampling_table(rows.query('steps != 100 or seed == 0'), groups=[dict(method='ode', steps=5)]))
    assert list(records(mixed)[0])[-2:] == ['seeds', 'images'] and 'In every line that was run: photos 7, protocol' in mixed
    by = {(r['method'], r['steps']): r for r in records(mixed)}
    assert by['sde', '100']['images'] == '21 of 42' and by['sde', '10']['images'] == '42' and by['input', '0']['images'] == '42'
    assert by['ode', '5']['images'] == '–' and by['ode', '5']['SSIM ↑'] == 'not run'


def test_images_are_counted_once_a_line(rows):
    table = tb.sampling_table(rows.query('steps != 100 or seed == 0'))
    text = by_degradation(table, 'psnr')
    assert text.endswith('Images behind each number (the input aside): 7 of 14.') and 'images' not in records(text)[0]
    assert tb.page(table).count('of 42') == 3
    holes = rows.assign(ssim=rows.ssim.where((rows.method != 'ode') | (rows.photo > 'photo0000')))
    ode = next(r for r in records(averages(tb.sampling_table(holes))) if r['method'] == 'ode')
    assert ode['images'] == 'PSNR/ST-LPIPS: 42, SSIM: 36 of 42'
    uneven = rows.query("not (method == 'ode' and degradation == 'noisy' and seed == 1)")
    by = {r['degradation']: r for r in records(by_degradation(tb.sampling_table(uneven), 'psnr'))}
    assert by['noisy']['images'] == 'sde/posterior: 14, ode: 7 of 14' and by['hazy']['images'] == '14'


def test_a_metric_stays_where_one_line_has_it(rows):
    some = rows.assign(lpips=rows.psnr.where(rows.method == 'sde') / 100)
    by = {r['method']: r for r in records(averages(tb.sampling_table(some)))}
    assert by['sde']['LPIPS ↓'].startswith('0.2') and by['ode']['LPIPS ↓'] == 'not available'


def test_claims_say_once_what_they_share(rows):
    ten = {'better': {'method': 'posterior', 'steps': 10}, 'than': {'method': 'sde', 'steps': 10}}
    claims = [CLAIM, CLAIM | ten | {'name': 'ten'}, CLAIM | {'name': 'absent', 'than': {'method': 'sde', 'steps': 7}}]
    text = claimed(tb.claim_table(rows.query("method != 'posterior' or steps != 100 or seed == 0"), claims), rows)
    assert [r['images'] for r in records(text)] == ['21 of 42', '42', '–']
    assert [r['verdict'] for r in records(text)] == ['reproduced', 'reproduced', "not run ('than' was not run)"]
    assert text.endswith('In every line that was run: published difference not available, photos 7.')


def test_not_run_and_not_available(rows):
    holes = rows.query("not (method == 'ode' and steps == 100 and degradation == 'noisy')")
    table = tb.sampling_table(holes, groups=[dict(method='posterior', steps=50)], degradations=['hazy', 'noisy', 'rainy'])
    assert line(table, 'ode', degradation='noisy').status == line(table, 'ode').status == 'not run'
    assert np.isnan(line(table, 'ode').value) and line(table, 'ode', degradation='hazy').status == 'ok'
    assert line(table, 'posterior', 50).status == 'not run' and line(table, 'sde', metric='lpips').status == 'not available'
    page = tb.page(table)
    assert 'not run' in page and 'not available' in page and 'nan' not in page.lower()
    assert (tb.sampling_table(rows, degradations=['snowy']).query("degradation in ['snowy', 'average']").status == 'not run').all()


def test_few_photographs_are_said(rows):
    table = tb.sampling_table(rows[rows.photo < 'photo0004'])
    assert (table[table.status == 'ok'].interval == 'cannot be trusted').all()
    assert '‡' in averages(table) and 'cannot be trusted' in tb.page(table)
    one = tb.sampling_table(rows[rows.photo == 'photo0000'])
    assert line(one, 'sde').interval == 'not available' and '(one photograph)' in tb.page(one)


def test_other_columns_make_lines(rows):
    ours = rows.query("method == 'sde' and steps == 100")
    made = pd.concat([ours.assign(training=t, psnr=ours.psnr + i) for i, t in enumerate(('plain', 'robust'))])
    made = made.drop(columns=['method', 'steps'])
    table = tb.sampling_table(made, by=['training'], baseline={'training': 'plain'})
    assert np.allclose(table.query("training == 'robust' and metric == 'psnr'").gain, 1)
    assert 'robust' in tb.page(table, by=['training'], baseline={'training': 'plain'})


@pytest.mark.parametrize('change, why', [
    (lambda r: r.drop(columns='photo'), "column 'photo' is missing"),
    (lambda r: r.drop(columns='protocol'), "column 'protocol' is missing"),
    (lambda r: r.drop(columns=['psnr', 'ssim', 'stlpips', 'lpips']), 'no metric column'),
    (lambda r: r.iloc[:0], 'at least one row'),
    (lambda r: r.to_dict('list'), 'expected a pandas DataFrame, got dict'),
    (lambda r: pd.concat([r, r.tail(1)]), 'more than one row for method'),
    (lambda r: r.assign(protocol=np.where(r.seed == 0, 'y', 'rgb')), 'mix the protocols rgb, y'),
    (lambda r: r.assign(scale=np.where(r.seed == 0, 'paper', 'miniature')), 'mix the scales miniature, paper'),
    (lambda r: r.assign(experiment=np.where(r.seed == 0, 'a', 'b')), 'mix the experiments a, b'),
    (lambda r: r.assign(psnr=np.inf), "column 'psnr' is infinite"),
    (lambda r: r.assign(psnr='good'), "column 'psnr' has 'good', expected a number"),
    (lambda r: r.assign(steps=.5), "column 'steps' has 0.5, expected a whole number"),
    (lambda r: r.assign(degradation=None), "column 'degradation' is empty"),
])
def test_bad_rows_are_refused_in_one_sentence(rows, change, why):
    with pytest.raises(ValueError, match=why) as e: tb.sampling_table(change(rows))
    assert '\n' not in str(e.value)


def test_unknown_metric(rows):
    with pytest.raises(ValueError, match="metric 'pnsr' is unknown: expected one of psnr"): tb.sampling_table(rows, ['pnsr'])


def test_equal_copies_of_the_input_merge_and_others_do_not(rows):
    copy = rows[rows.method == 'input'].assign(run='again')
    assert tb.sampling_table(pd.concat([rows, copy])).equals(tb.sampling_table(rows))
    with pytest.raises(ValueError, match='the input differs between runs for method input'):
        tb.sampling_table(pd.concat([rows, copy.assign(psnr=copy.psnr + .1)]))


# ---- claims

def test_claim_margins(rows):
    claims = [CLAIM, CLAIM | {'name': 'far', 'margin': 5.}, CLAIM | {'name': 'turned', 'better': CLAIM['than'], 'than': CLAIM['better']},
              CLAIM | {'name': 'loses at most 3 dB', 'better': CLAIM['than'], 'than': CLAIM['better'], 'margin': -3.}]
    judged = tb.claim_table(rows, claims)
    assert judged.verdict.tolist() == ['reproduced', 'not reproduced', 'not reproduced', 'reproduced']
    assert np.isclose(judged.difference[0], -judged.difference[2]) and judged.n_images[0] == 42
    both = tb.sampling_table(rows)
    assert np.isclose(judged.difference[0], line(both, 'posterior').value - line(both, 'sde').value)


def test_claims_that_cannot_be_judged(rows):
    holes = rows.query("not (method == 'sde' and degradation == 'noisy')")
    judge = lambda r, **change: tb.claim_table(r, [CLAIM | change]).iloc[0]
    assert judge(holes).verdict == 'not run' and 'not run on noisy' in judge(holes).note
    two = {'degradation': ['hazy', 'rainy']}
    assert judge(holes, better=CLAIM['better'] | two, than=CLAIM['than'] | two).verdict == 'reproduced'
    assert judge(rows, better={'method': 'posterior', 'steps': 7}).note == "'better' was not run"
    assert judge(rows, metric='lpips').note == 'lpips is not available'
    assert judge(rows.query("not (method == 'sde' and photo == 'photo0003')")).verdict == 'not run'
    fewer = judge(rows.query("not (method == 'sde' and seed == 1)"))
    assert fewer.verdict == 'reproduced' and fewer.note == 'pairs 21 of 42 images'
    assert judge(rows[rows.photo < 'photo0004']).verdict == 'too close to tell'


def test_many_claims_are_corrected():
    "A difference that one claim may rest on is not enough for the least sure of ten."
    rows = st.synthetic_rows(photos=7, steps=(10,), seeds=1, degradations=('hazy',), seed=3)
    pair = dict(CLAIM, better={'method': 'posterior'}, than={'method': 'ode'})
    tried = [(dict(pair, margin=m), tb.claim_table(rows, [dict(pair, margin=m)]).iloc[0]) for m in np.linspace(.2, 1.2, 21)]
    weak, alone = next((c, line) for c, line in tried if .01 < line.p < .05)
    assert alone.verdict == 'reproduced'
    ten = tb.claim_table(rows, [dict(weak, name=f'claim {i}') for i in range(10)])
    assert np.allclose(ten.p, min(1, 10 * alone.p)) and set(ten.verdict) == {'too close to tell'}
    text = claimed(ten, rows)
    assert 'too close to tell' in text and ('would take' in text) == (ten.needed > 7).any()


def test_holm():
    assert np.allclose(st.holm([.01, .04, .03, .005]), [.03, .06, .06, .02]) and st.holm([.9, .8]).tolist() == [1, 1]
    assert np.isnan(st.holm([np.nan]))[0] and st.holm([]).size == 0


def test_trainings_widen_what_is_said():
    "A method that was lucky in one of its trainings wins over photographs, and not over trainings."
    rows = st.synthetic_rows(photos=9, steps=(10, 100), seeds=3, degradations=('hazy', 'noisy'), seed=1)
    rows.loc[(rows.method == 'posterior') & (rows.seed == 0), 'psnr'] += 6
    nested, over = (line(tb.sampling_table(rows, trainings=t), 'posterior') for t in (False, True))
    assert over.value == pytest.approx(nested.value) and over.high - over.low > 2 * (nested.high - nested.low) and over.interval == 'ok'
    judged = [tb.claim_table(rows, [CLAIM], trainings=t).iloc[0].verdict for t in (False, True)]
    assert judged == ['reproduced', 'too close to tell']
    table = tb.sampling_table(rows, trainings=True)
    text = tb.page(table, tb.claim_table(rows, [CLAIM], trainings=True))
    assert 'over photographs and trainings' in text and 'fewer than 5 photographs or 3 trainings' in text
    two = rows[rows.seed < 2]
    assert line(tb.sampling_table(two, trainings=True), 'sde').interval == 'cannot be trusted'
    steady = two.assign(psnr=two.psnr - 6 * ((two.method == 'posterior') & (two.seed == 0)))
    assert tb.claim_table(steady, [CLAIM], trainings=True).iloc[0].verdict == 'too close to tell'
    assert tb.claim_table(steady, [CLAIM]).iloc[0].verdict == 'reproduced'


@pytest.mark.parametrize('change, why', [
    ({'margn': 0}, "unknown key 'margn'"), ({'metric': 'pnsr'}, "metric 'pnsr' is unknown"), ({'margin': 'small'}, 'expected a number'),
    ({'margin': True}, 'expected a number'),
    ({'better': 'posterior'}, 'expected a mapping'), ({'margin': float('nan')}, 'expected a finite number'),
    ({'better': {'methods': 'sde'}}, "no column 'methods'"),
    ({'better': {'steps': '100'}}, 'expected numbers'), ({'better': {'method': 5}}, 'expected text'),
    ({'better': {'method': 'posterior'}}, 'more than one row'),
    ({'better': {'method': 'posterior', 'steps': 100, 'degradation': 'noisy'}}, 'different degradations'),
    ({'published': {'paper': 'x'}}, 'expected better, than'),
    ({'published': {'better': 'x', 'than': 'y'}}, "expected one published PSNR of 'x', found 0")])
def test_bad_claims(rows, change, why):
    with pytest.raises(ValueError, match=why) as e: tb.claim_table(rows, [CLAIM | change], papers=tb.published(PUBLISHED))
    assert '\n' not in str(e.value)


def test_claims_need_their_keys_and_own_names(rows):
    for bad, why in (([{'name': 'x'}], "'metric' is missing"), ([CLAIM, CLAIM], 'used twice'), (['x'], 'expected a mapping')):
        with pytest.raises(ValueError, match=why): tb.claim_table(rows, bad)
    assert len(tb.claim_table(rows, [])) == 0


# ---- published numbers

def test_published_csv_is_valid():
    papers = tb.published(PUBLISHED)
    assert len(papers) > 600 and set(papers.status) == {'verified', 'unverified'} and papers.value.dtype == float
    assert b'\r' not in PUBLISHED.read_bytes()


def test_published_numbers_stand_beside_ours_with_their_dagger(rows):
    papers = tb.published(PUBLISHED)
    cells = tb.published_cells(papers, 'DA-CLIP (2310.01018)', ['Table 3', 'Appendix unified per-degradation'],
                               {'IR-SDE': {'method': 'sde', 'steps': 100}})
    table = tb.sampling_table(rows, published=cells)
    mean, noisy = line(table, 'sde'), line(table, 'sde', degradation='noisy')
    wanted = papers[(papers.table == 'Table 3') & (papers.method == 'IR-SDE') & (papers.metric == 'PSNR')].value.item()
    assert mean.published == wanted and mean.published_status == 'verified' and noisy.published_status == 'unverified'
    assert line(table, 'ode').published_status == 'not available'
    assert str(tb.table_cell(mean)).endswith(f'] ({wanted:.2f})') and str(tb.table_cell(noisy)).endswith(f'] ({noisy.published:.2f}†)')
    assert str(tb.table_cell(line(table, 'ode'))).endswith(']') and '(' not in str(tb.table_cell(mean, 'gain'))
    page = tb.page(table)
    assert f'] ({wanted:.2f}) |' in page and f'({noisy.published:.2f}†) |' in page
    assert 'In parentheses' in page and '†: published' in page and 'published numbers not available' not in page
    plain = tb.page(tb.sampling_table(rows))
    assert '†' not in plain and 'In parentheses' not in plain
    away = tb.sampling_table(rows.query("not (method == 'sde' and steps == 100)"), published=cells, groups=[dict(method='sde', steps=100)])
    assert str(tb.table_cell(line(away, 'sde'))) == f'not run ({wanted:.2f})'
    assert re.search(r'not available \(0\.\d+\)', averages(table)), 'a published LPIPS is shown where ours is missing'
    claim = CLAIM | {'published': dict(paper='DA-CLIP (2310.01018)', table='Table 3', better='DA-CLIP (Ours)', than='IR-SDE')}
    judged = tb.claim_table(rows, [claim], papers=papers).iloc[0]
    best = papers.query("table == 'Table 3' and method == 'DA-CLIP (Ours)' and metric == 'PSNR'").value.item()
    assert judged.published == pytest.approx(best - wanted)


@pytest.mark.parametrize('change, why', [
    (lambda t: t.replace('paper,table', 'paper,tables', 1), 'found the columns paper, tables'),
    (lambda t: t.replace(',26.25,', ',a lot,', 1), 'line 2 has a value that is not a finite number'),
    (lambda t: t.replace(',26.25,', ',inf,', 1), 'line 2 has a value that is not a finite number'),
    (lambda t: t.replace(',verified\n', ',checked\n', 1), 'line 2 has a status other than'),
    (lambda t: t.replace('JORDER', '', 1), 'line 2 has an empty field'),
    (lambda t: t + t.splitlines()[1] + '\n', 'has a number that an earlier line gave already'),
    (lambda t: t + 'one,two,"three\n', 'not a readable CSV|an empty field'),
    (lambda t: '', 'not a readable CSV')])
def test_bad_published_csv(tmp_path, change, why):
    path = tmp_path/'published.csv'
    path.write_text(change(PUBLISHED.read_text()))
    with pytest.raises(ValueError, match=why) as e: tb.published(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_published_csv_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'): tb.published(tmp_path/'published.csv')


def test_published_cells_name_what_they_lack():
    papers = tb.published(PUBLISHED)
    with pytest.raises(ValueError, match="no number for paper 'x'"): tb.published_cells(papers, 'x', 'Table 3', {})
    with pytest.raises(ValueError, match="no method 'x'"): tb.published_cells(papers, 'DA-CLIP (2310.01018)', 'Table 3', {'x': {}})


# ---- files and figures

def strips(): return {w: [(t, np.full((8, 8, 3), i * 60, np.uint8)) for i, t in enumerate(('LQ', 'sde', 'HQ'))] for w in ('noisy', 'hazy')}


def test_same_bytes_in_any_order_of_rows(rows, tmp_path):
    shuffled = rows.sample(frac=1, random_state=3)[rows.columns[::-1]]
    made = [everything.write_results(tb.results(r, [CLAIM], 'synthetic'), tmp_path/n, strips()) for n, r in (('a', rows), ('b', shuffled))]
    assert [p.relative_to(tmp_path/'a') for p in made[0]] == [p.relative_to(tmp_path/'b') for p in made[1]]
    for a, b in zip(*made): assert a.read_bytes() == b.read_bytes(), a.name
    names = {str(p.relative_to(tmp_path/'a')) for p in made[0]}
    assert {'tables/synthetic.csv', 'tables/synthetic.md', 'tables/synthetic.html', 'tables/synthetic.tex', 'tables/synthetic_claims.csv',
            'figures/synthetic_bars_psnr.png', 'figures/synthetic_steps_psnr.png', 'figures/synthetic_grid.png'} <= names
    assert not [p for p in tmp_path.rglob('*') if p.suffix == '.tmp']
    assert b'matplotlib' not in (tmp_path/'a/figures/synthetic_bars_psnr.png').read_bytes()


def test_csv_can_be_read_back(rows, tmp_path):
    table = tb.sampling_table(rows)
    path = write_tables(table, tb.claim_table(rows, [CLAIM]), tmp_path)[0]
    back = pd.read_csv(path, keep_default_na=False, na_values={'value': ''})
    assert np.allclose(back.value, table.value, atol=1e-8, equal_nan=True) and back.status.equals(table.status.astype(back.status.dtype))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tb.write_file(tmp_path/'a.md', 'old')
    monkeypatch.setattr(tb.os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): tb.write_file(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name', ['../x', 'a/b', '', '.hidden', 'a b', None])
def test_experiment_names_stay_in_their_folder(rows, name, tmp_path):
    with pytest.raises(ValueError, match='experiment'):
        everything.write_results(tb.results(rows.assign(experiment=name or ''), [], name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_another_experiment(rows, tmp_path):
    with pytest.raises(ValueError, match="belong to experiment 'synthetic', expected 'sampling'"):
        tb.results(rows, [], 'sampling')


def test_markdown_escapes():
    text = tb.markdown(pd.DataFrame([{'a|b\nc': 'c|d\ne'}]))
    assert text.count('\\|') == 2 and len(text.splitlines()) == 3


def test_figures_refuse_what_they_cannot_draw(rows):
    for call, why in ((lambda: fig.bars(rows, 'lpips'), 'LPIPS is not available'), (lambda: fig.bars(rows, path='x.jpg'), 'as .png'),
                      (lambda: fig.bars(rows, 'psnr', 33), 'no method was run with 33 steps'),
                      (lambda: fig.quality_vs_steps(rows[rows.method != 'input']), "no method 'input'"),
                      (lambda: fig.quality_vs_steps(rows.query("method == 'input' or degradation != 'noisy'")), 'nothing to draw'),
                      (lambda: fig.image_grid({}), 'got none'), (lambda: fig.image_grid({'a': []}), "'a' has no images"),
                      (lambda: fig.image_grid({'a': [('LQ', np.zeros((4, 4, 3)))]}), 'is float64 4×4×3'),
                      (lambda: fig.image_grid({'a': [('LQ', np.zeros((4, 4), np.uint8))]}), 'is uint8 4×4')):
        with pytest.raises(ValueError, match=why): call()


def test_figures_leave_no_settings_behind(rows, tmp_path):
    before = dict(mpl.rcParams)
    with mpl.rc_context({'font.size': 30, 'axes.facecolor': 'red'}): fig.bars(rows, path=tmp_path/'a.png')
    fig.bars(rows, path=tmp_path/'b.png')
    assert (tmp_path/'a.png').read_bytes() == (tmp_path/'b.png').read_bytes()
    assert dict(mpl.rcParams) == before
    import matplotlib.pyplot as plt
    assert not plt.get_fignums()


def test_figures_draw_what_the_table_says(rows):
    axes = fig.bars(rows, 'psnr', 100).axes[0]
    heights = {round(p.get_height(), 9) for p in axes.patches}
    assert {round(g, 9) for g in tb.sampling_table(rows, ['psnr']).query("steps == 100").gain} == heights
    assert {round(p.get_height(), 9) for p in fig.bars(tb.sampling_table(rows), 'psnr', 100).axes[0].patches} == heights
    texts = [t.get_text() for t in fig.bars(rows.query("not (method == 'ode' and degradation == 'noisy')")).axes[0].texts]
    assert [t.strip() for t in texts] == ['not run', 'not run']


def test_tables_import_no_model():
    code = 'import sys, daclip_repro.tables.figures; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], timeout=120).returncode == 0
