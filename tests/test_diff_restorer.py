"""Diff-Restorer's prompts and control: what starts as nothing, what learns when, and what full size is."""
import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from daclip_repro.controller import load_daclip
from daclip_repro.degradations import DEGRADATIONS
from daclip_repro.diff_restorer.control import SD15_UNET, FiLM, ImageControl
from daclip_repro.diff_restorer.prompts import Embeddings, PromptProcessor, image_embeddings, mlp
from daclip_repro.prior import UNET

TINY = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
MINIATURE = dict(UNET, cross_attention_dim=96)


def prior(config=TINY, seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).requires_grad_(False).eval()


def shown(config=TINY, batch=2, side=8, emb_dim=16, seed=1, dtype=torch.float32):
    "z, t, tokens, z_lq, P_D"
    rng = torch.Generator().manual_seed(seed)
    def randn(*shape): return torch.randn(*shape, generator=rng).to(dtype)
    z, z_lq = randn(2, batch, 4, side, side)
    return z, torch.randint(1000, (batch,), generator=rng), randn(batch, 3, config['cross_attention_dim']), z_lq, randn(batch, emb_dim)


def loud(control, std=.1):
    torch.manual_seed(2)
    zero = [p for p in control.parameters() if not p.any()]
    for p in zero: torch.nn.init.normal_(p, std=std)
    return control


def controlled(unet, control, z, t, tokens, z_lq, told): return unet(z, t, tokens, **control(z, t, tokens, z_lq, told)).sample


# prompts

def embeddings(batch=4, dim=12, seed=3): return Embeddings(*torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(seed)))


def test_a_norm_and_leaky_relu_stand_behind_every_layer_but_the_last():
    assert [type(layer).__name__ for layer in mlp(5, 7, 3)] == ['Linear', 'LayerNorm', 'LeakyReLU', 'Linear']
    processor = PromptProcessor(12, 24, width=16)
    def linear(part): return [(m.in_features, m.out_features) for m in part.modules() if isinstance(m, torch.nn.Linear)]
    assert linear(processor.semantic) == [(12, 16), (16, 16), (16, 8 * 24)]
    assert linear(processor.degradation) == [(12, 16), (16, 12)] and linear(processor.head) == [(12, 12), (12, 10)]


def test_tokens_come_from_the_content_and_the_rest_from_the_degradation():
    processor, e = PromptProcessor(12, 24, tokens=3, words=('hazy', 'noisy')), embeddings()
    before, other = processor(e), processor(Embeddings(e.content, -e.degradation))
    assert [tuple(p.shape) for p in before] == [(4, 3, 24), (4, 12), (4, 2)]
    assert torch.equal(before.tokens, other.tokens)
    assert not torch.equal(before.degradation, other.degradation) and not torch.equal(before.logits, other.logits)
    turned = processor(Embeddings(-e.content, e.degradation))
    assert not torch.equal(before.tokens, turned.tokens) and torch.equal(before.degradation, turned.degradation)


def test_the_guidance_loss_is_the_cross_entropy_in_the_order_of_its_words():
    processor = PromptProcessor(12, 24, words=('noisy', 'hazy'))
    prompts = processor(embeddings(batch=2))
    expected = -(prompts.logits.log_softmax(1)[0, 1] + prompts.logits.log_softmax(1)[1, 0]) / 2
    torch.testing.assert_close(processor.guidance_loss(prompts, ['hazy', 'noisy']), expected)
    with pytest.raises(ValueError, match="degradation 'snowy' is unknown to the head: expected one of noisy, hazy"):
        processor.guidance_loss(prompts, ['hazy', 'snowy'])


def test_the_embedding_is_clips_alone_or_both_of_daclips():
    daclip, lq = load_daclip(), torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    plain, both = image_embeddings(daclip, lq), image_embeddings(daclip, lq, 'daclip')
    with torch.no_grad(): assert torch.equal(plain.content, daclip.clip.encode_image(daclip.prepare(lq)))
    assert torch.equal(plain.degradation, plain.content) and not any(e.requires_grad for e in (*plain, *both))
    assert all(torch.equal(a, b) for a, b in zip(both, daclip.embed(lq)))
    with pytest.raises(ValueError, match="embedding 'text' is unknown: expected one of clip, daclip"): image_embeddings(daclip, lq, 'text')


