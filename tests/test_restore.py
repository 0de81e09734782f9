"Restoring: tiles that cover, blend and share their noise; files that are never lost, mixed up or half-written."
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from daclip_repro.cli import main
from daclip_repro.controller import DACLIP, make_clip
from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.irsde import IRSDE
from daclip_repro.photos import load_image, save_image
from daclip_repro.restore import Restorer, bands, blend, for_tiles, how_made, place_tiles, plane_noise, tile_noise, tile_weights
from daclip_repro.training import Denoiser, TrainConfig, build
from daclip_repro.unet import Context

COMMAND = str(Path(sys.executable).parent/"daclip")
tilings = st.tuples(st.integers(1, 700), st.integers(2, 12), st.integers(0, 96)).map(lambda o: (o[0], 16*o[1], min(o[2], 8*o[1]//16*16)))


def picture(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Pixelwise(nn.Module):
    "A U-Net without a view of its surroundings: tiles cannot make a difference to it."
    def forward(self, x, mu, t, context=None): return .3*x - .2*mu.square() + .001*t


class Recorder(nn.Module):
    "A restorer that notes what it is given."
    words, daclip = ("hazy",), None
    def __init__(self):
        super().__init__()
        self.scale, self.embedded, self.sampled = nn.Parameter(torch.ones(())), [], []

    def embed(self, lq, words=None):
        self.embedded.append((tuple(lq.shape), words))
        return Context(lq.mean((2, 3)), (lq.amax((2, 3))[:, None],))

    def sample(self, lq, method, steps, randn, context):
        self.sampled.append((tuple(lq.shape), method, steps, context))
        return lq * self.scale


# --- tiles

@settings(max_examples=200, deadline=None)
@given(tilings)
def test_tiles_cover_the_side_with_the_overlap_and_on_the_grid(given_tiling):
    side, tile, overlap = given_tiling
    starts, size = place_tiles(side, tile, overlap)
    side, needed = -(-side//16)*16, -(-overlap//16)*16
    assert starts[0] == 0 and starts[-1] + size == side
    assert size <= tile and all(s % 16 == 0 for s in starts)
    assert all(a + size - b >= overlap for a, b in zip(starts, starts[1:])), (starts, size)
    if len(starts) > 1: assert (len(starts) - 1)*(tile - needed) + needed < side, "one tile fewer would do"


@settings(max_examples=100, deadline=None)
@given(tilings)
def test_weights_sum_to_one(given_tiling):
    starts, size = place_tiles(*given_tiling)
    total = torch.zeros(starts[-1] + size)
    for s, w in zip(starts, tile_weights(starts, size)):
        assert (w > 0).all()
        total[s:s + size] += w
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@pytest.mark.parametrize("height,width", [(1, 1), (1, 50), (16, 16), (33, 100), (64, 64), (65, 63), (200, 7), (131, 170)])
@pytest.mark.parametrize("tile,overlap,batch", [(32, 0, 1), (32, 16, 3), (64, 32, 2), (None, 16, 1)])
def test_doing_nothing_gives_the_image_back(height, width, tile, overlap, batch):
    image, calls = picture(3, height, width), []
    def fn(tiles, places):
        assert len(tiles) == len(places) <= batch and tiles.shape[2] % 16 == tiles.shape[3] % 16 == 0
        calls.append(tiles.shape)
        return tiles
    torch.testing.assert_close(blend(fn, image, tile=tile, overlap=overlap, batch=batch), image, atol=1e-6, rtol=0)
    assert len({s[2:] for s in calls}) == 1, "tiles of one image have one size"
    levels = image.mul(255).round().byte()
    assert torch.equal(blend(fn, levels, tile=tile, overlap=overlap, batch=batch), levels)


def test_rows_come_once_and_in_order():
    image, row = picture(3, 150, 90), 0
    for y, rows in bands(lambda tiles, places: tiles[:, :2], image, tile=48, overlap=16, batch=2):
        assert y == row and rows.shape[::2] == (2, 90)
        torch.testing.assert_close(rows, image[:2, y:y + rows.shape[1]], atol=1e-6, rtol=0)
        row += rows.shape[1]
    assert row == 150


def test_a_short_side_is_mirrored():
    seen = []
    blend(lambda tiles, places: seen.append(tiles) or tiles, torch.arange(3.)[None, None]/3)
    assert (seen[0][0, 0, 0]*3).round().tolist() == [0, 1, 2, 1]*4


# --- noise

@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 200)]*2), st.tuples(*[st.integers(1, 150)]*2))
def test_noise_depends_on_the_place_only(place, shape):
    (y, x), (h, w) = place, shape
    assert torch.equal(plane_noise(3, 1, place, (3, h, w)), plane_noise(3, 1, (0, 0), (3, y + h, x + w))[:, y:, x:])


def test_noise_is_standard_normal_and_new_with_every_seed_draw_and_block():
    planes = torch.stack([plane_noise(s, d, (0, 0), (3, 256, 256)) for s, d in ((0, 0), (0, 1), (1, 0), (1, 1))])
    assert planes.mean().abs() < .005 and (planes.std() - 1).abs() < .005
    blocks = planes.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).reshape(64, -1)
    assert (torch.corrcoef(blocks) - torch.eye(64)).abs().max() < .05
    kurtosis = planes.pow(4).mean()
    assert abs(kurtosis - 3) < .05


