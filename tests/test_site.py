"The site in a real browser, from the disk and from a server: with mouse and keyboard, on a phone's width, by night, and without a network."
import fcntl
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import browser as br
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sweep_tools import notebook

from daclip_repro.tables.archive import Archive, fingerprint, write_archive
from daclip_repro.tables.formats import write_tables
from daclip_repro.tables.gallery import write_gallery
from daclip_repro.tables.tables import results

ROOT = Path(__file__).parent.parent
PAGE, RUNS = 'results/made_up.html', 'results/made_up-runs.html'
PHOTOS, SIDE = ('ant', 'bee', 'cat', 'dog', 'elk', 'fly'), 24
METHODS = {'zig': 9.8, 'alto': 10.1, 'mid': 9.95}  # mean gains: as text, 9.8 is the largest
CLAIM = dict(name='alto beats zig', metric='psnr', better={'method': 'alto'}, than={'method': 'zig'})


# --- a site with one made-up experiment beside the real ones

def made_up(root):
    "Three runs, their rows, tables and gallery. Only the first run is on this machine."
    rng, parts, facts = np.random.default_rng(0), [], []
    for number, (method, gain) in enumerate(METHODS.items()):
        run = f'{number + 1:x}' * 16
        folder = root/'results/runs/made_up'/run
        (folder/'pictures').mkdir(parents=True)
        def psnr(i, m, gain=gain): return 10 + i / 10 + (m != 'input') * (gain + i * i / 50)
        rows = [dict(photo=p, degradation=d, method=m, seed=0, protocol='rgb', psnr=psnr(i, m), ssim=.5)
                for d in ('hazy', 'noisy') for m in ('input', method) for i, p in enumerate(PHOTOS)]
        if method == 'mid': rows = [r for r in rows if r['degradation'] == 'hazy']
        rows = pd.DataFrame(rows)
        sheets = {'HQ': ['any'], 'input': ['hazy', 'noisy'], method: ['hazy', 'noisy'] if method != 'mid' else ['hazy']}
        for k, words in enumerate(sheets.values()):
            size = (len(words) * SIDE, len(PHOTOS) * SIDE, 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder/f'pictures/{k}.webp')
        index = dict(photos=PHOTOS, methods=[dict(method=m, file=f'{k}.webp', rows=w) for k, (m, w) in enumerate(sheets.items())])
        (folder/'pictures/index.json').write_text(json.dumps(index))
        parts.append(rows.assign(run=run))
        facts.append(dict(run=run, point=dict(name=method), rows=len(rows), fingerprint=fingerprint(rows), commit='c' * 40, dirty=False,
                          finished='2026-01-02T00:00:00+00:00', python='3', versions={}))
    archive = Archive('made_up', 'synthetic', facts, pd.concat(parts, ignore_index=True))
    write_archive(archive, root/'results/records')
    write_tables(*results(archive.rows.assign(experiment='made_up', scale='synthetic'), [CLAIM], 'made_up')[:2], root/'results', ['method'])
    write_gallery(archive, [CLAIM], root/'results/runs/made_up', root/'results')
    first = root/'results/runs/made_up'/('1' * 16)
    notebook(first/'executed.ipynb', 'print("it ran")')
    (first/'parameters.json').write_text('{}')
    for name, title in dict(made_up='Made up <here>', never='Never run').items():
        content = json.loads(notebook(root/f'experiments/{name}.ipynb', '1').read_text())
        content['cells'].insert(0, dict(cell_type='markdown', metadata={}, source=f'# {title}\n\n> Nothing & nobody.'))
        (root/f'experiments/{name}.ipynb').write_text(json.dumps(content))
        (root/f'experiments/{name}.yaml').write_text(json.dumps(dict(notebook=f'{name}.ipynb', claims=[CLAIM], profiles=dict(
            miniature=dict(points=[dict(method=m) for m in METHODS], time_limit_minutes=5)))))


