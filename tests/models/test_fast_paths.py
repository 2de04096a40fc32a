"""What makes a step fast must not change what it computes: each path beside the plain one, values and gradients."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mirl.methods import mirl
from mirl.models.attention import attend, choose_attention, fused
from mirl.models.autoencoder import build_autoencoder
from mirl.models.decoder import DecoderBlock, DecoderShape
from mirl.models.masking import split
from mirl.models.products import fast_products

CPU = torch.device("cpu")


def autoencoder(depth=6, segments=6, decoder_depth=1, context="dense"):
    torch.manual_seed(0)
    shape = DecoderShape(width=32, depth=decoder_depth, heads=2)
    method = mirl(depth, segments, context=context)
    return build_autoencoder(f"vit_32x2_{depth}", method, shape, image_size=(32, 32), patch_size=(4, 4), channels=3)


def passes(model, images=2):
    """Return the predictions of a forward pass, then the gradients of a backward pass through their squares."""
    torch.manual_seed(1)
    visible, masked = split(torch.rand(images, 64), 0.75)
    model.zero_grad()
    predictions = model(torch.randn(images, 64, 48), visible, masked)
    sum(prediction.float().square().mean() for prediction in predictions).backward()
    return [*(p.detach() for p in predictions), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_onednn_products_equal_those_of_pytorch():
    model = autoencoder()
    plain = passes(model)
    with fast_products(model, CPU):
        assert type(model.decoders[0].embed(torch.randn(2, 32)).grad_fn).__name__ == "_LinearBackward"
        fast = passes(model)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputed_blocks_keep_the_products_of_pytorch():
    model = autoencoder()
    plain = passes(model)
    model.set_checkpointing()
    with fast_products(model, CPU):
        assert all(torch.equal(a, b) for a, b in zip(passes(model), plain, strict=True))


def test_onednn_products_ask_for_no_gradient_that_nobody_needs():
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 3, 8)
    layer.weight.requires_grad_(False)
    with fast_products(layer, CPU):
        layer(x).square().sum().backward()
    bias = layer.bias.grad.clone()
    layer.bias.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(bias, layer.bias.grad)
    assert layer.weight.grad is None and x.grad is None


def test_half_precision_keeps_the_products_of_pytorch():
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    with fast_products(layer, CPU), torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert result.dtype == torch.bfloat16 and torch.equal(result, layer(x))


@pytest.mark.parametrize("all_patches", [False, True])
@pytest.mark.parametrize("did", [False, True])
def test_masked_patches_are_projected_once_for_all_images(did, all_patches):
    torch.manual_seed(0)
    block = DecoderBlock(16, 2, 16 if did else None).double()
    seen, hidden, memory = (torch.randn(*size, 16).double().requires_grad_() for size in ((3, 4), (9,), (3, 5)))
    masked = torch.rand(3, 9).argsort(dim=1)[:, :6]
    first_query = 1 if all_patches else 4

    def gradients(result):
        return torch.autograd.grad(result.square().sum(), [seen, hidden, *block.self_attention.parameters()])

    plain = block(torch.cat([seen, hidden[masked]], dim=1), memory, first_query)
    fast = block.begin(seen, hidden, masked, memory, first_query)
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)  # rows are looked up in float32
    for one, other in zip(gradients(fast), gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_of_one_position_add_up_in_float32():
    """In bf16 a sum stands still once it is 256 times what is added."""
    from mirl.models.decoder import look_up

    table = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    look_up(table, torch.zeros(1000, 1, dtype=torch.int64)).sum().backward()
    assert table.grad.tolist() == [[1000.0] * 4]


def test_attention_in_bf16_on_a_cpu_is_as_exact_as_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 50, 16)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), exact)
    half = [x.bfloat16() for x in (q, k, v)]
    assert not fused(CPU, torch.bfloat16)
    fused_error = (torch.nn.functional.scaled_dot_product_attention(*half).float() - exact).abs().mean()
    assert (attend(*half).float() - exact).abs().mean() < 1.5 * fused_error


def test_timm_blocks_use_the_kernel_that_decoders_use():
    model = autoencoder()
    for dtype, expected in ((torch.bfloat16, False), (torch.float32, True)):
        choose_attention(model, CPU, dtype)
        assert {block.attn.fused_attn for block in model.encoder.blocks} == {expected}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_computes_the_same_bits(precision):
    plain = autoencoder(decoder_depth=2)
    kept = copy.deepcopy(plain)
    kept.set_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        both = zip(passes(plain), passes(kept), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


def saved_bytes(depth, checkpointing):
    """Return the bytes that a forward pass of an encoder keeps, weights apart."""
    model = autoencoder(depth, 2)
    model.set_checkpointing(checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, alive = {}, []

    def save(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    visible, masked = split(torch.rand(2, 64), 0.75)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        predictions = model(torch.randn(2, 64, 48), visible, masked)
    assert len(predictions) == 2
    return sum(sizes.values())


def test_memory_with_checkpointing_grows_less_than_depth():
    plain, kept = ([saved_bytes(depth, on) for depth in (24, 48, 96)] for on in (False, True))
    assert all(on < off / 4 for off, on in zip(plain, kept, strict=True))
    assert (kept[2] - kept[1]) / (plain[2] - plain[1]) < 0.05


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's tracing
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_blocks_compute_the_same_and_are_compiled_once():
    plain = autoencoder(context="previous")  # memories of one length
    fast = copy.deepcopy(plain)
    fast.compile_repeated()
    torch._dynamo.reset()
    counters.clear()
    for one, other in zip(passes(plain), passes(fast), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # one for six blocks, one for six decoders
    assert fast.state_dict().keys() == plain.state_dict().keys()
