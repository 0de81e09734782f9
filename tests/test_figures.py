"Figures: what is drawn is what the cells say, and nothing is drawn for cells that are missing."
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from daclip_repro.tables import archive as ar
from daclip_repro.tables import beside, confusion, curves, everything, overviews
from daclip_repro.tables import figures as fig
from daclip_repro.tables import statistics as st
from daclip_repro.tables import tables as tb

ROOT = Path(__file__).parent.parent
GAINS = {'NAFNet': 2.2, 'NAFNet + Degradation': 2.7, 'NAFNet + DA-CLIP': 3., 'Restormer': 2.4, 'AirNet': 1.7, 'PromptIR': 3.1,
         'IR-SDE': 1.2, 'DA-CLIP': 2.9}
WORDS = ('hazy', 'low-light', 'noisy', 'rainy')
UNIFIED = dict(paper='DA-CLIP (2310.01018)', tables=['Table 3', 'Appendix unified per-degradation'],
               lines={'DA-CLIP (Ours)' if m == 'DA-CLIP' else m: {'method': m} for m in GAINS})
CLASSIFIED = dict(paper='DA-CLIP (2310.01018)', tables='Table 4', lines={'DA-CLIP': {'method': 'DA-CLIP'}})


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


@pytest.fixture(scope='module')
def rows():
    "Eight methods without steps, one of which fails on one degradation: the shape of DA-CLIP's sweeps."
    made = st.synthetic_rows(photos=6, steps=(1,), gains=GAINS, degradations=WORDS, seed=1).drop(columns='steps')
    made['seconds'] = [list(GAINS).index(m) + 1. if m in GAINS else 0. for m in made.method]
    made['psnr'] -= 6. * ((made.method == 'AirNet') & (made.degradation == 'noisy'))
    return made


@pytest.fixture(scope='module')
def table(rows): return tb.results(rows, [], 'synthetic', tb.published(ROOT/'results/published.csv'), UNIFIED, trainings=True).table


@pytest.fixture(scope='module')
def holes(rows): return rows.query("not (method == 'PromptIR' and degradation == 'hazy')")


@pytest.fixture(scope='module')
def steps(): return st.synthetic_rows(photos=6, steps=(5, 20), seeds=2, degradations=('hazy', 'noisy', 'rainy'), seed=1)


@pytest.fixture(scope='module')
def answers():
    rng = np.random.default_rng(0)
    made = st.synthetic_rows(photos=8, steps=(1,), gains={'CLIP': 0, 'DA-CLIP': 0}, degradations=WORDS)
    made = made[made.method != 'input'].drop(columns=['steps', 'psnr', 'ssim', 'stlpips', 'lpips', 'seconds'])
    right = rng.random(len(made)) < np.where(made.method == 'CLIP', .2, .9)
    named = np.where(right, made.degradation, rng.choice(['snowy', *WORDS], len(made)))
    return made.assign(named=named, accuracy=100. * (named == made.degradation))


def cells(table, metric='psnr', **wanted):
    chosen = table[(table.metric == metric) & ~tb.is_baseline(table)]
    for c, v in wanted.items(): chosen = chosen[chosen[c] == v]
    return chosen


def dots(ax):
    "Label of each error bar's points → their x and y."
    return {c.get_label(): np.array(c[0].get_xydata()) for c in ax.containers if c[0] is not None}


def ends(ax, which):
    "Label of each error bar → its low and high ends; which: 0 for x, 1 for y."
    out = {}
    for c in ax.containers:
        bars = [np.array(s) for s in c[2][0].get_segments()] if len(c[2]) == 1 else [np.array(s) for s in c[2][which].get_segments()]
        out[c.get_label()] = np.array([s[:, which] for s in bars])
    return out


# style

def test_ten_methods_differ_in_colour_hatch_and_marker_and_twenty_together():
    looks = fig.method_look([f'm{i:02d}' for i in range(20)])
    for part in zip(*list(looks.values())[:10]): assert len(set(part)) == 10
    assert len(set(looks.values())) == 20 and looks == fig.method_look([*reversed(list(looks))])
    assert fig.method_look(['posterior', 'ode'])['ode'] == fig.method_look(['sde', 'ode', 'zzz'])['ode']