def build(folder):
    root = folder/'root'
    ignore = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', 'runs')
    for name in ('nbs', 'experiments', 'results', '.ci'): shutil.copytree(ROOT/name, root/name, ignore=ignore)
    for name in ('mkdocs.yml', 'settings.ini'): shutil.copy(ROOT/name, root/name)
    (ROOT/'.cache').mkdir(exist_ok=True)
    (root/'.cache').symlink_to(ROOT/'.cache')  # converted notebooks, by content: half a minute
    made_up(root)
    env = {k: v for k, v in os.environ.items() if k != 'DACLIP_RUNS'} | dict(NO_MKDOCS_2_WARNING='1')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet']
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root/'_docs'


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The built site, once for all workers of `pytest -n`."
    if 'PYTEST_XDIST_WORKER' not in os.environ: return build(tmp_path_factory.mktemp('site'))
    shared = tmp_path_factory.getbasetemp().parent/'site'
    shared.mkdir(exist_ok=True)
    with open(shared/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared/'done').exists(): build(shared); (shared/'done').touch()
    return shared/'root/_docs'


@pytest.fixture(scope='module', params=['disk', 'server'])
def address(request, site):
    "Where the site begins."
    if request.param == 'disk': yield site.as_uri() + '/'
    else:
        with br.served(site) as url: yield url


def is_bad(message):
    "An error or a warning, but for the icon that browsers ask for where a page names none."
    return message.type in ('error', 'warning') and not message.location['url'].endswith('/favicon.ico')


class Visit:
    "A tab that notes what a visitor of good faith should never cause."
    def __init__(self, chromium, address, **kw):
        self.context = chromium.new_context(**dict(viewport=dict(width=1280, height=900)) | kw)
        self.tab, self.address, self.wrong = self.context.new_page(), address, []
        self.tab.on('console', lambda m: self.wrong.append(f'{m.type}: {m.text}') if is_bad(m) else None)
        self.tab.on('pageerror', lambda e: self.wrong.append(str(e)))
        self.tab.on('requestfailed', lambda r: self.wrong.append(f'failed: {r.url}') if r.failure != 'net::ERR_ABORTED' else None) # went on
        self.tab.on('request', lambda r: self.wrong.append(f'left the site: {r.url}') if not r.url.startswith((address, 'data:')) else None)
        self.tab.on('response', lambda r: self.wrong.append(f'{r.status}: {r.url}') if r.status >= 400 else None)

    def open(self, page):
        self.tab.goto(self.address + page, wait_until='load')
        return self.tab


@pytest.fixture
def visit(chromium, address):
    "Open a tab; when the test is over, nothing may have gone wrong in it."
    visits = []
    def start(page, **kw):
        visits.append(Visit(chromium, address, **kw))
        return visits[-1].open(page)
    yield start
    for v in visits: v.context.close()
    assert [w for v in visits for w in v.wrong] == []


# --- every page

class Parsed(html.parser.HTMLParser):
    "Ids, links of anchors, and addresses of what a page loads."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {v for k, v in attrs if k in ('id', 'name') and v}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'link' and a.get('href') and a.get('rel') != 'canonical': self.loads.append(a['href'])
        if a.get('src'): self.loads.append(a['src'])


@pytest.fixture(scope='module')
def pages(site): return {p: Parsed(p.read_text('utf-8')) for p in sorted(site.rglob('*.html')) if p.name != '404.html'}


def test_every_local_link_leads_somewhere(site, pages):
    lost, count = [], 0
    for page, parsed in pages.items():
        for link in [*parsed.links, *parsed.loads]:
            if urlsplit(link).scheme in ('http', 'https', 'mailto', 'data'): continue
            path, fragment = urldefrag(link)
            target, count = (page.parent/unquote(path.partition('?')[0])).resolve() if path else page, count + 1
            if target.is_dir(): target /= 'index.html'
            ok = target.is_file() and target.is_relative_to(site)
            if ok and fragment and target in pages: ok = unquote(fragment) in pages[target].ids or fragment.startswith('__')
            if not ok: lost.append(f'{page.relative_to(site)}: {link}')
    assert lost == [] and count > 1000


def test_no_page_loads_from_elsewhere(site, pages):
    assert not [(p.name, u) for p, parsed in pages.items() for u in parsed.loads if urlsplit(u).scheme not in ('', 'data')]
    assert not [p.name for p in pages if 'cdnjs' in p.read_text('utf-8')]


