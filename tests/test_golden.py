"""The golden data themselves: nothing of them may vanish without a word."""
import pytest
from golden_data import GOLDEN, KEPT, describe, names, recorded, shapes

# unet_daclip_noimage is too large to keep: its middle is that of irsde_unet, its prompt that of unet_daclip_image
SETS = {'irsde', 'denoising_sde', 'irsde_unet', 'unet_daclip_image', 'unet_wild', 'metrics', 'nafnet',
        'daclip', 'daclip_initial_controller'}
SHAPES = {'irsde_unet_deraining_train', 'unet_universal_ir_train', 'unet_wild_ir_train', 'nafnet_refusion_deraining_train',
          'daclip_ViT-B-32', 'daclip_ViT-L-14'}


@pytest.mark.skipif(GOLDEN.resolve() != KEPT.resolve(), reason='GOLDEN_DIR is another folder, which may hold other sets')
def test_what_is_kept_here_is_here():
    assert SETS <= set(names()) and SHAPES <= set(shapes('*'))
    assert sum(p.stat().st_size for p in KEPT.rglob('*')) < 15e6


@pytest.mark.parametrize('name', names())
def test_description_and_tensors_belong_together(name):
    assert {k: list(v.shape) for k, v in recorded(name).items()} == {k: v['shape'] for k, v in describe(name)['tensors'].items()}