def test_a_palette_keeps_common_colours_and_moves_others_little():
    rng = np.random.default_rng(0)
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[:20] = (1, 115, 178)
    pixels[40:, :, 1] = rng.integers(0, 256, (20, 60))
    pixels[40:, :, 2] = rng.integers(250, 256, (20, 60))
    few = fig.few_colours(pixels)
    back = np.asarray(few.convert('RGB')).astype(int)
    assert few.mode == 'P' and np.array_equal(back[:40], pixels[:40]) and np.abs(back - pixels).max() < 12
    one = np.zeros((3, 4, 3), np.uint8)
    assert np.array_equal(np.asarray(fig.few_colours(one).convert('RGB')), one)


def test_written_figures_have_a_palette_and_the_colours_of_their_methods(table, tmp_path):
    fig.bars(table, path=tmp_path/'a.png')
    picture = Image.open(tmp_path/'a.png')
    seen = {c for _, c in picture.convert('RGB').getcolors()}
    wanted = {tuple(round(255 * v) for v in colour) for colour, _, _ in fig.method_look(GAINS).values()}
    assert picture.mode == 'P' and wanted | {(255, 255, 255)} <= seen


def test_no_figure_leaves_settings_or_windows_behind(table, rows, answers):
    before = dict(mpl.rcParams)
    overviews.radar(table), overviews.plane(table), beside.paper_vs_ours(table), confusion.confusion_matrices(answers)
    curves.learning_curves({'a': pd.DataFrame(dict(step=[1, 2], loss=[1., .5]))})
    assert dict(mpl.rcParams) == before and not plt.get_fignums()


# bars, seconds, plane

def test_bars_of_many_methods_stand_in_two_rows_and_are_the_gains(table, holes):
    wide = tb.sampling_table(st.synthetic_rows(photos=5, steps=(1,), gains=GAINS).drop(columns='steps'), ['psnr'], ['method'])
    axes = fig.bars(wide).axes
    assert [[t.get_text() for t in ax.get_xticklabels()] for ax in axes] == [list(st.WORDS[:6]), [*st.WORDS[6:], 'average']]
    drawn = np.concatenate([[p.get_height() for p in c] for ax in axes for c in ax.containers if c.get_label() == 'IR-SDE'])
    expected = cells(wide, method='IR-SDE').set_index('degradation').gain[[*st.WORDS, 'average']]
    assert np.allclose(drawn, expected) and len(fig.bars(table).axes) == 1
    texts = [t.get_text().strip() for t in fig.bars(holes).axes[0].texts]
    assert texts == ['not run', 'not run']


def test_without_an_input_bars_are_values(answers):
    made = tb.results(answers, [], 'synthetic').table
    ax = fig.bars(made, 'accuracy').axes[0]
    heights = {c.get_label(): [p.get_height() for p in c] for c in ax.containers if isinstance(c, mpl.container.BarContainer)}
    for m in ('CLIP', 'DA-CLIP'):
        assert np.allclose(heights[m], cells(made, 'accuracy', method=m).set_index('degradation').value[[*WORDS, 'average']])
    assert ax.get_ylabel() == 'accuracy (%) ↑' and ax.get_title().startswith('accuracy\n')


def test_points_against_seconds_are_means_with_both_intervals(table, rows, holes):
    timed = everything.with_seconds(tb.Results(table, None, ['method']), rows)
    ax = fig.quality_vs_seconds(timed, 'psnr').axes[0]
    shown, high = dots(ax), ends(ax, 1)
    assert set(shown) == set(GAINS) and ax.get_xscale() == 'log'
    for i, m in enumerate(GAINS):
        cell = cells(table, method=m, degradation='average').iloc[0]
        assert np.allclose(shown[m], [[i + 1, cell.gain]]) and np.allclose(high[m], [[cell.gain_low, cell.gain_high]])
    assert set(dots(fig.quality_vs_seconds(holes).axes[0])) == set(GAINS) - {'PromptIR'}
    copy = rows[rows.method == 'input'].assign(run='again', seconds=.1) # scored again by another run, in another time
    assert everything.with_seconds(tb.Results(table, None, ['method']), pd.concat([rows, copy])).equals(timed)
    with pytest.raises(fig.NothingToDraw, match='time is not available'): fig.quality_vs_seconds(rows.assign(seconds=np.nan))