def test_noise_of_a_tile_does_not_depend_on_its_batch():
    x, places = torch.empty(3, 3, 32, 48), [(0, 0), (16, 96), (64, 32)]
    together, apart = tile_noise(5, places), [tile_noise(5, [p]) for p in places]
    for _ in range(3): assert torch.equal(together(x), torch.cat([randn(x[:1]) for randn in apart]))


# --- restorer

@pytest.mark.parametrize("method", ["posterior", "sde", "ode"])
@pytest.mark.parametrize("parametrisation", ["residual", "noise"])
def test_tiles_change_nothing_for_a_network_that_sees_pixels(method, parametrisation):
    "Only equal noise in overlapping tiles, in every step, gives this."
    model, image = Denoiser(Pixelwise(), IRSDE(T=20), parametrisation), picture(3, 100, 150)
    options = dict(seed=4, method=method, steps=5)
    whole = Restorer(model, "cpu", tile=None)(image, **options)
    assert whole.std() > .01 and whole.shape == image.shape
    for batch in (1, 3):
        tiled = Restorer(model, "cpu", tile=48, overlap=16, batch=batch)(image, **options)
        torch.testing.assert_close(tiled, whole, atol=2e-5, rtol=0)
    assert not torch.allclose(Restorer(model, "cpu", tile=None)(image, **options | dict(seed=5)), whole, atol=.01)


def test_embeddings_come_from_the_whole_image_and_once():
    model, image = Recorder(), picture(3, 70, 130)
    restored = Restorer(model, "cpu", tile=48, overlap=16, batch=2)(image, degradation="hazy", method="ode", steps=3)
    torch.testing.assert_close(restored, image, atol=1e-6, rtol=0)
    assert model.embedded == [((1, 3, 70, 130), "hazy")]
    assert len(model.sampled) > 2
    for shape, method, steps, context in model.sampled:
        assert shape[2:] == (48, 48) and (method, steps) == ("ode", 3)
        assert torch.equal(context.prompt, image.mean((1, 2)).expand(shape[0], 3))
        assert torch.equal(context.cross[0], image.amax((1, 2)).expand(shape[0], 1, 3))


def test_context_is_repeated_without_a_copy():
    context = Context(picture(1, 8), (picture(1, 1, 4),))
    res = for_tiles(context, 5)
    assert isinstance(res, Context) and res.prompt.shape == (5, 8) and res.cross[0].shape == (5, 1, 4)
    assert res.prompt.data_ptr() == context.prompt.data_ptr()
    assert for_tiles(None, 5) is None and for_tiles(Context(None, ()), 5) == Context(None, ())


@pytest.mark.parametrize("config", [
    TrainConfig(network=dict(nf=32, ch_mult=(1, 2)), condition="both", parametrisation="residual"),
    TrainConfig(network=dict(nf=32, ch_mult=(1, 2)), condition="clip"),
    TrainConfig(method="nafnet", network=dict(width=32, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1)), condition="both"),
    TrainConfig(method="nafnet", network=dict(width=32, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1)), condition="none")],
    ids=lambda c: f"{c.method}-{c.condition}")