@pytest.mark.parametrize('address', ['server'], indirect=True)
def test_a_phone_shows_every_page_without_scrolling_sideways(visit, pages, site):
    tab, too_wide = visit('index.html', viewport=dict(width=390, height=844)), []
    start = tab.url.removesuffix('index.html')
    for page in pages:
        tab.goto(start + page.relative_to(site).as_posix())
        if (width := tab.evaluate('document.documentElement.scrollWidth')) > 390: too_wide.append((page.name, width))
    assert not too_wide


@pytest.mark.parametrize('page', ['index.html', 'results/index.html', PAGE, RUNS, 'results/sampling.html', '03_irsde.html',
                                  f'results/runs/made_up/{"1" * 16}.html'])
def test_pages_open_without_a_complaint(visit, page):
    tab = visit(page)
    tab.evaluate('window.MathJax && MathJax.startup.promise.then(() => 0)')
    tab.evaluate('new Promise(resolve => setTimeout(resolve, 500))')
    assert tab.locator('h1, .executed').count() == 1 and tab.title()


def test_formulas_are_set(visit):
    tab = visit('03_irsde.html')
    tab.evaluate('MathJax.startup.promise.then(() => 0)')
    assert tab.locator('mjx-container svg').count() > 20
    assert tab.locator('mjx-merror').count() == 0 and '$$' not in tab.locator('article').inner_text()


def test_the_search_finds_a_page(visit):
    tab = visit('results/index.html')
    tab.locator('label.md-search__icon').first.wait_for(state='attached')
    tab.keyboard.press('f')
    tab.keyboard.type('mean-reverting')
    found = tab.locator('.md-search-result__link', has_text='The mean-reverting SDE').first
    found.wait_for(timeout=15_000)
    assert '03_irsde.html' in found.get_attribute('href')


def test_the_menu_leads_a_newcomer(visit):
    tab = visit('index.html')
    assert [t.strip() for t in tab.locator('.md-tabs__link').all_inner_texts()] == ['Start', 'Results', 'The book']
    tab.get_by_role('link', name='Results').first.click()
    rows = tab.locator('table.sortable tbody tr')
    assert rows.first.locator('th').inner_text() == 'One model for ten degradations'
    tab.get_by_role('link', name='Made up <here>').last.click()
    assert tab.url.endswith(PAGE) and tab.locator('h1').inner_text().startswith('Made up <here>')


def test_night_and_day(visit):
    light = 'e => { const c = getComputedStyle(e)[%r].match(/[\\d.]+/g).map(Number); return (c[0] + c[1] + c[2]) / 765 }'
    for scheme, dark in (('light', False), ('dark', True)):
        tab = visit(PAGE, color_scheme=scheme)
        back = tab.locator('body').evaluate(light % 'backgroundColor')
        assert (back < .3) == dark
        for what in ('table.sortable tbody th', 'table.cases tbody th', '.told span', '.choose label', '.choose select'):
            assert abs(tab.locator(what).first.evaluate(light % 'color') - back) > .45, (scheme, what)


# --- tables

def column(tab, table, k): return [r.locator('th, td').nth(k).inner_text() for r in tab.locator(f'{table} tbody tr').all()]


def heads(tab, table): return tab.locator(f'{table} thead th')


AVERAGE, PER, CLAIMS = (f'table[aria-label^="{t}"]' for t in ('Average', 'Per degradation: PSNR', 'Claims'))


def test_numbers_sort_as_numbers_in_both_directions(visit):
    tab = visit(PAGE)
    head = heads(tab, AVERAGE).nth(1)
    assert head.inner_text().startswith('PSNR') and head.get_attribute('aria-sort') is None
    head.locator('button').click()
    assert head.get_attribute('aria-sort') == 'ascending'
    assert column(tab, AVERAGE, 0) == ['input', 'zig', 'alto', 'mid']  # mid lacks a degradation: it has no number, and stays last
    assert column(tab, AVERAGE, 1)[-1] == 'not run'
    head.locator('button').click()
    assert head.get_attribute('aria-sort') == 'descending' and column(tab, AVERAGE, 0) == ['alto', 'zig', 'input', 'mid']