def test_steps_of_a_method_are_joined_in_order_and_the_first_is_written(steps):
    shuffled = steps.sample(frac=1, random_state=0)
    ax = fig.quality_vs_seconds(shuffled).axes[0]
    seconds = steps[steps.method == 'ode'].groupby('steps').seconds.mean()
    assert np.allclose(dots(ax)['ode'][:, 0], seconds) and [t.get_text() for t in ax.texts] == ['5'] * 3
    with pytest.raises(fig.NothingToDraw, match="no column 'steps'"): fig.quality_vs_steps(steps[steps.steps != 20].drop(columns='steps'))


def test_the_plane_crosses_two_metrics_of_a_table(table, holes, rows):
    ax = overviews.plane(table).axes[0]
    shown, across, up = dots(ax), ends(ax, 0), ends(ax, 1)
    for m in GAINS:
        x, y = (cells(table, k, method=m, degradation='average').iloc[0] for k in ('psnr', 'stlpips'))
        assert np.allclose(shown[m], [[x.gain, y.gain]])
        assert np.allclose(across[m], [[x.gain_low, x.gain_high]]) and np.allclose(up[m], [[y.gain_low, y.gain_high]])
    assert ax.lines[2].get_label() == 'input' and list(ax.lines[2].get_xydata()[0]) == [0, 0]
    assert set(dots(overviews.plane(holes).axes[0])) == set(GAINS) - {'PromptIR'}
    for lost in ('psnr', 'stlpips'):
        some = rows.assign(**{lost: rows[lost].where((rows.method != 'AirNet') | (rows.degradation != 'hazy'))})
        assert set(dots(overviews.plane(some).axes[0])) == set(GAINS) - {'AirNet'}
    with pytest.raises(fig.NothingToDraw, match='LPIPS is not available'): overviews.plane(rows, perception='lpips')
    with pytest.raises(fig.NothingToDraw, match="no method 'input'"): overviews.plane(rows[rows.method != 'input'])
    one = rows.query("degradation == 'hazy' or method == 'input'")
    with pytest.raises(fig.NothingToDraw, match='on every degradation'): overviews.plane(one)


# radar

def test_the_radar_gives_back_its_gains(table):
    figure = overviews.radar(table)
    ax, looks = figure.axes[0], fig.method_look(GAINS)
    lines = {line.get_label(): line for line in ax.lines}
    ranges = {t.get_text().split('\n')[0]: t.get_text().split('\n')[1].replace('−', '-').split(' … ') for t in ax.texts}
    assert list(ranges) == list(WORDS) and set(lines) == {*GAINS, 'input'}
    for m in GAINS:
        gain = cells(table, method=m).set_index('degradation').gain
        for k, word in enumerate(WORDS):
            low, high = map(float, ranges[word])
            assert low <= 0 <= high and abs(low + lines[m].get_ydata()[k] * (high - low) - gain[word]) < .011
        assert lines[m].get_ydata()[0] == lines[m].get_ydata()[-1] and lines[m].get_color() == looks[m][0]
    low, high = map(float, ranges['noisy'])
    assert low < -2 and lines['input'].get_ydata()[WORDS.index('noisy')] == pytest.approx(-low / (high - low), abs=.002)
    assert lines['input'].get_ydata()[0] == 0 and lines['AirNet'].get_ydata()[WORDS.index('noisy')] == 0


def test_the_radar_draws_nothing_where_nothing_was_run(rows, holes):
    lines = {line.get_label(): line.get_ydata() for line in overviews.radar(holes).axes[0].lines}
    assert np.isnan(lines['PromptIR']).tolist() == [True, False, False, False, True]
    assert not any(np.isnan(y).any() for m, y in lines.items() if m != 'PromptIR')
    nobody = tb.sampling_table(rows[rows.degradation != 'hazy'], by=['method'], degradations=['hazy'])
    assert [t.get_text().split('\n')[0] for t in overviews.radar(nobody).axes[0].texts] == list(WORDS[1:])
    with pytest.raises(fig.NothingToDraw, match='three degradations that were run, found 2'):
        overviews.radar(rows[rows.degradation.isin(WORDS[:2])])


