"Files as users really have them: read exactly, or refused in one sentence; and nothing half-written."
import csv
import os
import pickle
import struct
import zlib
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from daclip_repro import photos as P

WORDS = ('hazy', 'motion-blurry', 'snowy')
# pytest resets the filters that the module sets for these two: what they warn of is refused with an error
pytestmark = [pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning'),
              pytest.mark.filterwarnings('ignore::UserWarning:PIL.TiffImagePlugin')]


def pixels(h=24, w=36, c=3, bits=8, seed=0):
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, (h, w, c), dtype=dtype)


def picture(h=24, w=36, seed=0): return Image.fromarray(pixels(h, w, seed=seed))


def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(a, size=None):
    "PNG bytes of H×W×C uint8 or uint16; `size` (w, h) lies about the size in an otherwise valid header."
    h, w, c = a.shape
    kind, bits = {1: 0, 2: 4, 3: 2, 4: 6}[c], 8 * a.itemsize
    rows = b''.join(b'\0' + r.astype(a.dtype.newbyteorder('>')).tobytes() for r in a)
    head = struct.pack('>IIBBBBB', *(size or (w, h)), bits, kind, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def saved(path, **kw):
    picture().save(path, **kw)
    return path.read_bytes()


# ---- malformed files: each maker writes one file; each ends in one sentence that names it

def half(name, **kw):
    def make(p):
        b = saved(p, **kw)
        p.write_bytes(b[:len(b) // 2])
    return name, make


def flipped(p):
    b = bytearray(saved(p))
    b[len(b) // 2] ^= 0xff
    p.write_bytes(b)


def sticker(p, mode='RGBA'):
    im = picture().convert(mode)
    im.putpixel((3, 4), (9, 9, 9, 254) if mode == 'RGBA' else (9, 254))
    im.save(p)


def colour_key(p):
    picture().quantize(8).save(p, transparency=0)


def alpha16(p):
    a = pixels(c=4, bits=16)
    a[..., 3] = 65535
    a[0, 0, 3] = 65534
    p.write_bytes(png(a))


BAD = {
    'missing': ('gone.png', lambda p: None, 'no such file'),
    'broken link': ('link.png', lambda p: p.symlink_to('nowhere.png'), 'link that points nowhere'),
    'folder': ('dir.png', lambda p: p.mkdir(), 'is a folder or a device'),
    'fifo': ('pipe.png', os.mkfifo, 'is a folder or a device'),
    'zero bytes': ('zero.jpg', Path.touch, 'is empty'),
    'text': ('text.png', lambda p: p.write_text('<html>404 not found</html>'), 'not an image'),
    'magic only': ('magic.png', lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n'), 'not an image'),
    'postscript': ('eps.png', lambda p: p.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'), 'not an image'),
    'zero width': ('flat.png', lambda p: p.write_bytes(png(pixels(), size=(0, 24))), 'flat.png'),
    'half a PNG': (*half('half.png'), 'damaged or cut short'),
    'half a JPEG': (*half('half.jpg', quality=95), 'damaged or cut short'),
    'half a TIFF': (*half('half.tif'), 'half.tif'),
    'half a WebP': (*half('half.webp', lossless=True), 'half.webp'),
    'half a BMP': (*half('half.bmp'), 'damaged or cut short'),
    'half a GIF': (*half('half.gif'), 'damaged or cut short'),
    'half a 16-bit PNG': ('half16.png', lambda p: p.write_bytes(png(pixels(bits=16))[:900]), 'damaged or cut short'),
    '16-bit grey with alpha': ('ga16.png', lambda p: p.write_bytes(png(pixels(c=2, bits=16))), '16-bit PNG of a rare layout'),
    'flipped byte': ('flip.png', flipped, 'damaged or cut short'),
    'bomb': ('bomb.png', lambda p: p.write_bytes(png(pixels(), size=(200_000, 200_000))), 'pixels'),
    'small bomb': ('bomb2.png', lambda p: p.write_bytes(png(pixels(), size=(10_000, 10_000))), '10000×10000'),
    'animated GIF': ('anim.gif', lambda p: saved(p, save_all=True, append_images=[picture(seed=1)]), 'holds 2 images'),
    'animated PNG': ('anim.png', lambda p: saved(p, save_all=True, append_images=[picture(seed=1)]), 'holds 2 images'),
    'animated WebP': ('anim.webp', lambda p: saved(p, save_all=True, append_images=[picture(seed=1)]), 'holds 2 images'),
    'pages': ('pages.tif', lambda p: saved(p, save_all=True, append_images=[picture(seed=1)] * 2), 'holds 3 images'),
    'float TIFF': ('float.tif', lambda p: Image.fromarray(np.ones((9, 9), np.float32)).save(p), 'floating-point'),
    'float RGB TIFF': ('float3.tif', lambda p: tifffile.imwrite(p, np.ones((9, 9, 3), np.float32), photometric='rgb'), 'not an image'),
    '32-bit TIFF': ('int.tif', lambda p: Image.fromarray(np.ones((9, 9), np.int32)).save(p), '32-bit whole numbers'),
    'Lab TIFF': ('lab.tif', lambda p: Image.new('LAB', (9, 9)).save(p), 'LAB pixels'),
    '16-bit negative': ('neg.tif', lambda p: tifffile.imwrite(p, pixels(c=1, bits=16)[..., 0], photometric='miniswhite'), 'a rare layout'),
    '16-bit planes': ('planes.tif', lambda p: tifffile.imwrite(p, np.ones((3, 9, 9), np.uint16), photometric='rgb',
                                                           planarconfig='separate'), 'a rare layout'),
    'RGBA': ('rgba.png', sticker, 'transparent'),
    'LA': ('la.png', lambda p: sticker(p, 'LA'), 'transparent'),
    'colour key': ('key.png', colour_key, 'transparent'),
    '16-bit RGBA': ('rgba16.png', alpha16, 'transparent'),
}


@pytest.mark.parametrize('read', [P.load_image, P.image_size])
@pytest.mark.parametrize('case', BAD)
def test_malformed_file_ends_in_one_sentence(tmp_path, case, read):
    name, make, say = BAD[case]
    make(tmp_path/name)
    with pytest.raises(OSError) as e: read(tmp_path/name)
    message = str(e.value)
    assert message.startswith(f'{tmp_path/name}: ') and message.count(name) == 1 and say in message and '\n' not in message
    assert len(message) < len(str(tmp_path/name)) + 140


@pytest.mark.parametrize('name,kw', [('f.png', {}), ('f.jpg', {'quality': 90}), ('f.gif', {}), ('f.webp', {}), ('f.bmp', {}),
                                     ('f.tif', {'compression': 'tiff_lzw'}), ('f16.png', None), ('f16.tif', None)])
def test_damage_never_escapes_as_another_exception(tmp_path, name, kw):
    p = tmp_path/name
    if kw is not None: whole = saved(p, **kw)
    elif name.endswith('png'): whole = png(pixels(bits=16))
    else:
        tifffile.imwrite(p, pixels(bits=16), photometric='rgb', compression='zlib')
        whole = p.read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(60):
        b = bytearray(whole[:rng.integers(1, len(whole))] if rng.random() < .3 else whole)
        for at in rng.integers(0, len(b), rng.integers(1, 6)): b[at] = rng.integers(256)
        p.write_bytes(b)
        for read in (P.load_image, P.image_size):
            try: out = read(p)
            except OSError as e:
                refused += 1
                assert str(e).startswith(str(p)) and '\n' not in str(e)
            else: assert read is P.image_size or out.shape[0] == 3 and 0 <= out.min() and out.max() <= 1
    assert refused > 10


# ---- what is read, is read exactly

def test_every_16_bit_value_survives(tmp_path):
    a = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, 2)
    a[..., 1] = a[::-1, :, 0]
    (tmp_path/'a.png').write_bytes(png(a))
    tifffile.imwrite(tmp_path/'a.tif', a, photometric='rgb')
    expected = torch.from_numpy(a.astype(np.float64) / 65535).permute(2, 0, 1).float()
    for f in ('a.png', 'a.tif'):
        x = P.load_image(tmp_path/f)
        assert torch.equal(x, expected) and x[0].unique().numel() == 65536


@pytest.mark.parametrize('c,bits', [(1, 8), (2, 8), (3, 8), (4, 8), (1, 16), (3, 16), (4, 16)])
def test_png_of_any_depth_and_channels(tmp_path, c, bits):
    a = pixels(c=c, bits=bits)
    if c in (2, 4): a[..., -1] = 2**bits - 1
    (tmp_path/'a.png').write_bytes(png(a))
    rgb = a[..., :3] if c > 2 else a[..., :1].repeat(3, 2)
    x = P.load_image(tmp_path/'a.png')
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert np.array_equal((x.double() * (2**bits - 1)).round().permute(1, 2, 0).numpy(), rgb)
    assert P.image_size(tmp_path/'a.png') == (24, 36)


@pytest.mark.parametrize('kw', [{}, {'compression': 'zlib'}, {'compression': 'zlib', 'predictor': 2}, {'byteorder': '>'},
                                {'tile': (16, 16)}, {'rowsperstrip': 5}, {'byteorder': '>', 'compression': 'zlib'}], ids=str)
@pytest.mark.parametrize('c', [1, 3, 4])
def test_16_bit_tiff_layouts(tmp_path, kw, c):
    a = pixels(c=c, bits=16)
    if c == 4: a[..., 3] = 65535
    alpha = {'extrasamples': ['unassalpha']} if c == 4 else {}
    tifffile.imwrite(tmp_path/'a.tif', a if c > 1 else a[..., 0], photometric='rgb' if c > 1 else 'minisblack', **alpha, **kw)
    x = P.load_image(tmp_path/'a.tif')
    assert np.array_equal((x.double() * 65535).round().permute(1, 2, 0).numpy(), a[..., :3] if c > 1 else a.repeat(3, 2))
    assert P.image_size(tmp_path/'a.tif') == (24, 36)


def test_colour_key_of_16_bit_png(tmp_path):
    a = pixels(bits=16)
    b = png(a)
    for key, opaque in ((a[3, 4], False), ((1, 2, 3), True)):
        (tmp_path/'k.png').write_bytes(b[:33] + chunk(b'tRNS', struct.pack('>HHH', *map(int, key))) + b[33:])
        if opaque: assert torch.equal(P.load_image(tmp_path/'k.png'), P.image_from_array(a))
        else:
            with pytest.raises(OSError, match='transparent'): P.load_image(tmp_path/'k.png')


def test_damaged_16_bit_png_with_valid_checksums_is_refused_and_does_not_crash(tmp_path):
    rng = np.random.default_rng(0)
    whole = png(pixels(bits=16))
    for _ in range(200):
        head, body = bytearray(whole[16:29]), bytearray(whole[41:-16])
        for part in (head, body)[rng.integers(2):]: part[rng.integers(len(part))] = rng.integers(256)
        b = whole[:8] + chunk(b'IHDR', bytes(head)) + chunk(b'IDAT', bytes(body[:rng.integers(1, len(body) + 1)])) + whole[-12:]
        (tmp_path/'d.png').write_bytes(b)
        try: P.load_image(tmp_path/'d.png')
        except OSError as e: assert str(e).startswith(str(tmp_path/'d.png'))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif', 'webp'])
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    p = tmp_path/f'o.{suffix}'
    picture().save(p, exif=exif, **({'lossless': True} if suffix == 'webp' else {}))
    upright = np.array(ImageOps.exif_transpose(Image.open(p)))
    assert np.array_equal((P.load_image(p) * 255).round().byte().permute(1, 2, 0).numpy(), upright)
    assert P.image_size(p) == upright.shape[:2]


def test_exif_orientation_of_16_bit_tiff(tmp_path):
    a = pixels(bits=16)
    tifffile.imwrite(tmp_path/'o.tif', a, photometric='rgb', extratags=[(274, 'H', 1, 6, True)])
    x = P.load_image(tmp_path/'o.tif')
    assert np.array_equal((x.double() * 65535).round().permute(1, 2, 0).numpy(), np.rot90(a, -1))
    assert P.image_size(tmp_path/'o.tif') == (36, 24)


def test_cmyk_with_and_without_profile(tmp_path):
    smooth = Image.fromarray(np.kron(pixels(3, 4), np.ones((16, 16, 1), np.uint8)))
    smooth.convert('CMYK').save(tmp_path/'plain.jpg', quality=98)
    x = P.load_image(tmp_path/'plain.jpg')
    assert (x - P.image_from_array(np.array(smooth))).abs().mean() < .02
    smooth.convert('CMYK').save(tmp_path/'bad.jpg', quality=98, icc_profile=b'not a profile')
    with pytest.raises(OSError, match='bad.jpg: '): P.load_image(tmp_path/'bad.jpg')


def test_phone_photograph_with_a_preview_is_its_first_image(tmp_path):
    picture(64, 48).save(tmp_path/'phone.jpg', format='MPO', save_all=True, append_images=[picture(8, 8)], quality=95)
    assert Image.open(tmp_path/'phone.jpg').n_frames == 2
    assert P.load_image(tmp_path/'phone.jpg').shape == (3, 64, 48) and P.image_size(tmp_path/'phone.jpg') == (64, 48)


def test_bilevel_palette_and_grey(tmp_path):
    grey = picture().convert('L')
    grey.save(tmp_path/'g.png')
    assert np.array_equal((P.load_image(tmp_path/'g.png') * 255).round().byte()[1].numpy(), np.array(grey))
    grey.convert('1').save(tmp_path/'one.png')
    assert set(P.load_image(tmp_path/'one.png').unique().tolist()) == {0., 1.}
    flat = picture().quantize(7)
    flat.save(tmp_path/'p.gif')
    assert np.array_equal((P.load_image(tmp_path/'p.gif') * 255).round().byte().permute(1, 2, 0).numpy(), np.array(flat.convert('RGB')))


def test_sizes_of_png_need_no_decoding(tmp_path, monkeypatch):
    (tmp_path/'a.png').write_bytes(png(pixels()))
    def refuse(*_): raise AssertionError('decoded')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', refuse)
    assert P.image_size(tmp_path/'a.png') == (24, 36)


@pytest.mark.parametrize('a', [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)],
                         ids=['float', 'rgba', '1d'])
def test_image_from_array_refuses(a):
    with pytest.raises(ValueError, match='image array has'): P.image_from_array(a)


# ---- saving

@given(seed=st.integers(0, 10**6), h=st.integers(1, 9), w=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_saving_rounds_to_the_nearest_level(tmp_path_factory, seed, h, w):
    img = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) * 1.2 - .1
    p = P.save_image(img, tmp_path_factory.mktemp('s')/'deep'/'x.png')
    back = P.load_image(p)
    assert (back - img.clamp(0, 1)).abs().max() <= .5 / 255 + 1e-6
    assert torch.equal(P.load_image(P.save_image(back, p)), back)


@pytest.mark.parametrize('where', ['encoder', 'rename'])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    p = P.save_image(torch.zeros(3, 8, 8), tmp_path/'x.png')
    before = p.read_bytes()
    def half_then_fail(self, file, **kw):
        Path(file).write_bytes(before[:20])
        raise OSError(28, 'No space left on device')
    def fail(*_): raise OSError(28, 'No space left on device')
    if where == 'encoder': monkeypatch.setattr(Image.Image, 'save', half_then_fail)
    else: monkeypatch.setattr(os, 'replace', fail)
    for target in (p, tmp_path/'new.png'):
        with pytest.raises(OSError, match='No space'): P.save_image(torch.ones(3, 8, 8), target)
    assert p.read_bytes() == before and os.listdir(tmp_path) == ['x.png']


def test_atomic_cleans_up_after_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with P.atomic(tmp_path/'weights.bin') as tmp:
            tmp.write_bytes(b'half')
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('img,name,say', [
    (torch.zeros(3, 4, 4), 'x.jpg', 'ends in .png'), (torch.zeros(1, 4, 4), 'x.png', 'shape \\(1, 4, 4\\)'),
    (torch.zeros(2, 3, 4, 4), 'x.png', 'expected an image'), (torch.zeros(3, 0, 4), 'x.png', 'expected an image'),
    (torch.full((3, 4, 4), float('nan')), 'x.png', 'NaN')])
def test_save_refuses(tmp_path, img, name, say):
    with pytest.raises(ValueError, match=say): P.save_image(img, tmp_path/name)
    assert os.listdir(tmp_path) == []


# ---- photographs

def test_packaged_photos_ship_in_the_wheels():
    shipped = {f'{package}/{f}' for package, dist in (('skimage', 'scikit-image'), ('sklearn', 'scikit-learn'))
               for f in [str(f).removeprefix(f'{package}/') for f in files(dist)]}
    assert {f'{p.package}/{p.file}' for p in P.PACKAGED} <= shipped
    photos = P.packaged_photos()
    assert [p.name for p in photos] == ['astronaut', 'chelsea', 'coffee', 'rocket', 'motorcycle', 'china', 'flower']
    for p in photos:
        x = p.load()
        assert x.shape[0] == 3 and min(x.shape[1:]) >= 300 and x.dtype == torch.float32 and p.caption
        assert (x[0] - x[2]).abs().mean() > .01 # colour, not grey


def test_a_photo_is_lazy_and_picklable(tmp_path):
    (tmp_path/'bad.png').write_text('no')
    picture().save(tmp_path/'good.png')
    bad, good = P.photo_folder(tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(good)).load(), good.load())
    with pytest.raises(OSError, match='bad.png'): bad.load()


def test_folder_order_hidden_and_links(tmp_path):
    root = tmp_path/'root'
    for f in ('z.JPG', 'b/a.png', 'B.tiff', '.hidden.png', '.git/x.png', 'b/._a.png', 'Thumbs.db', 'notes.md'):
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        (root/f).touch()
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'elsewhere'/'c.png').touch()
    (root/'linked').symlink_to(tmp_path/'elsewhere')
    (root/'loop').symlink_to(root)
    (root/'dangling.png').symlink_to('nowhere')
    photos = P.photo_folder(root)
    assert [p.name for p in photos] == ['B', 'b/a', 'dangling', 'linked/c', 'z']
    with pytest.raises(FileNotFoundError, match='points nowhere'): photos[2].load()


@pytest.mark.parametrize('make,error,say', [
    (lambda r: r/'gone', FileNotFoundError, 'no such folder'),
    (lambda r: r/'a.txt', NotADirectoryError, 'is a file'),
    (lambda r: r/'empty', ValueError, 'no photographs here'),
    (lambda r: r/'twins', ValueError, "would both be called 'a'")], ids=['missing', 'file', 'empty', 'same name'])
def test_folder_refuses(tmp_path, make, error, say):
    (tmp_path/'a.txt').touch()
    (tmp_path/'empty').mkdir()
    (tmp_path/'twins').mkdir()
    for f in ('a.png', 'a.jpg'): picture().save(tmp_path/'twins'/f)
    with pytest.raises(error, match=say) as e: P.photo_folder(make(tmp_path))
    assert str(make(tmp_path)) in str(e.value) and '\n' not in str(e.value)


def test_captions(tmp_path):
    (tmp_path/'f').mkdir()
    for f in ('a.png', 'b.png'): picture().save(tmp_path/'f'/f)
    with open(tmp_path/'f.csv', 'w', newline='', encoding='utf-8-sig') as f:
        rows = ('label', 'file', 'more'), ('a "quoted", long\nname', 'a.png', 1), ('été', 'b.png', 2), ('x', 'other.png', 3)
        csv.writer(f).writerows(rows)
    assert [p.caption for p in P.photo_folder(tmp_path/'f', tmp_path/'f.csv')] == ['a "quoted", long\nname', 'été']
    assert [p.caption for p in P.photo_folder(tmp_path/'f')] == [None, None]


@pytest.mark.parametrize('text,say', [
    (None, 'no such file'), (b'', 'header'), (b'filepath,title\na.png,x\n', 'header'), (b'file,label\na.png,\n', 'line 2 has no label'),
    (b'file,label\n,x\n', 'line 2 has no file'), (b'file,label\na.png\n', 'line 2 has no label'),
    (b'file,label\na.png,x\na.png,y\n', 'line 3 names'),
    (b'file,label\na.png,\xff\xfe\n', 'UTF-8'), (b'file,label\na.png,"x\n', 'not a CSV'), (b'file,label\nb.png,x\n', "no row for 'a.png'")])
def test_captions_refused(tmp_path, text, say):
    (tmp_path/'f').mkdir()
    picture().save(tmp_path/'f'/'a.png')
    if text is not None: (tmp_path/'c.csv').write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=say) as e: P.photo_folder(tmp_path/'f', tmp_path/'c.csv')
    assert str(e.value).startswith(f'{tmp_path/"c.csv"}: ') and '\n' not in str(e.value)


# ---- splitting and cropping

@given(names=st.lists(st.text('abcxyz019/_', min_size=1, max_size=6), min_size=2, max_size=60, unique=True), every=st.integers(2, 30),
       order=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_split_is_by_photograph_and_does_not_depend_on_order(names, every, order):
    photos = [P.Photo(n, None) for n in names]
    train, val = P.split_photos(photos, every)
    shuffled = photos[:]
    order.shuffle(shuffled)
    assert P.split_photos(shuffled, every) == (train, val)
    assert {p.name for p in train}.isdisjoint(p.name for p in val) and len(train) + len(val) == len(photos)
    assert train and len(val) == -(-len(photos) // every)


@pytest.mark.parametrize('names,every,say', [('aab', 2, 'a: two photographs'), ('ab', 1, 'every = 1'), ('a', 2, '1 photographs'),
                                             ('', 2, '0 photographs')])
def test_split_refuses(names, every, say):
    with pytest.raises(ValueError, match=say): P.split_photos([P.Photo(n, None) for n in names], every)


@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 99), augment=st.booleans())
@settings(max_examples=80, deadline=None)
def test_random_crop_is_a_window_of_the_image(h, w, size, seed, augment):
    img = torch.arange(h * w).float().view(1, h, w)
    g = lambda: torch.Generator().manual_seed(seed)
    if size > min(h, w):
        with pytest.raises(ValueError, match=f'{size}×{size} from an image of {w}×{h}'): P.random_crop(img, size, g(), augment)
        return
    crop = P.random_crop(torch.cat([img, -img]), size, g(), augment)
    assert crop.shape == (2, size, size) and torch.equal(crop[0], -crop[1])
    assert torch.equal(crop, P.random_crop(torch.cat([img, -img]), size, g(), augment))
    y, x = divmod(int(crop[0].min()), w)
    assert torch.equal(crop[0].flatten().sort().values, img[0, y:y + size, x:x + size].flatten())
    if not augment: assert torch.equal(crop[0], img[0, y:y + size, x:x + size])


def test_random_crop_reaches_every_place_and_symmetry():
    g = torch.Generator().manual_seed(0)
    img = torch.arange(12).float().view(1, 3, 4)
    crops = {tuple(P.random_crop(img, 2, g, augment=True).flatten().tolist()) for _ in range(2000)}
    assert len(crops) == 2 * 3 * 8


@pytest.mark.parametrize('h,w', [(7, 90), (90, 7), (32, 32), (33, 64), (1, 1)])
def test_fit_square(h, w):
    x = torch.rand(3, h, w, generator=torch.Generator().manual_seed(0))
    y = P.fit_square(x, 32)
    assert y.shape == (3, 32, 32) and 0 <= y.min() and y.max() <= 1
    assert torch.allclose(y.flip(2), P.fit_square(x.flip(2), 32), atol=1e-5) or (w - min(h, w)) % 2 # centred
    if (h, w) == (32, 32): assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
    with pytest.raises(ValueError, match='size = 0'): P.fit_square(x, 0)


# ---- pairs

def make_pairs(root, words=WORDS, splits=('train', 'val'), n=3):
    for split in splits:
        for word in words:
            for side in ('LQ', 'GT'):
                (root/split/word/side).mkdir(parents=True)
                for i in range(n): picture(seed=i + 10 * (side == 'LQ')).save(root/split/word/side/f'{i}.png')
    return root


def test_good_pairs(tmp_path):
    root = make_pairs(tmp_path)
    (root/'train'/'hazy'/'LQ'/'0.png').unlink()
    picture().save(root/'train'/'hazy'/'LQ'/'0.JPG', format='JPEG')
    (root/'train'/'hazy'/'LQ'/'.DS_Store').touch()
    assert P.check_pairs(root, WORDS) == P.check_pairs(root) == []
    pairs = P.PairFolder(root, 'train', WORDS)
    assert len(pairs) == 9 and pairs.degradations == WORDS
    lq, hq, degradation, name = pairs[4]
    assert (degradation, name) == ('motion-blurry', '1')
    assert torch.equal(hq, P.image_from_array(pixels(seed=1))) and torch.equal(lq, P.image_from_array(pixels(seed=11)))
    batch = next(iter(torch.utils.data.DataLoader(pairs, batch_size=4)))
    assert batch.lq.shape == (4, 3, 24, 36) and list(batch.name) == ['0', '1', '2', '0']


def rename(a, b): return lambda r: (r/a).rename(r/b)
def remove(a): return lambda r: (r/a).unlink()
def resize(a): return lambda r: picture(36, 24).save(r/a)
def empty(r): [p.unlink() for side in ('LQ', 'GT') for p in (r/'val/hazy'/side).iterdir()]
def twin(r): picture().save(r/'train/snowy/GT/1.bmp')


FAULTS = {
    'split misspelt': (rename('val', 'vall'), ['val: no such folder; did you mean vall?']),
    'word misspelt': (rename('train/hazy', 'train/Haze'), ['train/Haze: expected one of hazy, motion-blurry, snowy; did you mean hazy?']),
    'word shortened': (rename('val/motion-blurry', 'val/blurry'),
                       ['val/blurry: expected one of hazy, motion-blurry, snowy; did you mean motion-blurry?']),
    'word gone': (rename('val/snowy', '../away'), ['val: has no folder snowy']),
    'side in wrong case': (rename('train/hazy/GT', 'train/hazy/gt'), ['train/hazy/gt: expected LQ or GT; did you mean GT?']),
    'side of another name': (rename('train/hazy/GT', 'train/hazy/clean'),
                             ['train/hazy/clean: expected LQ or GT', 'train/hazy: has no folder GT']),
    'LQ without GT': (remove('train/hazy/GT/1.png'), ['train/hazy/LQ/1.png: has no partner in GT']),
    'GT without LQ': (remove('val/snowy/LQ/2.png'), ['val/snowy/GT/2.png: has no partner in LQ']),
    'size': (resize('val/snowy/LQ/2.png'), ['val/snowy/LQ/2.png: is 24×36, its partner in GT is 36×24 (width×height)']),
    'unreadable': (lambda r: (r/'val/hazy/GT/0.png').write_text('?'), ['val/hazy/GT/0.png: is not an image']),
    'cut short': (lambda r: (r/'val/hazy/GT/0.png').write_bytes(png(pixels())[:-500]), ['val/hazy/GT/0.png: is damaged or cut short']),
    'no images': (empty, ['val/hazy/GT: holds no images', 'val/hazy/LQ: holds no images']),
    'two of one stem': (twin, ['train/snowy/GT/1.png: has the same stem as 1.bmp']),
    'folder inside': (lambda r: (r/'train/hazy/LQ/more').mkdir(), ['train/hazy/LQ/more: is a folder']),
    'foreign file': (lambda r: (r/'train/hazy/LQ/0.heic').touch(), ['train/hazy/LQ/0.heic: expected a name that ends in']),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_is_found_and_named(tmp_path, fault):
    root = make_pairs(tmp_path/'data')
    spoil, expected = FAULTS[fault]
    spoil(root)
    problems = P.check_pairs(root, WORDS)
    assert len(problems) == len(expected) and all(any(p.startswith(e) for p in problems) for e in expected), problems
    assert not any(str(tmp_path) in p or '\n' in p for p in problems)


def test_all_faults_at_once(tmp_path):
    root = make_pairs(tmp_path/'data', n=4)
    for f in ('LQ without GT', 'unreadable', 'two of one stem', 'foreign file'): FAULTS[f][0](root)
    resize('train/motion-blurry/LQ/3.png')(root)
    problems = P.check_pairs(root, WORDS)
    assert len(problems) == 5 and problems == sorted(problems)
    with pytest.raises(ValueError, match=r'\(and 2 more; check_pairs lists them\)'): P.PairFolder(root, 'train', WORDS)


def test_own_words_have_to_agree_between_the_splits(tmp_path):
    root = make_pairs(tmp_path, words=('dust', 'scratch'))
    assert P.check_pairs(root) == []
    (root/'val'/'scratch').rename(root/'val'/'scratches')
    assert P.check_pairs(root) == ['train: has no folder scratches, as other splits have; did you mean scratch?',
                                   'val: has no folder scratch, as other splits have; did you mean scratches?']
    assert P.check_pairs(root, splits=('val',)) == []


def test_unpaired_and_unreadable_is_two_problems(tmp_path):
    root = make_pairs(tmp_path)
    (root/'val'/'hazy'/'GT'/'0.png').unlink()
    (root/'val'/'hazy'/'LQ'/'0.png').write_text('?')
    assert len(P.check_pairs(root, WORDS)) == 2


def test_pair_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match='gone: no such folder'): P.PairFolder(tmp_path/'gone', 'train')
    with pytest.raises(FileNotFoundError, match='gone: no such folder'): P.check_pairs(tmp_path/'gone')
    root = make_pairs(tmp_path)
    with pytest.raises(ValueError, match='trian: no such folder; did you mean train'): P.PairFolder(root, 'trian')
    resize('train/hazy/LQ/0.png')(root)
    with pytest.raises(ValueError, match='0.png: differs in size'): P.PairFolder(root, 'train')[0]


# ---- looking

def test_show_images_gives_exactly_one_picture(monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt
    shown = []
    monkeypatch.setattr(IPython.display, 'display', shown.append)
    images = [torch.rand(3, 8, 12), torch.rand(8, 8), torch.rand(1, 9, 9)]
    fig = P.show_images(images, ['a', 'b', 'c'], ncols=2, suptitle='s', rows=['x', 'y'])
    fig._ipython_display_()
    assert plt.get_fignums() == [] and len(shown) == 1 and len(fig.axes) == 4
    assert shown[0].data[:2] == b'\xff\xd8' # a JPEG
    with pytest.raises(ValueError, match='no images'): P.show_images([])