def test_the_keyboard_sorts_too_and_one_column_at_a_time(visit):
    tab = visit(PAGE)
    name, psnr = heads(tab, AVERAGE).nth(0), heads(tab, AVERAGE).nth(1)
    psnr.locator('button').focus()
    tab.keyboard.press('Enter')
    tab.keyboard.press('Shift+Tab')
    tab.keyboard.press('Space')
    assert column(tab, AVERAGE, 0) == ['alto', 'input', 'mid', 'zig']
    assert (name.get_attribute('aria-sort'), psnr.get_attribute('aria-sort')) == ('ascending', None)


def test_the_average_stays_below(visit):
    tab = visit(PAGE)
    for _ in range(2):
        heads(tab, PER).nth(0).locator('button').click()
        assert sorted(column(tab, PER, 0)) == ['hazy', 'noisy'] and tab.locator(f'{PER} tfoot th').inner_text() == 'average'


def test_a_number_leads_to_its_runs_and_they_to_the_notebook(visit):
    tab = visit(PAGE)
    row = tab.locator(f'{PER} tbody tr', has=tab.locator('th', has_text='hazy'))
    k = [h.partition(' ')[0].partition('\n')[0] for h in heads(tab, PER).all_inner_texts()].index('zig')
    row.locator('th, td').nth(k).locator('a').click()
    assert tab.url.endswith(f'{RUNS}#of-zig-hazy')
    tab.locator('tr:target a').click()
    run = tab.locator('section.run:target')
    assert run.locator('h3').inner_text() == f'run {"1" * 16}' and 'c' * 40 in run.inner_text()
    run.get_by_role('link', name='executed notebook').click()
    assert 'it ran' in tab.locator('body').inner_text()


def test_what_is_not_here_says_so(visit):
    tab = visit(RUNS)
    assert tab.locator(f'#run-{"2" * 16}').inner_text().count('not on this machine') == 2
    assert 'not run' in visit('results/index.html').locator('table tbody tr', has_text='Never run').inner_text()
    assert 'daclip sweep experiments/never.yaml' in visit('results/never.html').locator('article').inner_text()


def test_the_page_has_the_numbers_of_record(site, visit):
    table = pd.read_csv(site/'results/tables/made_up.csv').query('metric == "psnr" and degradation == "average"').set_index('method')
    tab = visit(PAGE)
    for row in tab.locator(f'{AVERAGE} tbody tr').all():
        method, cell = row.locator('th').inner_text(), row.locator('td').first
        shown, value = cell.inner_text(), cell.get_attribute('data-value')
        if method == 'mid': assert (shown, value) == ('not run', '')
        else: assert float(value) == table.value[method] and shown.startswith(f'{table.value[method]:.2f} [')
    assert 'reproduced' in tab.locator(CLAIMS).inner_text()


# --- the gallery

def gallery(tab, word='hazy'): return tab.locator(f'h3#{word} ~ .gallery').first


def shown(box): return box.evaluate('b => parseFloat(b.style.getPropertyValue("--at"))')


def clipped(box): # how much of the left picture can be seen, in percent
    clip = box.locator('img.left').evaluate('i => getComputedStyle(i).clipPath')
    return 100 - float(re.search(r'inset\(0px (?:calc\()?([\d.]+)%', clip)[1])


def test_the_mouse_moves_the_slider(visit):
    tab = visit(PAGE)
    box = gallery(tab).locator('.box')
    box.scroll_into_view_if_needed()
    at = box.bounding_box()
    y = at['y'] + at['height'] / 2
    assert shown(box) == 50
    tab.mouse.move(at['x'] + at['width'] / 2, y)
    tab.mouse.down()
    tab.mouse.move(at['x'] + at['width'] * .2, y, steps=5)
    tab.mouse.up()
    assert abs(shown(box) - 20) <= 2 and abs(clipped(box) - shown(box)) < .1
    bar = box.locator('.bar').bounding_box()
    assert abs(bar['x'] + bar['width'] / 2 - at['x'] - at['width'] * .2) < .03 * at['width']
    tab.mouse.click(at['x'] + at['width'] * .9, y)
    assert abs(shown(box) - 90) <= 2