def test_both_losses_together_reach_every_parameter_of_the_processor_and_none_that_is_frozen():
    daclip, unet, processor = load_daclip(), prior(), PromptProcessor(128, 24)
    z, t, _, z_lq, _ = shown(batch=10)
    control = ImageControl(unet, 128)
    prompts = processor(image_embeddings(daclip, torch.rand(10, 3, 64, 64), 'daclip'))
    noise = (controlled(unet, control, z, t, prompts.tokens, z_lq, prompts.degradation) - z).square().mean()
    (noise + .1 * processor.guidance_loss(prompts, DEGRADATIONS)).backward()
    assert [n for n, p in processor.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [n for m in (daclip, unet) for n, p in m.named_parameters() if p.grad is not None] == []


# control: nothing at first

@pytest.mark.parametrize('config', [TINY, MINIATURE], ids=['tiny', 'miniature'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_an_untrained_control_leaves_the_prior_alone_to_the_last_bit(config, dtype):
    unet = prior(config).to(dtype)
    z, t, tokens, z_lq, told = shown(config, dtype=dtype)
    control = ImageControl(unet, 16).to(dtype)
    plain = unet(z, t, tokens).sample
    assert torch.equal(controlled(unet, control, z, t, tokens, 100 * z_lq, 100 * told), plain)
    assert not torch.equal(controlled(unet, loud(control), z, t, tokens, z_lq, told), plain)


def test_the_copy_is_the_priors_way_down_in_memory_of_its_own():
    unet, control = prior(), ImageControl(prior(), 16)
    theirs, own = unet.state_dict(), control.net.state_dict()
    shared = [k for k in own if k in theirs]
    assert {k.split('.')[0] for k in shared} == {'conv_in', 'time_embedding', 'down_blocks', 'mid_block'}
    assert all(torch.equal(own[k], theirs[k]) for k in shared)
    assert not own['controlnet_cond_embedding.weight'].any() and not own['controlnet_cond_embedding.bias'].any()
    with torch.no_grad(): [p.zero_() for p in control.net.parameters()]
    assert all(torch.equal(v, theirs[k]) for k, v in unet.state_dict().items())


@torch.no_grad()
def test_without_modulation_it_is_diffusers_own_controlnet():
    control = loud(ImageControl(prior(), None))
    z, t, tokens, z_lq, _ = shown()
    own, theirs = control(z, t, tokens, z_lq), control.net(z, t, tokens, z_lq)
    assert all(torch.equal(a, b) for a, b in zip(own['down_block_additional_residuals'], theirs.down_block_res_samples))
    assert len(own['down_block_additional_residuals']) == len(theirs.down_block_res_samples)
    assert torch.equal(own['mid_block_additional_residual'], theirs.mid_block_res_sample)


@torch.no_grad()
def test_the_degradation_acts_on_every_level_and_on_its_own_image_only():
    control = loud(ImageControl(prior(), 16))
    z, t, tokens, z_lq, told = shown()
    def maps(told):
        out = control(z, t, tokens, z_lq, told)
        return [*out['down_block_additional_residuals'], out['mid_block_additional_residual']]
    other = told.clone()
    other[1] *= -1
    for i, (a, b) in enumerate(zip(maps(told), maps(other))):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) == (i == 0)  # map 0 is behind the first convolution


def test_film_is_the_identity_and_then_the_formula():
    film, x, told = FiLM(5, 7), torch.randn(2, 7, 3, 4), torch.randn(2, 5)
    assert torch.equal(film(x, told), x)
    torch.nn.init.normal_(film.modulation.weight)
    scale, shift = (film.modulation.weight @ told[1]).chunk(2)
    torch.testing.assert_close(film(x, told)[1, 4], x[1, 4] * (1 + scale[4]) + shift[4])


@torch.no_grad()
def test_one_time_for_all_may_be_a_number():
    control = loud(ImageControl(prior(), 16))
    z, _, tokens, z_lq, told = shown()
    a, b = (control(z, t, tokens, z_lq, told)['mid_block_additional_residual'] for t in (7, torch.tensor([7, 7])))
    assert torch.equal(a, b)


@pytest.mark.parametrize('change, message', [
    (dict(z_lq=torch.zeros(1, 4, 8, 8)), 'z_lq is 1×4×8×8: expected the shape of z, 2×4×8×8'),
    (dict(degradation=None), 'degradation is None: expected 2×16'),
    (dict(degradation=torch.zeros(1, 16)), 'degradation is 1×16: expected 2×16'),
])
def test_what_does_not_belong_together_is_refused(change, message):
    z, t, tokens, z_lq, told = shown()
    with pytest.raises(ValueError, match=message): ImageControl(prior(), 16)(z, t, tokens, **dict(z_lq=z_lq, degradation=told) | change)


# control: what learns when

def step(unet, control, told, target, optimizer):
    "Names of the parameters that a gradient reaches."
    optimizer.zero_grad()
    z, t, tokens, z_lq, _ = shown()
    (controlled(unet, control, z, t, tokens, z_lq, told) - target).square().mean().backward()
    reached = {n for n, p in control.named_parameters() if p.grad.any()}
    optimizer.step()
    return reached


def test_gradients_reach_the_links_first_then_every_parameter_and_never_the_prior():
    unet, told = prior(), shown()[-1].requires_grad_()
    before, control, target = copy.deepcopy(unet.state_dict()), ImageControl(unet, 16), torch.ones(2, 4, 8, 8)
    optimizer, names = torch.optim.AdamW(control.parameters(), 1e-3), {n for n, _ in control.named_parameters()}
    links = {n for n in names if n.startswith(('net.controlnet_down_blocks', 'net.controlnet_mid_block'))}
    assert step(unet, control, told, target, optimizer) == links
    assert step(unet, control, told, target, optimizer) == names
    assert not told.grad.any()  # nothing had gone through the modulations yet
    assert step(unet, control, told, target, optimizer) == names
    assert told.grad.any()
    assert all(p.grad is None for p in unet.parameters())
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_gradient_checkpointing_changes_no_gradient():
    z, t, tokens, z_lq, told = shown()
    found = []
    for checkpointing in (False, True):
        unet = prior()
        control = loud(ImageControl(unet, 16)).train()
        if checkpointing: control.net.enable_gradient_checkpointing()
        controlled(unet, control, z, t, tokens, z_lq, told).square().mean().backward()
        found.append({n: p.grad for n, p in control.named_parameters()})
    for n, g in found[0].items(): torch.testing.assert_close(found[1][n], g, msg=n)


# control: full size. The slow one of this file: 20 seconds on one core, 4 GB

def test_full_size_on_stable_diffusion_runs_once_on_the_cpu():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device('meta'): unet = UNet2DConditionModel(**SD15_UNET)
        unet.to_empty(device='cpu').eval().requires_grad_(False)
        torch.manual_seed(0)
        for p in unet.parameters(): torch.nn.init.uniform_(p, -.03, .03)
        control = ImageControl(unet, 768).eval()
    finally: torch.set_default_dtype(before)
    assert sum(p.numel() for p in control.parameters()) == 367_586_880
    sizes = dict(config=SD15_UNET, batch=1, emb_dim=768, dtype=torch.bfloat16)
    with torch.inference_mode():
        small = shown(side=8, **sizes)
        assert torch.equal(controlled(unet, control, *small), unet(*small[:3]).sample)
        torch.nn.init.constant_(control.net.controlnet_mid_block.bias, .1)
        noise = controlled(unet, control, *shown(side=64, **sizes))
    assert noise.shape == (1, 4, 64, 64) and noise.isfinite().all() and noise.std() > 0