def test_the_radar_of_a_metric_that_falls_has_better_outside(rows):
    better = rows.assign(stlpips=rows.stlpips - .1 * (rows.method == 'IR-SDE'))
    lines = {line.get_label(): line.get_ydata() for line in overviews.radar(better, 'stlpips').axes[0].lines}
    assert np.allclose(lines['IR-SDE'], 1)


# paper beside ours

def test_same_order():
    assert beside.same_order([1, 2, 3, 4], [1, 2, 3, 4]) == (6, 6) and beside.same_order([1, 2, 3, 4], [4, 3, 2, 1]) == (0, 6)
    assert beside.same_order([1, 1, 2], [2, 1, 3]) == (2, 2) and beside.same_order([1, 2], [3, 3]) == (0, 1)


def test_published_numbers_and_ours_are_where_the_cells_say(table):
    axes = beside.paper_vs_ours(table).axes
    assert [ax.get_title().split('\n')[0] for ax in axes] == ['average', *(f'{w}†' for w in WORDS)]
    for ax, word in zip(axes, ('average', *WORDS)):
        shown, around = dots(ax), ends(ax, 1)
        wanted = cells(table, degradation=word).query('published == published')
        assert set(shown) == set(wanted.method) and len(wanted) == (8 if word == 'average' else 6)
        for c in wanted.itertuples():
            assert np.allclose(shown[c.method], [[c.published, c.gain]]) and np.allclose(around[c.method], [[c.gain_low, c.gain_high]])
        assert ax.get_title().split('\n')[1] == '{} of {} pairs agree'.format(*beside.same_order(wanted.published, wanted.gain))


def test_a_line_that_was_not_run_is_not_beside_the_paper(holes):
    made = tb.results(holes, [], 'synthetic', tb.published(ROOT/'results/published.csv'), UNIFIED).table
    axes = beside.paper_vs_ours(made).axes
    assert 'PromptIR' not in {*dots(axes[0]), *dots(axes[1])} and 'PromptIR' in dots(axes[2])


def test_where_lower_is_better_the_axis_is_turned(rows):
    "A method that is better by the published LPIPS and by ours agrees, on the right."
    papers = tb.published(ROOT/'results/published.csv')
    pair = UNIFIED | dict(lines={m: {'method': m} for m in ('NAFNet', 'AirNet')})
    made = rows[rows.method.isin(['NAFNet', 'AirNet', 'input'])].assign(lpips=rows.stlpips)
    figure = beside.paper_vs_ours(tb.results(made, [], 'synthetic', papers, pair).table, 'lpips')
    ax = figure.axes[0]
    x, y = (np.array([dots(ax)[m][0, k] for m in ('NAFNet', 'AirNet')]) for k in (0, 1))
    assert x[0] < x[1] and y[0] > y[1] and ax.xaxis_inverted() and ax.get_title() == 'average\n1 of 1 pairs agree'
    assert not beside.paper_vs_ours(tb.results(made, [], 'synthetic', papers, pair).table, 'psnr').axes[0].xaxis_inverted()


def test_one_method_stands_beside_its_paper_on_one_axis(answers):
    made = tb.results(answers, [], 'synthetic', tb.published(ROOT/'results/published.csv'), CLASSIFIED).table
    ax = beside.paper_vs_ours(made, 'accuracy').axes[0]
    names, wanted = [t.get_text() for t in ax.get_yticklabels()], cells(made, 'accuracy', method='DA-CLIP').query('published == published')
    assert names == list(wanted.degradation) and ax.get_xlabel() == 'accuracy (%) ↑'
    assert np.allclose(dots(ax)['DA-CLIP, ours'][:, 0], wanted.value) and np.allclose(ends(ax, 0)['DA-CLIP, ours'], wanted[['low', 'high']])
    hollow = next(line for line in ax.lines if line.get_label() == 'DA-CLIP, published')
    assert np.allclose(hollow.get_xdata(), wanted.published) and hollow.get_markerfacecolor() == 'none'