def test_the_keyboard_moves_the_slider(visit):
    tab = visit(PAGE)
    box, slide = gallery(tab).locator('.box'), gallery(tab).get_by_role('slider', name='hazy: how much of the left picture is shown')
    slide.focus()
    for _ in range(3): tab.keyboard.press('ArrowLeft')
    assert shown(box) == 47 and slide.get_attribute('aria-valuetext') == '47 % input, the rest alto'
    tab.keyboard.press('End')
    assert shown(box) == 100 and clipped(box) == 100
    assert box.evaluate('b => getComputedStyle(b).outlineStyle') == 'solid'  # one sees where the focus is


def picture(tab, word, case, line): # the file of a tile
    return gallery(tab, word).locator(f'tr[data-case={case}] .tile[data-line="{line}"] img').get_attribute('src').rpartition('/')[2]


def in_box(tab, side, word='hazy'): return gallery(tab, word).locator(f'.box img.{side}').get_attribute('src').rpartition('/')[2]


def test_any_two_pictures_of_a_photograph_are_compared(visit):
    tab = visit(PAGE)
    g = gallery(tab)
    assert (in_box(tab, 'left'), in_box(tab, 'right')) == (picture(tab, 'hazy', 'best', 'input'), picture(tab, 'hazy', 'best', 'alto'))
    g.get_by_label('hazy: picture on the left').select_option('HQ')
    assert in_box(tab, 'left') == picture(tab, 'hazy', 'best', 'HQ') and g.locator('output.left').inner_text() == 'HQ'
    g.get_by_role('radio', name='worst').check()
    assert in_box(tab, 'left') == picture(tab, 'hazy', 'worst', 'HQ') and in_box(tab, 'right') == picture(tab, 'hazy', 'worst', 'alto')
    g.locator('tr[data-case=median] .tile[data-line=zig]').click()
    assert in_box(tab, 'right') == picture(tab, 'hazy', 'median', 'zig') and g.get_by_role('radio', name='median').is_checked()
    assert g.locator('output.right').inner_text().split('\n')[0] == 'zig'
    assert in_box(tab, 'left', 'noisy') == picture(tab, 'noisy', 'best', 'input')  # the others stay as they are


def test_best_median_and_worst_with_their_numbers(visit):
    tab = visit(PAGE)
    said = gallery(tab).locator('tbody th').all_inner_texts()
    assert [' '.join(t.split()) for t in said] == ['best fly +10.60 dB', 'median cat +10.18 dB', 'worst ant +10.10 dB']
    tile = gallery(tab).locator('tr[data-case=best] td').nth(1)
    assert tile.locator('.told').inner_text().split('\n') == ['PSNR 20.80 dB', 'SSIM 0.500', 'run 11111111']
    tile.get_by_role('link').click()
    assert tab.url.endswith(f'{RUNS}#run-{"1" * 16}')


def test_crops_show_the_same_place_and_move_together(visit):
    tab = visit(PAGE)
    g = gallery(tab)
    offsets = '''e => [...e.querySelectorAll('tr[data-case=best] .crop')].map(c => {
        const [b, i] = [c.getBoundingClientRect(), c.querySelector('img').getBoundingClientRect()]
        return [(b.left - i.left) / i.width, (b.top - i.top) / i.height, i.width / b.width].map(v => v.toFixed(2)).join(' ') })'''
    before = set(g.evaluate(offsets))
    assert len(before) == 1 and before.pop().endswith(' 3.00')
    g.get_by_label('hazy: place of the crops, across').focus()
    tab.keyboard.press('Home')
    g.get_by_label('hazy: place of the crops, down').focus()
    tab.keyboard.press('End')
    assert set(g.evaluate(offsets)) == {'0.00 0.67 3.00'}


def test_pictures_load_and_are_described(visit):
    tab = visit(PAGE)
    images = gallery(tab).locator('img').all()
    assert len(images) == 2 + 2 * 3 * 5
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.evaluate('i => i.decode().then(() => i.naturalWidth)') == SIDE and image.get_attribute('alt')


def test_without_scripts_nothing_is_missing(visit):
    tab = visit(PAGE, java_script_enabled=False)
    assert gallery(tab).locator('.told').count() == 3 * 5 and gallery(tab, 'noisy').locator('.told').count() == 3 * 4
    assert column(tab, AVERAGE, 0) == ['input', 'alto', 'zig', 'mid']