def test_restorers_conditioned_on_daclip(config):
    "Built as they are trained; tiles of any number share the embeddings of the whole."
    model, image = build(config, DACLIP(make_clip("clip-miniature"))), picture(3, 100, 70)
    restorer = Restorer(model, "cpu", tile=64, overlap=16, batch=2)
    restored = restorer(image, steps=2)
    assert restored.shape == image.shape and restored.isfinite().all() and 0 <= restored.min() <= restored.max() <= 1
    if config.condition == "none": return
    with pytest.raises(ValueError, match="read it off"): restorer(image, degradation="hazy")
    if config.condition == "clip":
        assert restorer.degradation(image) is None
        return
    word, probability = restorer.degradation(image)
    p = model.classify(image[None])[0]
    assert word == DEGRADATIONS[p.argmax()] and probability == pytest.approx(p.max().item())
    assert restorer.degradation(image.mul(255).byte())[0] == word


def test_a_batch_is_its_images():
    model, images = Denoiser(Pixelwise(), IRSDE(T=20), "residual"), picture(2, 3, 40, 56)
    restorer = Restorer(model, "cpu", tile=32, overlap=16)
    both = restorer(images, seed=7, steps=2)
    assert torch.equal(both, torch.stack([restorer(o, seed=7 + i, steps=2) for i, o in enumerate(images)]))


def test_levels_in_levels_out():
    model, image = Denoiser(Pixelwise(), IRSDE(T=20), "residual"), picture(3, 40, 56).mul(255).round()
    restorer = Restorer(model, "cpu", tile=32, overlap=16)
    levels, floats = restorer(image.byte(), steps=2), restorer(image/255, steps=2)
    assert levels.dtype == torch.uint8 and torch.equal(levels, floats.mul(255).round().byte())