def test_nothing_published_nothing_drawn(rows, table):
    for draw in (beside.paper_vs_ours, beside.paper_dots):
        with pytest.raises(fig.NothingToDraw, match='no published PSNR stands'): draw(tb.results(rows, [], 'synthetic').table, 'psnr')
        with pytest.raises(fig.NothingToDraw, match='LPIPS is not available'): draw(table, 'lpips')


# answers

def test_a_confusion_matrix_is_the_shares_of_the_answers(answers):
    made = tb.results(answers, [], 'synthetic').table
    figure = confusion.confusion_matrices(answers)
    for ax, m in zip(figure.axes, ('CLIP', 'DA-CLIP')):
        mine = answers[answers.method == m]
        assert [t.get_text() for t in ax.get_xticklabels()] == [*WORDS, 'snowy'] and ax.get_title() == f'{m} ({len(mine)} answers)'
        assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(WORDS)
        share = np.array(ax.collections[0].get_array()).reshape(4, 5)
        texts = np.array([t.get_text() for t in ax.texts]).reshape(4, 5)
        for i, truth in enumerate(WORDS):
            for j, word in enumerate([*WORDS, 'snowy']):
                wanted = (mine[mine.degradation == truth].named == word).mean()
                assert share[i, j] == pytest.approx(wanted) and texts[i, j] == (str(round(100 * wanted)) if wanted >= .005 else '')
            assert 100 * share[i, i] == pytest.approx(cells(made, 'accuracy', method=m, degradation=truth).value.item())
        assert [p.get_xy() for p in ax.patches] == [(k, k) for k in range(4)]


def test_two_degradations_have_two_right_answers(answers):
    mixed = answers[answers.degradation == 'rainy'].assign(degradation='rainy + noisy', named='rainy')
    assert confusion.confusion(mixed).loc['rainy + noisy'].to_dict() == {'noisy': 0., 'rainy': 1.}
    assert [p.get_xy() for p in confusion.confusion_matrices(mixed).axes[0].patches] == [(0, 0), (1, 0)]


def test_rows_without_answers_are_left_out(answers):
    some = answers.assign(named=answers.named.where(answers.method == 'CLIP'))
    assert [ax.get_title().split(' (')[0] for ax in confusion.confusion_matrices(some).axes] == ['CLIP']
    for none in (answers.drop(columns='named'), answers.assign(named=None)):
        with pytest.raises(fig.NothingToDraw, match="no column 'named'"): confusion.confusion_matrices(none)


def test_a_method_that_never_saw_a_degradation_has_an_empty_row(answers):
    some = answers.query("method == 'CLIP' or degradation != 'hazy'")
    axes = confusion.confusion_matrices(some).axes
    assert not np.array(axes[1].collections[0].get_array()).reshape(4, 5)[0].any()


def test_answers_stay_text_in_the_records_and_go_into_no_table(answers, tmp_path):
    run = answers.drop(columns=['experiment', 'scale']).assign(run='a' * 16)
    facts = [dict(run='a' * 16, point={}, rows=len(run), fingerprint=ar.fingerprint(run))]
    ar.write_archive(ar.Archive('synthetic', 'synthetic', facts, run), tmp_path)
    again = ar.read_archive('synthetic', tmp_path).rows.assign(experiment='synthetic', scale='synthetic')
    assert again.named.tolist() == answers.named.tolist()
    table = tb.results(again, [], 'synthetic').table
    assert 'named' not in table and table.equals(tb.results(answers, [], 'synthetic').table)


# learning curves

def test_curves_are_the_columns_of_the_log():
    log = pd.DataFrame(dict(step=[50, 100, 150], loss=[1., .5, .4], lr=1e-3, seconds=[1., 2., 3.], gain=[np.nan, -1., 2.]))
    other = pd.DataFrame(dict(step=[50, 100], loss=[3., 2.]))
    axes = curves.learning_curves({'a': log, 'b': other}).axes
    assert [ax.get_ylabel() for ax in axes] == ['loss', 'gain over the input in PSNR (dB)'] and axes[0].get_yscale() == 'log'
    assert [line.get_xydata().tolist() for line in axes[0].lines] == [[[50, 1], [100, .5], [150, .4]], [[50, 3], [100, 2]]]
    assert axes[1].lines[0].get_xydata().tolist() == [[100, -1], [150, 2]] and len(axes[1].lines) == 2


