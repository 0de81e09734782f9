"One table in Markdown, HTML and LaTeX: the same cells whatever things are called, and a real LaTeX that takes them."
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from daclip_repro.tables import formats as fm
from daclip_repro.tables import tables as tb
from daclip_repro.tables.statistics import synthetic_rows

CLAIM = dict(name='posterior beats ode', metric='psnr', better={'method': 'posterior'}, than={'method': 'ode'})
NASTY = ['a_b', '50% off', 'x & y', '#1', '$5^2$', r'\input{secret}', '{open', 'close}', '~tilde', '[ours]', '*', 'Łukasz Ångström ñ ő ç ø',
         'ß σ=50²', '中文 😀', 'cafe\u0301', '<b>bold</b>', '"quoted" ‘so’', 'a|b', '`tick', '**stars**', 'two\nlines', 'a--b---c',
         'bell\x07', 'ﬁne?`', r'end\\']
LONG = 'a method whose authors could not decide on a name of fewer than eighty characters'


class Tables(HTMLParser):
    "Each table of a page as lines of [text, attributes, strong text]."
    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.cell, self.strong = [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == 'table': self.tables.append([])
        elif tag == 'tr': self.tables[-1].append([])
        elif tag == 'strong': self.strong = True
        elif tag in ('td', 'th'):
            self.cell = ['', dict(attributes), '']
            self.tables[-1][-1].append(self.cell)

    def handle_data(self, data):
        if self.cell:
            self.cell[0] += data
            self.cell[2] += data * self.strong

    def handle_endtag(self, tag):
        if tag in ('td', 'th'): self.cell = None
        elif tag == 'strong': self.strong = False


def markdown_tables(text):
    "Each table as lines of texts, bold ones with their stars."
    blocks = re.findall(r'(?:^\|.*\n)+', text, re.M)
    cells = lambda line: [c.strip().replace('\\|', '|') for c in re.split(r'(?<!\\)\|', line)[1:-1]]
    return [[cells(line) for i, line in enumerate(block.splitlines()) if i != 1] for block in blocks]


def latex_tables(text):
    "The same of LaTeX, its spelling undone."
    plain = {r'\%': '%', r'\_': '_', r'\&': '&', '$-$': '−', '--': '–', r'$\dagger$': '†', r'$\ddagger$': '‡', r'$\uparrow$': '↑',
             r'$\downarrow$': '↓', '$<$': '<'}
    found = []
    for body in re.findall(r'\\toprule\n(.*?)\\bottomrule', text, re.S):
        body = re.sub(r'\\textbf\{(.*?)\}', r'**\1**', body.replace('\\midrule\n', ''))
        body = re.sub(r'\{\\scriptsize (.*?)\}', r'\1', body)
        lines = [re.split(r' (?<!\\)& ', line) for line in body.split(' \\\\\n') if line]
        found.append([[re.sub('|'.join(map(re.escape, plain)), lambda m: plain[m[0]], c) for c in line] for line in lines])
    return found


def texts(rows, claims=(CLAIM,), by=tb.BY, **options):
    table = tb.sampling_table(rows, by=by, **options)
    judged = tb.claim_table(rows, list(claims), by, trainings=options.get('trainings', False))
    made = fm.table_texts(table, judged, by)
    return {name.rpartition('.')[2]: text for name, text in made.items() if not name.endswith('.csv')}


@pytest.fixture(scope='module')
def rows():
    "Two degradations, a run missing, a metric missing in one line, a published number beside another."
    made = synthetic_rows(photos=6, steps=(10,), seeds=2, degradations=('hazy', 'noisy'), seed=2)
    made['ssim'] = made.ssim.where(made.method != 'ode')
    return made[(made.method != 'sde') | (made.degradation != 'hazy')]


@pytest.fixture(scope='module')
def papers():
    lines = [dict(degradation=d, metric='psnr', method=m, steps=10, published=p, published_status=s)
             for d, m, p, s in (('average', 'posterior', 27.01, 'verified'), ('hazy', 'sde', 25., 'unverified'))]
    return pd.DataFrame(lines)


@pytest.fixture(scope='module')
def nasty():
    "As many methods as there are nasty names, and a long one."
    made = synthetic_rows(photos=5, steps=(10,), seeds=1, degradations=('a_b', 'n%'), seed=3)
    one = made[made.method == 'posterior']
    return pd.concat([made, *(one.assign(method=name, psnr=one.psnr + i) for i, name in enumerate([*NASTY, LONG]))], ignore_index=True)


# ---- the same cells

def test_all_formats_have_the_same_cells(rows, papers):
    made = texts(rows, published=papers)
    markdown, html, latex = markdown_tables(made['md']), Tables(made['html']).tables, latex_tables(made['tex'])
    assert len(markdown) == 2 + 3 + 1 and markdown == latex
    shown = [[[c.replace(strong, f'**{strong}**', 1) if strong else c for c, _, strong in line] for line in table] for table in html]
    assert shown == markdown
    every = [c for table in markdown for line in table for c in line]
    for part in ('27.01)', '25.00†)', 'not run (25.00†)', 'not available'): assert any(part in c for c in every), part
    for text in made.values(): assert 'nan' not in re.sub(r'\bsignan', '', text.lower())


def test_a_cell_says_by_what_it_is_sorted(rows, papers):
    table = tb.sampling_table(rows, published=papers)
    average = Tables(texts(rows, published=papers)['html']).tables[0]
    head, *lines = [[c[:2] for c in line] for line in average]
    psnr = [c[0] for c in head].index('PSNR (dB) ↑')
    for line in lines:
        wanted = table.query("metric == 'psnr' and degradation == 'average' and method == @line[0][0]").value.item()
        text, attributes = line[psnr]
        assert ('data-sort' in attributes) == np.isfinite(wanted) == (not text.startswith('not run'))
        if np.isfinite(wanted): assert float(attributes['data-sort']) == pytest.approx(wanted, abs=1e-7)
    for name, table in zip('average gain psnr ssim stlpips claims'.split(), Tables(texts(rows)['html']).tables, strict=True):
        for line in table[1:]:
            for text, attributes, _ in line[1:]:
                number = re.match(r'[<+−]?\d', text)
                assert bool(number) == ('data-sort' in attributes), (name, text)


def test_html_tells_the_best_from_those_that_tie():
    rows = synthetic_rows(photos=7, steps=(10,), seeds=2, degradations=('hazy', 'noisy'), seed=1)
    ode = rows[rows.method == 'ode']
    alike = ode.assign(method='twin', psnr=ode.psnr + 5 + np.tile([.2, -.2], len(ode) // 2))
    html = texts(pd.concat([rows, alike, alike.assign(method='ahead', psnr=ode.psnr + 5)]))['html']
    kinds = {line[0][0]: line[2][1].get('class', '').split() for line in Tables(html).tables[0][1:]}
    assert {kinds['twin'][0], kinds['ahead'][0]} == {'best', 'tie'} and kinds['sde'] == ['number']


def test_headings_and_tables_can_be_heard(rows):
    html = texts(rows)['html']
    for table in Tables(html).tables:
        assert all(a['scope'] == 'col' for _, a, _ in table[0]) and all(line[0][1]['scope'] == 'row' for line in table[1:])
    assert html.count('<table') == html.count('role="region" tabindex="0" aria-label="') == html.count('<figcaption>')


def test_the_page_stands_alone_and_can_be_taken_apart(rows):
    html = texts(rows)['html']
    assert re.fullmatch(r'(?s)<!DOCTYPE html>.*<main class="tables">.*</main>\n</body>\n</html>\n', html) and html.count('<main') == 1
    assert not re.search(r'https?:|src=|href=|<script|<link|@import|url\(', html)
    ids = re.findall(r' id="(.*?)"', html)
    assert len(set(ids)) == len(ids) == 6 and all(re.fullmatch(r'synthetic-[a-z0-9_-]+', i) for i in ids)
    assert all(line.startswith('.tables ') for line in fm.STYLE.splitlines() if line.startswith('.')), 'a rule of style that reaches beyond'


# ---- what has to be said

@pytest.mark.parametrize('photos', [1, 3, 4])
def test_every_format_says_that_few_photographs_cannot_be_trusted(rows, photos):
    few, enough = texts(rows[rows.photo < f'photo{photos:04d}']), texts(rows)
    for form, text in few.items():
        if photos == 1: assert '(one photograph)' in text
        else:
            assert 'with fewer than 5 photographs the interval cannot be trusted' in text
            assert text.count(r'$\ddagger$' if form == 'tex' else '‡') > 9
        assert 'cannot be trusted' not in enough[form]


def test_trainings_are_said(rows):
    made = texts(rows, trainings=True)
    for text in made.values(): assert 'over photographs and trainings' in text and 'fewer than 5 photographs or 3 trainings' in text


def test_a_caption_says_under_which_circumstances(rows, papers):
    made = texts(rows, published=papers)
    captions = re.findall(r'\\caption\{(.*)\}\n', made['tex'])
    assert len(captions) == 6
    for told in captions: assert 'Synthetic scale, rgb protocol, 6 photographs, in brackets 95\\% intervals over photographs.' in told
    assert made['html'].count('Synthetic scale, rgb protocol, 6 photographs, in brackets 95% intervals over photographs.') == 6
    psnr = next(c for c in captions if 'PSNR' in c and 'degradation' in c)
    assert r'\texttt{not run}' in psnr and r'$\dagger$: published' in psnr and 'In parentheses' in psnr
    assert r'$\dagger$' not in next(c for c in captions if 'ST-LPIPS' in c and 'degradation:' in c), 'a sign is explained where it is used'
    three = rows[(rows.degradation != 'noisy') | (rows.photo < 'photo0003')]
    assert 'protocol, 3–6 photographs' in texts(three)['html']
    assert 'protocol, 1 photograph,' in texts(rows[rows.photo == 'photo0000'])['html']


def test_a_sentence_is_not_part_of_a_table(rows):
    "Where degradations have unequal numbers of images, a column says so, and the note comes below."
    text = texts(rows[(rows.degradation != 'noisy') | (rows.seed == 0)])['md']
    assert all(line.endswith('|') for line in text.splitlines() if line.startswith('|'))
    assert any('images' in table[0] and table[0][0] == 'degradation' for table in markdown_tables(text))


# ---- names

def test_names_survive_html(nasty):
    html = texts(nasty, claims=[CLAIM | dict(name=n, source=n) for n in NASTY])['html']
    average, *_, claims = Tables(html).tables
    plain = lambda names: [re.sub(r'\s+', ' ', n) for n in names]
    assert set(plain([*NASTY, LONG])) < {line[0][0] for line in average[1:]}
    assert plain(NASTY) == [line[0][0] for line in claims[1:]] == [line[1][0] for line in claims[1:]]
    assert 'b' not in Tables(html).tags


def test_a_table_of_many_columns_becomes_several(nasty):
    whole, parts = markdown_tables(texts(nasty)['md'])[2], latex_tables(texts(nasty)['tex'])[2:5]
    assert len(whole[0]) == 31 and [len(p[0]) for p in parts] == [11, 11, 11]
    for i, line in enumerate(whole[1:], 1):
        assert line == [c for k, p in enumerate(parts) for c in p[i][k > 0:]]
    assert 'PSNR (dB) $\\uparrow$, 10 steps, part 3 of 3 (synthetic)' in texts(nasty)['tex']


def test_latex_is_ascii_and_loses_nothing(nasty):
    text = texts(nasty)['tex']
    assert text.isascii() and '[U+4E2D][U+6587] [U+1F600]' in text and 'bell[U+0007]' in text
    assert fm.latex('Łåñőçøß') == r"\L{}\r{a}\~{n}\H{o}\c{c}\o{}\ss{}" and fm.latex('cafe\u0301') == fm.latex('café') == r"caf\'{e}"
    assert fm.latex('a---b') == 'a-{}-{}-b' and fm.latex(r'\x') == r'\textbackslash{}x'
    assert re.search(r'^\{\}\[ours\] &', text, re.M) and re.search(r'^\{\}\* &', text, re.M)


def test_latex_compiles_whatever_things_are_called(nasty, tmp_path, typeset):
    "Twenty-nine methods, also as columns, none beyond the margin of the page."
    claims = [CLAIM | dict(name=f'{n} and {LONG}', source=n) for n in NASTY]
    (tmp_path/'synthetic.tex').write_text(texts(nasty, claims)['tex'])
    log = typeset(tmp_path/'synthetic.tex')
    assert not re.search('Overfull|Float too large|Missing character|undefined', log), log
    assert (tmp_path/'synthetic.pdf').stat().st_size > 10_000


def test_latex_compiles_with_missing_cells_and_signs(rows, papers, tmp_path, typeset):
    holes = rows[(rows.photo < 'photo0004') & ((rows.method != 'posterior') | (rows.degradation != 'noisy'))]
    never = dict(groups=[dict(method='never', steps=10)], degradations=['rainy'])
    (tmp_path/'synthetic.tex').write_text(texts(holes, published=papers, **never)['tex'])
    assert not re.search('Overfull|undefined', typeset(tmp_path/'synthetic.tex'))


def test_latex_goes_into_another_document(rows, nasty, tmp_path, typeset):
    "Two experiments in one paper of two columns, which goes on after them."
    for name, made in (('one', rows), ('two', nasty)):
        (tmp_path/f'{name}.tex').write_text(texts(made.assign(experiment=name))['tex'])
    (tmp_path/'paper.tex').write_text(r'''\documentclass[twocolumn]{article}
\usepackage{array,booktabs,graphicx}
\begin{document}
See Table~\ref{tab:two-claims}.
\input{one}
\input{two}
The end\typeout{reached}.
\end{document}
''')
    log = typeset(tmp_path/'paper.tex')
    assert re.search('^reached', log, re.M) and not re.search('undefined|multiply', log)


def test_committed_latex_compiles(tmp_path, typeset):
    for file in (Path(__file__).parent.parent/'results/tables').glob('*.tex'):
        (tmp_path/file.name).write_bytes(file.read_bytes())
        assert not re.search('Overfull|Float too large|undefined', typeset(tmp_path/file.name)), file.name


def test_a_mistake_in_latex_is_found(tmp_path, typeset):
    (tmp_path/'bad.tex').write_text(fm.LATEX_HEAD + 'a_b\n\\lasttable\n')
    with pytest.raises(RuntimeError, match=r'bad.tex: ! Missing \$ inserted'): typeset(tmp_path/'bad.tex')
