"Scoring a folder of anybody's images: what does not fit is named and nothing is written; what fits is measured as others measure it."
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from golden_data import recorded
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from daclip_repro import metrics as M
from daclip_repro import scoring as S
from daclip_repro.cli import main
from daclip_repro.photos import packaged_photos, save_image
from daclip_repro.tables.tables import METRICS

NAMES = ('0001', '0002', '1e5', 'NA', 'photo', 'x_y')  # as test sets have them; a careless reader makes numbers of three
WORDS = ('hazy', 'noisy')


def pixels(seed, size=(40, 32)): return torch.rand(3, *size[::-1], generator=torch.Generator().manual_seed(seed))


def worse(hq, by, seed): return (hq + by*torch.randn(hq.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def make(folder, by, words=WORDS, seed=0):
    "A method's results, on the same clean images under each word."
    for w in words:
        for i, n in enumerate(NAMES): save_image(worse(pixels(i), by, 100*seed + i), Path(folder, w, f'{n}.png'))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "A data set of two degradations, one method's results, and no way out for weights."
    monkeypatch.setattr(M, 'reachable', lambda url, timeout=0: False)
    monkeypatch.delenv('DACLIP_TRACEBACK', raising=False)
    monkeypatch.chdir(tmp_path)
    for w in WORDS:
        for i, n in enumerate(NAMES):
            save_image(pixels(i), f'data/val/{w}/GT/{n}.png')
            save_image(worse(pixels(i), .3, i), f'data/val/{w}/LQ/{n}.png')
    make('made', .1)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    "Only the metrics without a network."
    *others, _ = S.score_folder.__defaults__
    monkeypatch.setattr(S.score_folder, '__defaults__', (*others, ('psnr', 'ssim')))


def files(folder='.'): return {p.as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def daclip(line): return main(shlex.split(line))


def score(rest='', name='m', folder='made', data='data'): return daclip(f'score {folder} --dataset {data} --name {name} {rest}')


def rows(name='m', data='data'): return S.read_scores(f'results/scores/{data}', [name])[0].rows


# ---- what does not fit

IMAGE = 'made/noisy/photo.png'


def save(array, path): Image.fromarray(array).save(path)
def deep(path=IMAGE):
    import tifffile
    Path(path).unlink()
    tifffile.imwrite(path.replace('.png', '.tif'), np.full((32, 40, 3), 30000, np.uint16), photometric='rgb')
def clear(path=IMAGE): save(np.full((32, 40, 4), 120, np.uint8), path)
def cut(path=IMAGE): Path(path).write_bytes(Path(path).read_bytes()[:900])
def animated(path=IMAGE):
    Path(path).unlink()
    frames = [Image.fromarray(np.full((32, 40), v, np.uint8)) for v in (0, 200)]
    frames[0].save(path.replace('.png', '.gif'), save_all=True, append_images=frames[1:])
def link():
    Path(IMAGE).unlink()
    Path(IMAGE).symlink_to('nowhere.png')
def renamed():
    for p in sorted(Path('made/noisy').iterdir()): p.rename(p.with_stem(f'{p.stem}_restored'))


# what is done to the folders, what the sentence has to say
WRONG = {
    'image missing': (lambda: Path(IMAGE).unlink(), 'made/noisy/photo: is missing, as data/val/noisy/GT/photo.png has no counterpart'),
    'image too many': (lambda: save_image(pixels(9), 'made/noisy/grid.png'), 'made/noisy/grid.png: is extra'),
    'other size': (lambda: save_image(pixels(4, (32, 40)), IMAGE), f'{IMAGE}: is 32×40, its GT is 40×32 (width×height)'),
    'not an image': (lambda: Path(IMAGE).write_text('see attachment'), f'{IMAGE}: is not an image'),
    'cut short': (cut, f'{IMAGE}: is damaged or cut short'),
    'empty file': (lambda: Path(IMAGE).write_bytes(b''), f'{IMAGE}: is empty'),
    '16 bits': (deep, 'made/noisy/photo.tif: has 16 bits a channel, its GT has 8'),
    'transparent': (clear, f'{IMAGE}: has transparent pixels'),
    'grey': (lambda: save(np.full((32, 40), 99, np.uint8), IMAGE), f'{IMAGE}: is grey, its GT has colours'),
    'several frames': (animated, 'made/noisy/photo.gif: holds 2 images'),
    'link to nowhere': (link, f'{IMAGE}: no such file (a link that points nowhere)'),
    'same stem twice': (lambda: save_image(pixels(9), 'made/noisy/photo.PNG'), 'made/noisy/photo.png: has the same stem as photo.PNG'),
    'GT itself': (lambda: shutil.copy('data/val/noisy/GT/photo.png', IMAGE), f'{IMAGE}: is its GT in every pixel'),
    'folder among images': (lambda: Path('made/noisy/old').mkdir(), 'made/noisy/old: is a folder, expected images only'),
    'text among images': (lambda: Path('made/noisy/psnr.txt').write_text('31.4'), 'made/noisy/psnr.txt: expected a name that ends in'),
    'image beside folders': (lambda: save_image(pixels(9), 'made/grid.png'), 'made/grid.png: lies beside folders'),
    'other names': (renamed, 'made/noisy: none of its 6 images has the name of one in data/val/noisy/GT; here 0001_restored, there 0001'),
    'empty folder of a degradation': (lambda: [p.unlink() for p in Path('made/noisy').iterdir()], 'made/noisy: holds no images'),
    'degradation missing': (lambda: shutil.rmtree('made/noisy'), 'made: has no folder noisy'),
    'degradation misspelt': (lambda: Path('made/noisy').rename('made/nosiy'), 'made/nosiy: expected hazy or noisy; did you mean noisy?'),
    'degradation too many': (lambda: make('made', .1, ['foggy']), 'made/foggy: expected hazy or noisy'),
    'GT unreadable': (lambda: cut('data/val/noisy/GT/photo.png'), 'data/val/noisy/GT/photo.png: is damaged or cut short'),
    'LQ unreadable': (lambda: cut('data/val/noisy/LQ/photo.png'), 'data/val/noisy/LQ/photo.png: is damaged or cut short'),
    'LQ of another size': (lambda: save_image(pixels(4, (20, 16)), 'data/val/noisy/LQ/photo.png'),
                           'data/val/noisy/LQ/photo.png: is 20×16, its GT is 40×32'),
    'LQ missing': (lambda: Path('data/val/noisy/LQ/photo.png').unlink(), 'data/val/noisy/GT/photo.png: has no partner in LQ'),
    'LQ is clean': (lambda: shutil.copy('data/val/noisy/GT/photo.png', 'data/val/noisy/LQ/photo.png'),
                    'data/val/noisy/LQ/photo.png: is its GT in every pixel'),
    'no GT': (lambda: shutil.rmtree('data/val/noisy/GT'), 'data/val/noisy: has no folder GT'),
    'too small to measure': (lambda: [save_image(worse(pixels(9, (16, 16)), by, 3), f'{d}/photo.png') for by, d in
                             ((0, 'data/val/noisy/GT'), (.3, 'data/val/noisy/LQ'), (.1, 'made/noisy'))],
                             f'{IMAGE}: stlpips needs sides of at least 21 px, not 16×16'),
}


@pytest.mark.parametrize('harm, says', WRONG.values(), ids=WRONG)
def test_an_image_that_does_not_fit_is_named_and_nothing_is_written(harm, says, capsys):
    harm()
    before = files()
    assert score() == 1
    out, err = capsys.readouterr()
    assert out == '' and files() == before and not Path('results').exists()
    *told, last = err.strip().splitlines()
    assert [line for line in told if line.startswith(says)], err
    assert len(told) <= 2 and len(set(told)) == len(told), 'one sentence for each thing that is wrong'
    assert last == 'made: not scored, nothing was written; --partial leaves out what does not fit' and 'Traceback' not in err


def test_a_broken_gt_of_several_degradations_is_named_once(capsys):
    shutil.copytree('data/val/noisy/GT', 'clean')
    cut('clean/photo.png')
    assert score(data='clean') == 1 and capsys.readouterr().err.count('clean/photo.png') == 1


def flat(): shutil.copytree('made/noisy', 'flat')
def clean(): shutil.copytree('data/val/noisy/GT', 'clean')
def kept(spoil=None, rest=''):
    assert score(rest) == 0
    if spoil: Path('results/scores/data', spoil[0]).write_text(spoil[1](Path('results/scores/data', spoil[0]).read_text()))

def renamed_scores():
    kept()
    for p in sorted(Path('results/scores/data').iterdir()): p.rename(p.with_stem('k'))


# what is there before, the words after `daclip` with @ for a data set and a name, what the sentence has to say
REFUSED = {
    'no folder': (None, 'score nothere @', 'nothere: no such folder, expected restored images'),
    'a file for a folder': (None, f'score {IMAGE} @', f'{IMAGE}: is a file, expected restored images'),
    'no data set': (None, 'score made --dataset nothere --name m', 'nothere: no such folder, expected clean images'),
    'a file for a data set': (None, f'score made --dataset {IMAGE} --name m', f'{IMAGE}: is a file'),
    'data set without GT': (lambda: [shutil.rmtree(f'data/val/{w}/GT') for w in WORDS], 'score made @',
                            'data/val: no degradation in it has a folder GT'),
    'two splits': (lambda: shutil.copytree('data/val', 'data/test'), 'score made @', 'data: has val and test'),
    'only train': (lambda: Path('data/val').rename('data/train'), 'score made @', 'data: has only train'),
    'no such split': (None, 'score made @ --split vla', 'data: has no folder vla; did you mean val?'),
    'split that leaves': (None, 'score made @ --split ../made', "split '../made': expected letters"),
    'unknown protocol': (None, 'score made @ --protocol ycbcr', "protocol 'ycbcr' is not known; expected one of rgb"),
    'unknown word': (None, 'score made @ --degradation nosiy', "'nosiy': expected one of hazy, noisy; did you mean noisy?"),
    'word is missing': (flat, 'score flat @', 'flat: holds the images of one degradation; name the one that it is of hazy, noisy'),
    'two words for one folder': (flat, 'score flat @ --degradation hazy --degradation noisy', 'images of one degradation'),
    'average as a word': (lambda: [flat(), clean()], 'score flat --dataset clean --name m --degradation average',
                          'means the average'),
    'word that leaves': (lambda: [flat(), clean()], 'score flat --dataset clean --name m --degradation ../x',
                         "degradation '../x': expected"),
    'name that leaves': (None, 'score made --dataset data --name ../m', "name '../m': expected letters, digits, - and _"),
    'name with a folder': (None, 'score made --dataset data --name a/m', "name 'a/m': expected letters"),
    'no name': (None, "score made --dataset data --name ''", "name '': expected letters"),
    'name of the input': (None, 'score made --dataset data --name input', "name 'input': that is what the degraded images are called"),
    'LQ nowhere': (clean, 'score made --dataset clean --lq nothere --name m', 'nothere: no such folder, expected degraded images'),
    'LQ twice': (None, 'score made --dataset data --lq made --name m', 'made: data/val has a folder for each degradation'),
    'one LQ for two words': (clean, 'score made --dataset clean --lq data/val/noisy/LQ --name m', 'the degraded images are in one'),
    'empty folder': (lambda: Path('empty').mkdir(), 'score empty @ --degradation noisy --partial',
                     'empty: holds no image that can be scored'),
    'out among the images': (None, 'score made @ --out made/s', '--out made/s: lies in made'),
    'out is a file': (lambda: Path('s').write_text('x'), 'score made @ --out s',
                      's: is a file, expected a folder for scores'),
    'out with a bad name': (None, "score made @ --out 'my scores'", "'my scores': expected letters"),
    'kept under another protocol': (kept, 'score made --dataset data --name n --protocol y',
                                    'kept scores of m are under protocol rgb, those of n under y'),
    'kept of other images': (lambda: [kept(), save_image(pixels(9), IMAGE)], 'score made @', 'overwrite replaces them'),
    'kept against another GT': (lambda: [kept(), save_image(pixels(9), 'data/val/noisy/GT/photo.png')],
                                'score made --dataset data --name n', 'kept scores of m are against other clean images'),
    'kept and edited': (lambda: kept(('m.csv', lambda t: re.sub(r',(\d)\d\.', r',9\1.', t, count=1))), 'compare results/scores/data',
                        'm.csv: a row of run m was edited'),
    'kept and broken': (lambda: kept(('m.json', lambda t: t[:40])), 'compare results/scores/data', 'm.json: not a record'),
    'kept and renamed': (renamed_scores, 'compare results/scores/data', 'k.json: not the scores of k'),
    'compare nothing': (None, 'compare made', 'made: no scores here'),
    'compare who is not there': (kept, 'compare results/scores/data m n', 'n.json: no such file; there is m'),
}


@pytest.mark.parametrize('before, line, says', REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_one_sentence(before, line, says, capsys, quick):
    if before: before()
    there = files()
    capsys.readouterr()
    assert daclip(line.replace('@', '--dataset data --name m')) == 2
    out, err = capsys.readouterr()
    assert out == '' and files() == there
    assert re.fullmatch(r'daclip: [^\n]+\n', err) and says in err and 'Traceback' not in err, err


def test_two_protocols_or_data_sets_are_not_compared(quick, capsys):
    "Also when somebody copied the files together."
    assert score() == 0 and score('--protocol y --out results/scores/y', 'n') == 0
    save_image(pixels(9), 'data/val/noisy/GT/photo.png')
    assert score('--out results/scores/z', 'k') == 0
    for name, why in (('y/n', 'under protocol rgb, those of n under y'), ('z/k', 'other clean images than those of')):
        for end in ('csv', 'json'): shutil.copy(f'results/scores/{name}.{end}', 'results/scores/data')
        capsys.readouterr()
        assert daclip('compare results/scores/data') == 2 and why in capsys.readouterr().err
        for end in ('csv', 'json'): Path('results/scores/data', f'{name[2:]}.{end}').unlink()


# ---- what fits

def test_rows_say_everything(capsys):
    assert score() == 0
    made = rows()
    assert set(made.photo) == set(NAMES) and (made.groupby(['method', 'degradation']).size() == 6).all()
    assert set(made.method) == {'m', 'input'} and set(made.protocol) == {'rgb'} and set(made.seed) == {0}
    assert made.lpips.isna().all() and made.stlpips.notna().all()
    facts = json.loads(Path('results/scores/data/m.json').read_text())['runs'][0]
    assert (facts['protocol'], facts['images'], facts['left_out']) == ('rgb', 12, []) and facts['versions']['torch'] and facts['scored']
    for side, folder in (('out', 'made'), ('gt', 'data/val'), ('lq', 'data/val')):
        sub = '' if side == 'out' else f'{side.upper()}/'
        assert facts['pixels'][side] == {f'{w}/{n}': S.look(f'{folder}/{w}/{sub}{n}.png').pixels for w in WORDS for n in NAMES}
    out = capsys.readouterr().out
    assert '## Gain over the degraded input' in out and '| noisy ' in out and 'protocol rgb' in out


def test_the_same_command_again_changes_no_byte_and_overwrite_replaces(quick, monkeypatch):
    assert score() == 0
    first = files('results')
    monkeypatch.setattr(S, 'now', lambda: 'another day')
    assert score() == 0 and files('results') == first
    save_image(worse(pixels(4), .2, 5), IMAGE)
    assert score() == 2 and files('results') == first
    assert score('--overwrite') == 0 and files('results') != first
    assert score('--protocol y --overwrite') == 0 and set(rows().protocol) == {'y'}


@pytest.mark.parametrize('end', ['jpg', 'bmp', 'webp', 'tif', 'PNG'])
def test_other_endings_are_the_same_image(end, quick):
    for p in sorted(Path('made/noisy').iterdir()):
        with Image.open(p) as im: im.load()
        p.unlink()
        im.save(p.with_suffix(f'.{end}'))
    assert score() == 0 and len(rows()) == 24


def test_a_picture_that_lies_on_its_side_is_turned(quick):
    exif = Image.Exif()
    exif[274] = 6
    assert score() == 0
    upright = rows()
    im = Image.open(IMAGE)
    im.transpose(Image.Transpose.ROTATE_90).save(IMAGE, exif=exif)
    assert score('--overwrite') == 0
    pd.testing.assert_frame_equal(rows(), upright)


def test_a_flat_folder_and_a_folder_of_clean_images(quick, capsys):
    shutil.copytree('made/noisy', 'flat')
    assert score('--degradation noisy', folder='flat') == 0
    assert score('--degradation noisy', 'both') == 0
    assert S.read_scores('results/scores/data', ['both'])[0].rows.psnr.tolist() == rows().psnr.tolist()
    shutil.copytree('data/val/noisy/GT', 'clean')
    assert score(folder='flat', data='clean') == 0
    assert set(rows(data='clean').degradation) == {'unnamed'} and set(rows(data='clean').method) == {'m'}
    capsys.readouterr()
    assert score('--lq data/val/noisy/LQ --degradation noisy --overwrite', folder='flat', data='clean') == 0
    assert set(rows(data='clean').method) == {'m', 'input'} and 'Gain' in capsys.readouterr().out
    assert score('--overwrite', data='clean') == 0 and set(rows(data='clean').degradation) == set(WORDS)
    shutil.copytree('data/val/noisy', 'pair')
    assert score('--degradation noisy', folder='flat', data='pair') == 0
    assert rows(data='pair').psnr.tolist() == rows('both').psnr.tolist()
    assert score(folder='flat', data='data/val/noisy/GT --out results/scores/g') == 0 and set(rows(data='g').method) == {'m'}
    assert S.read_dataset('data/val/noisy/GT').name == 'noisy' and S.read_dataset('data/val').name == 'data'


def test_a_part_is_scored_when_asked_and_every_table_says_so(quick, capsys):
    Path(IMAGE).unlink()
    save_image(pixels(1, (20, 20)), 'made/noisy/x_y.png')
    make('full', .2, seed=1)
    assert score('--partial') == 0 and score(name='full', folder='full') == 0
    out, err = capsys.readouterr()
    assert 'is missing' in err and 'is 20×20' in err and re.search(r'\| m +\|.*\| 10 of 12 +\|', out), out
    facts = json.loads(Path('results/scores/data/m.json').read_text())['runs'][0]
    assert facts['images'] == 12 and [d['image'] for d in facts['left_out']] == ['photo', 'x_y']
    assert not {f'noisy/{d["image"]}' for d in facts['left_out']} & set(facts['pixels']['out'])
    assert daclip('compare results/scores/data') == 0
    page = Path('results/scores/data/tables/data.md').read_text()
    assert re.search(r'\| m +\|.*\| 10 of 12 +\|', page) and re.search(r'\| full +\|.*\| 12 +\|', page)
    assert set(pd.read_csv('results/scores/data/tables/data_claims.csv').verdict) == {'not run'}


def test_the_count_needs_no_input_and_a_missing_degradation_is_not_run(quick, capsys):
    for w in WORDS: shutil.rmtree(f'data/val/{w}/LQ')
    Path('made/hazy/photo.png').unlink()
    shutil.rmtree('made/noisy')
    assert score('--partial') == 0
    out = capsys.readouterr().out
    assert re.search(r'\| hazy +\|.*\| 5 of 6 +\|', out) and re.search(r'\| noisy +\| not run', out), out
    assert re.search(r'\| average +\| not run', out)


def test_two_methods_in_one_table(quick, capsys):
    make('better', .05, seed=1)
    make('same', .1, seed=2)
    make('worse', .2, seed=3)
    for name, folder in (('m', 'made'), ('best', 'better'), ('same', 'same'), ('a', 'worse')): assert score(name=name, folder=folder) == 0
    assert daclip('compare results/scores/data') == 0
    judged = pd.read_csv('results/scores/data/tables/data_claims.csv').query("metric == 'psnr'").set_index('claim')
    assert judged.verdict.to_dict() == {
        'a against best: PSNR': 'best better', 'a against m: PSNR': 'm better', 'a against same: PSNR': 'same better',
        'best against m: PSNR': 'best better', 'best against same: PSNR': 'best better', 'm against same: PSNR': 'too close to tell'}
    mine, other = (rows(n).query('method == @n').set_index(['degradation', 'photo']).psnr for n in ('best', 'm'))
    one = judged.loc['best against m: PSNR']
    assert one.difference == pytest.approx((mine - other).mean(), abs=1e-9) and one.p < .05
    first = files('results')
    capsys.readouterr()
    assert daclip('compare results/scores/data m best') == 0 and files('results') == first
    out = capsys.readouterr().out
    assert '| m against best' in out and '| a ' not in out and '| same' not in out


def test_photographs_are_told_apart_by_their_clean_pixels(quick):
    "Not by their names: one name may mean two photographs, and one photograph have several names."
    save_image(pixels(70), 'data/val/noisy/GT/0001.png')  # another photograph than 0001 of hazy
    shutil.copy('data/val/noisy/GT/0002.png', 'data/val/noisy/GT/photo.png')  # the same twice
    assert score() == 0
    told = rows().query("method == 'm' and degradation == 'noisy'").set_index('image')
    assert told.photo.to_dict() == {**{n: n for n in NAMES}, '0001': 'noisy/0001', 'photo': '0002'}
    assert told.seed.to_dict() == dict.fromkeys(NAMES, 0) | {'photo': 1}
    assert S.compare(S.read_scores('results/scores/data'), 'data').table.query("degradation == 'noisy'").n_photos.max() == 5
    assert score('--degradation noisy', 'part') == 0
    part = rows('part').query("method == 'part'").set_index('image')
    assert part.photo.to_dict() == told.photo.to_dict(), 'what else was scored must not rename a photograph'


def test_an_image_that_equals_its_gt_where_the_protocol_looks(quick, capsys):
    "The border that a protocol cuts off may be all that differs."
    inner = pixels(4)
    inner[:, :4] = 0
    save_image(inner, IMAGE)
    assert score() == 0 and score('--protocol rgb-crop4 --out results/scores/c', 'n') == 1
    assert f'{IMAGE}: has no finite PSNR under protocol rgb-crop4' in capsys.readouterr().err and not Path('results/scores/c').exists()


# ---- measured as others measure it

@pytest.fixture(scope='module')
def thirty(tmp_path_factory):
    "Thirty pairs of files, and their pixels as Pillow reads them."
    folder, g = tmp_path_factory.mktemp('thirty'), np.random.default_rng(5)
    photos = [p.load() for p in packaged_photos()]
    for i in range(30):
        photo = photos[i % len(photos)]
        y, x = g.integers(0, photo.shape[1] - 45), g.integers(0, photo.shape[2] - 58)
        hq = photo[:, y:y + 45, x:x + 58]
        save_image(hq, folder/f'gt/{i:02d}.png')
        save_image(hq*g.uniform(.7, 1) + torch.from_numpy(g.normal(0, g.uniform(.01, .2), hq.shape)).float(), folder/f'out/{i:02d}.png')
    return folder, [tuple(np.array(Image.open(folder/f'{side}/{i:02d}.png')) for side in ('out', 'gt')) for i in range(30)]


def printed(metric, value): return f'{value:.{METRICS[metric].digits}f}'


@pytest.mark.parametrize('protocol', M.PROTOCOLS)
def test_thirty_files_agree_with_scikit_image_and_torchmetrics_to_the_printed_digit(thirty, protocol):
    from torchmetrics.functional.image import peak_signal_noise_ratio as tm_psnr
    from torchmetrics.functional.image import structural_similarity_index_measure as tm_ssim
    folder, pairs = thirty
    scored = S.score_folder(folder/'out', S.read_dataset(folder/'gt'), 'm', protocol, metrics=('psnr', 'ssim'))
    made = pd.DataFrame(scored.archive.rows).set_index('image').sort_index()
    crop = 4 if protocol.endswith('crop4') else 0
    for (_, row), (out, gt) in zip(made.iterrows(), pairs, strict=True):
        out, gt = ((rgb2ycbcr(x)[..., :1] if protocol[0] == 'y' else x)/255 for x in (out, gt))
        out, gt = (x[crop:len(x) - crop, crop:x.shape[1] - crop] for x in (out, gt))
        theirs = structural_similarity(gt, out, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert printed('psnr', row.psnr) == printed('psnr', peak_signal_noise_ratio(gt, out, data_range=1))
        assert printed('ssim', row.ssim) == printed('ssim', theirs)
        o, h = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (out, gt))
        _, full = tm_ssim(o, h, data_range=1., return_full_image=True)  # it also counts windows that hang over the border
        assert printed('psnr', row.psnr) == printed('psnr', tm_psnr(o, h, data_range=1.).item())
        assert printed('ssim', row.ssim) == printed('ssim', full[..., 5:-5, 5:-5].mean().item())


@pytest.mark.parametrize('protocol, named', [('rgb', 'c0.{}'), ('rgb-crop4', 'c4.{}'), ('y', 'c0.{}_y'), ('y-crop4', 'c4.{}_y')])
def test_scored_files_have_the_values_of_the_authors_code(protocol, named):
    golden = recorded('metrics')
    for i in (0, 1):
        for side in ('out', 'gt'):
            Path(f'golden/{side}').mkdir(parents=True, exist_ok=True)
            save(golden[f'in.pair{i}.{side}'].flip(-1).numpy(), f'golden/{side}/pair{i}.png')  # theirs is BGR
    made = S.score_folder('golden/out', S.read_dataset('golden/gt'), 'm', protocol, metrics=('psnr', 'ssim')).archive.rows
    made = made.set_index('image')
    for i in (0, 1):
        for m in ('psnr', 'ssim'):
            assert printed(m, made.loc[f'pair{i}', m]) == printed(m, golden[f'f64.out.pair{i}.{named.format(m)}'].item())


def test_kept_rows_stand_beside_rows_from_elsewhere(quick):
    from daclip_repro.tables.tables import sampling_table
    assert score() == 0
    gt = torch.stack([pixels(i) for i in range(6)])
    out = torch.stack([worse(x, .05, i) for i, x in enumerate(gt)])
    own = [r for w in WORDS for r in M.score(out, gt, 'rgb', ('psnr', 'ssim'), NAMES, degradation=w, method='own', seed=0)]
    both = pd.concat([rows(), pd.DataFrame(own).rename(columns={'image': 'photo'})]).assign(experiment='e', scale='s')
    table = sampling_table(both, ['psnr'], ['method']).query("degradation == 'average'").set_index('method')
    assert (table.status == 'ok').all() and table.mark['own'] == 'best' and table.missing['own'] == 0 and table.improves['own'] == 1