def test_every_kept_log_is_drawn(tmp_path):
    (tmp_path/'training').symlink_to(ROOT/'results/training')
    logs = sorted((ROOT/'results/training').glob('*.csv'))
    assert logs and [p.name for p in curves.write_curves(tmp_path)] == [f'training_{p.stem}.png' for p in logs]
    assert curves.write_curves(tmp_path/'nowhere') == []


@pytest.mark.parametrize('text, why', [('a,b\n1,2\n', 'has the columns a, b'), ('step,loss\n1,low\n', 'not a log'), ('', 'not a log')])
def test_a_log_that_is_none_is_named(tmp_path, text, why):
    (tmp_path/'log.csv').write_text(text)
    with pytest.raises(ValueError, match=why) as e: curves.read_log(tmp_path/'log.csv')
    assert str(tmp_path/'log.csv') in str(e.value) and '\n' not in str(e.value)


# everything

def names(paths): return {p.stem.removeprefix('synthetic_') for p in paths if p.suffix == '.png'}


def test_each_experiment_gets_the_figures_for_which_its_data_are_there(rows, steps, answers, tmp_path):
    papers = tb.published(ROOT/'results/published.csv')
    kinds = lambda figures, *metrics: {f'{f}_{m}' for f in figures.split() for m in metrics}
    written = everything.write_results(tb.results(rows, [], 'synthetic', papers, UNIFIED, trainings=True), tmp_path/'a', rows=rows)
    assert names(written) == kinds('bars radar seconds', 'psnr', 'ssim', 'stlpips') | kinds('paper', 'psnr', 'ssim') | {'plane_stlpips'}
    written = everything.write_results(tb.results(steps, [], 'synthetic'), tmp_path/'b')
    assert names(written) == kinds('bars steps radar', 'psnr', 'ssim', 'stlpips') | {'plane_stlpips'}
    written = everything.write_results(tb.results(answers, [], 'synthetic', papers, CLASSIFIED), tmp_path/'c', rows=answers)
    assert names(written) == {'bars_accuracy', 'paper_accuracy', 'confusion'}
    assert all(p.is_file() for p in written)


def test_the_same_bytes_from_shuffled_rows(rows, answers, tmp_path):
    papers = tb.published(ROOT/'results/published.csv')
    for which, beside_ in ((rows.drop(columns='ssim'), UNIFIED), (answers, CLASSIFIED)):
        mixed = which.sample(frac=1, random_state=2)[which.columns[::-1]]
        a, b = (everything.write_results(tb.results(r, [], 'synthetic', papers, beside_), tmp_path/n, rows=r)
                for n, r in (('a', which), ('b', mixed)))
        assert [p.name for p in a] == [p.name for p in b] and len(a) > 5
        for one, other in zip(a, b): assert one.read_bytes() == other.read_bytes(), one.name


def test_an_error_is_not_taken_for_missing_data(rows, tmp_path, monkeypatch):
    def broken(*_, **__): raise ValueError('broken')
    monkeypatch.setattr(everything, 'radar', broken)
    with pytest.raises(ValueError, match='broken'): everything.write_results(tb.results(rows, [], 'synthetic'), tmp_path)


def test_seconds_are_in_figures_and_in_no_table(rows, tmp_path):
    one = rows.drop(columns=['ssim', 'stlpips', 'lpips'])
    slower = one.assign(seconds=one.seconds * 3)
    fast, slow = (everything.write_results(tb.results(r, [], 'synthetic'), tmp_path/n, rows=r) for n, r in (('a', one), ('b', slower)))
    changed = {a.stem for a, b in zip(fast, slow) if a.read_bytes() != b.read_bytes()}
    assert changed == {'synthetic_seconds_psnr'} and len(fast) > 4
