"""Training a patched model: loss for loss with the reference, under checkpointing, and only what should train."""

import pytest
import torch

import apt_kernels
from helpers import models
from helpers.patched import randomise


def losses(family, implementation, steps=50, **settings):
    head = "AutoModelForSequenceClassification" if family == "bert" else None
    model = apt_kernels.patch(
        models.build(family, head), prefix_length=6, init_seed=0, implementation=implementation, **settings
    )
    model.double().train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    curve = []
    for step in range(steps):
        given = models.inputs(family, "right", batch=4, seed=step % 2)
        given["labels"] = given["input_ids"][:, 0] % 2 if head else given["input_ids"]
        if family == "t5":
            given["labels"] = given.pop("decoder_input_ids")
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fifty_steps_follow_the_reference_loss_for_loss(family):
    ours, reference = losses(family, "auto"), losses(family, "reference")
    assert ours[-1] < 0.9 * ours[0], "nothing was learned, the comparison proves little"
    # In float64, because float32 rounding grows along fifty AdamW steps to the size of a small mistake.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(reference), rtol=1e-6, atol=1e-6)


def gradients(model, given):
    model.zero_grad(set_to_none=True)
    model(**given).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.proves("gradient checkpointing, both kinds, switched on before or after the patch")
@pytest.mark.parametrize("before_patch", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradient_checkpointing_keeps_every_gradient(family, reentrant, before_patch):
    given, model = models.inputs(family, "right"), models.build(family).double()
    options = {"use_reentrant": reentrant}
    if before_patch:
        model.gradient_checkpointing_enable(options)
    apt_kernels.patch(model, prefix_length=4).double().train()
    randomise(model)
    if not before_patch:
        model.gradient_checkpointing_enable(options)
    checkpointed = gradients(model, given)
    model.gradient_checkpointing_disable()
    plain = gradients(model, given)
    assert all(grad.abs().max() > 0 for grad in plain.values())
    torch.testing.assert_close(checkpointed, plain)


def test_reentrant_checkpointing_of_input_embeddings():
    model = apt_kernels.patch(models.build("llama").double()).double().train()
    randomise(model)
    embeds = model.get_input_embeddings()(models.inputs("llama")["input_ids"]).detach()
    plain = gradients(model, {"inputs_embeds": embeds})
    model.gradient_checkpointing_enable({"use_reentrant": True})
    torch.testing.assert_close(gradients(model, {"inputs_embeds": embeds}), plain)
    assert not embeds.requires_grad


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dropout_is_drawn_from_torchs_generator(family):
    overrides = {"attention_probs_dropout_prob": 0.3} if family == "bert" else {"attn_pdrop": 0.3}
    model = apt_kernels.patch(models.build(family, **overrides)).train()
    given = models.inputs(family)

    def run(seed):
        torch.manual_seed(seed)
        return model(**given).logits

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    checkpointed = gradients(model, given)
    model.gradient_checkpointing_disable()
    torch.manual_seed(0)
    torch.testing.assert_close(checkpointed, gradients(model, given))


def test_the_first_layers_unneeded_gradients_are_not_computed(monkeypatch):
    from apt_kernels.ops import choose

    asked = []
    backend = choose.load("cpu")
    original = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *a: asked.append(list(a[-1])) or original(*a))
    model = apt_kernels.patch(models.build("llama")).train()
    model(**models.inputs("llama")).logits.sum().backward()
    assert asked[0][:3] == [True, True, True]
    assert asked[-1][:3] == [False, False, False]
    assert asked[-1][3:7] == [True, True, True, True]