def test_tiled_is_near_untiled_with_the_packaged_weights():
    "Nearer than another seed; with seams neither at the edges of tiles."
    image = load_image(Path(__import__("skimage").__file__).parent/"data/coffee.png")[:, 100:292, 150:374]
    image = (image + .2*torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    options = dict(degradation="noisy", steps=2)
    whole = Restorer.from_weights("sampling-miniature", "cpu", tile=None)
    untiled = whole(image, **options)
    tiled = Restorer.from_weights("sampling-miniature", "cpu", tile=128, overlap=32)(image, **options)
    other = whole(image, seed=1, **options)
    def off(a): return (a - untiled).abs().mean()
    assert 0 < off(tiled) < .5*off(other)


MEMORY = """
import sys, torch
from torch import nn
from daclip_repro.restore import Restorer
class Costly(nn.Module):
    "Needs 100 MB for a tile, of any size."
    words, daclip = (), None
    def embed(self, lq, words=None): return lq.mean((2, 3))
    def sample(self, lq, method, steps, randn, context):
        noise, scratch = randn(lq), torch.ones(len(lq), 25_000_000)
        return lq + 0 * noise * scratch.sum()
def peak(): return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024
ready, restorer = peak(), Restorer(Costly(), 'cpu', tile=256, overlap=32)
peaks = [list(restorer.files([name], 'out')) and peak() for name in ('small.png', 'large.png')]
restorer(torch.zeros(3, 2048, 2048))
print(ready, *peaks, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_image(tmp_path):
    "Sixteen times the pixels: what the whole process takes, and what restoring adds to it."
    for name, side in dict(small=512, large=2048).items(): save_image(torch.full((3, side, side), .5), tmp_path/f"{name}.png")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    ready, small, large, tensor = map(float, done.stdout.split())
    assert load_image(tmp_path/"out/large.png").shape == (3, 2048, 2048)
    assert small - ready > 90, "the cost of a tile was not seen"
    assert large <= 1.5*small and tensor <= 1.5*small, done.stdout
    assert large - ready <= 1.5*(small - ready), done.stdout


@pytest.mark.parametrize("options,names", [
    (dict(tile=40), "tile"), (dict(tile=0), "tile"), (dict(tile=2.5), "tile"), (dict(overlap=-1), "overlap"),
    (dict(tile=64, overlap=48), "overlap"),
    (dict(batch=0), "batch"), (dict(precision="half"), "precision"), (dict(precision="bfloat16"), "bfloat16")])
def test_wrong_options_are_named(options, names):
    with pytest.raises(ValueError, match=names): Restorer(Recorder(), "cpu", **options)


@pytest.mark.parametrize("image", [torch.zeros(3, 4), torch.zeros(1, 8, 8), torch.zeros(3, 0, 8), torch.zeros(3, 8, 8).long()])
def test_wrong_images_are_refused(image):
    with pytest.raises(ValueError, match="lq"): Restorer(Recorder(), "cpu")(image, degradation="hazy")


def test_wrong_words_are_refused():
    restorer = Restorer.from_weights("sampling-miniature", "cpu")
    with pytest.raises(ValueError, match="rainy"): restorer(picture(3, 16, 16), steps=1)
    with pytest.raises(ValueError, match="foggy"): restorer(picture(3, 16, 16), degradation="foggy", steps=1)
    with pytest.raises(ValueError, match="take no word"):
        Restorer(Denoiser(Pixelwise(), IRSDE()), "cpu")(picture(3, 16, 16), degradation="hazy")
    with pytest.raises(ValueError, match="3 words"): restorer(picture(2, 3, 16, 16), degradation=["hazy"]*3, steps=1)


def test_no_memory_on_the_device_is_one_sentence():
    class Big(Recorder):
        def sample(self, *args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="smaller batch or tile"): Restorer(Big(), "cpu")(picture(3, 16, 16), degradation="hazy")


# --- the command

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working folder with photographs, some in a subfolder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DACLIP_TRACEBACK", raising=False)
    for i, name in enumerate(("a", "b", "sub/c")): save_image(picture(3, 24, 40, seed=i), f"photos/{name}.png")
    return tmp_path


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def restore(line, code=0):
    assert main(["restore", *line.split(), "--device", "cpu", "--steps", "1", "--degradation", "noisy"]) == code


def test_folder_keeps_names_and_subfolders_and_leaves_inputs_alone(here, capsys):
    before = tree("photos")
    restore("photos --out out")
    assert list(tree("out")) == ["a.png", "b.png", "sub/c.png"] and tree("photos") == before
    out, err = capsys.readouterr()
    assert err == "" and "photos/sub/c.png" in out and "noisy" in out and "3 restored" in out
    assert load_image("out/a.png").shape == (3, 24, 40)
    expected = Restorer.from_weights("sampling-miniature", "cpu")(load_image("photos/a.png"), degradation="noisy", steps=1)
    assert torch.equal(load_image("out/a.png"), expected.mul(255).round().div(255))


def test_second_call_keeps_what_is_there_and_other_settings_do_not_replace_it(here, capsys):
    restore("photos --out out")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path("out").rglob("*.png")}
    restore("photos --out out")
    assert "3 already there" in capsys.readouterr().out
    restore("photos --out out --seed 1", code=1)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3 and all("--overwrite" in line for line in err.splitlines())
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path("out").rglob("*.png")} == before
    restore("photos --out out --seed 1 --overwrite")
    assert all(p.read_bytes() != content for p, (_, content) in before.items())


def test_a_result_says_how_it_was_made(here):
    restore("photos/a.png --out out --seed 3")
    made = json.loads(how_made("out/a.png"))
    assert made["image"] == hashlib.sha256(Path("photos/a.png").read_bytes()).hexdigest()[:16]
    assert (made["seed"], made["steps"], made["degradation"], made["tile"]) == (3, 1, "noisy", 256)
    assert how_made("photos/a.png") is None and how_made(__file__) is None


def test_the_predicted_degradation_is_printed(here, capsys, monkeypatch):
    class Seeing(Recorder):
        words, daclip, condition = (), nn.Linear(1, 1), 'both'
        daclip.words = ("scratched", "faded")
        def classify(self, lq): return torch.tensor([[.45, .55]])
    monkeypatch.setattr("daclip_repro.restore.load_weights", lambda source, device="cpu": Seeing())
    assert main(["restore", "photos/a.png", "--out", "out", "--device", "cpu"]) == 0
    assert "photos/a.png -> out/a.png: faded (55.0 %)\n" in capsys.readouterr().out


def test_a_changed_photograph_is_not_taken_for_restored(here, capsys):
    restore("photos --out out")
    save_image(picture(3, 24, 40, seed=9), "photos/b.png")
    restore("photos --out out", code=1)
    out, err = capsys.readouterr()
    assert "out/b.png" in err and "2 already there" in out


def test_an_unreadable_file_fails_alone(here, capsys):
    Path("photos/b.png").write_bytes(Path("photos/b.png").read_bytes()[:200])
    restore("photos --out out", code=1)
    out, err = capsys.readouterr()
    assert list(tree("out")) == ["a.png", "sub/c.png"]
    assert len(err.splitlines()) == 1 and err.startswith("daclip: photos/b.png: ") and "1 failed" in out
    assert "Traceback" not in err and "Errno" not in err


def test_an_output_folder_among_the_inputs_is_not_read(here, capsys):
    for _ in range(2): restore("photos --out photos/restored")
    assert list(tree("photos/restored")) == ["a.png", "b.png", "sub/c.png"]
    assert "3 already there" in capsys.readouterr().out


def test_sixteen_bits_and_other_formats_are_read(here):
    import numpy as np
    Image.fromarray((picture(20, 30).numpy()*65535).astype(np.uint16)).save("deep.png")
    Image.fromarray((picture(20, 30, 3).numpy()*255).astype(np.uint8)).save("photo.JPG")
    restore("deep.png photo.JPG --out out")
    assert list(tree("out")) == ["deep.png", "photo.png"]


REFUSED = {
    "no input": ({}, "--out out", "INPUT"),
    "no --out": ({}, "photos", "--out"),
    "input missing": ({}, "photos/nothere.png --out out", "nothere.png"),
    "second input missing": ({}, "photos nothere --out out", "nothere"),
    "empty folder": ({"empty/readme.txt": "x"}, "empty --out out", "empty"),
    "out is a file": ({"out": "x"}, "photos --out out", "out"),
    "out is the input": ({}, "photos --out photos", "photos"),
    "out is where the input is": ({}, "photos/a.png --out photos", "photos/a.png"),
    "out is where an input is": ({}, "photos/a.png photos/sub/c.png --out photos/sub", "photos/sub/c.png"),
    "same name": ({}, "photos/a.png photos/../photos/a.png --out out", "out/a.png"),
    "same stem": ({"photos/a.jpg": "x"}, "photos --out out", "a.jpg"),
    "same name in two folders": ({"more/a.png": "x"}, "photos more --out out", "more/a.png"),
    "unknown weights": ({}, "photos --out out --weights nothere", "nothere"),
    "weights are no weights": ({"w.safetensors": "x"}, "photos --out out --weights w.safetensors", "w.safetensors"),
    "unknown word": ({}, "photos --out out --degradation foggy", "foggy"),
    "unknown method": ({}, "photos --out out --method magic", "magic"),
    "too many steps": ({}, "photos --out out --steps 1000", "steps"),
    "no steps": ({}, "photos --out out --steps 0", "--steps"),
    "odd tile": ({}, "photos --out out --tile 100", "tile"),
    "overlap too large": ({}, "photos --out out --tile 64 --overlap 64", "overlap"),
    "no such device": ({}, "photos --out out --device abacus", "abacus"),
    "negative seed": ({}, "photos --out out --seed -1", "--seed"),
    "bfloat16 on the CPU": ({}, "photos --out out --precision bfloat16 --device cpu", "bfloat16"),
}


@pytest.mark.parametrize("files,line,names", REFUSED.values(), ids=REFUSED)
def test_wrong_command_is_one_sentence_and_changes_nothing(files, line, names, here, capsys):
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(content)
    before = tree(".")
    assert main(["restore", *line.split(), *([] if "--degradation" in line else ["--degradation", "noisy"])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("daclip: ") and names in err, err
    assert "Traceback" not in err and "Errno" not in err
    assert tree(".") == before


def test_weights_that_must_be_told_say_so(here, capsys):
    assert main(["restore", "photos", "--out", "out", "--weights", "sampling-miniature"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--degradation" in err and "rainy" in err and not Path("out").exists()


def test_weights_follow_from_what_is_told(here, monkeypatch):
    asked = []
    monkeypatch.setattr("daclip_repro.restore.load_weights", lambda source, device="cpu": asked.append(source) or Recorder())
    for told in ([], ["--degradation", "noisy"], ["--weights", "mine"]):
        main(["restore", "photos/a.png", "--out", f"out{len(asked)}", "--device", "cpu", *told])
    assert asked == ["wild-miniature", "sampling-miniature", "mine"]


def test_real_command(here):
    line = [COMMAND, "restore", "photos/a.png", "photos/gone.png", "--out", "out", "--degradation", "hazy", "--steps", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "daclip: photos/gone.png: no such file or folder\n")
    Path("photos/gone.png").write_bytes(b"")
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "out/a.png" in done.stdout
    assert done.stderr == "daclip: photos/gone.png: is empty (0 bytes)\n" and os.listdir("out") == ["a.png"]
