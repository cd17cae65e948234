"""Parameters that train beside the prefix on a half-precision base: float32 copies, cast when they are read."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import apt_kernels
from helpers import models
from helpers.patched import randomise
from helpers.training import trainer

HEAD = "AutoModelForSequenceClassification"
HALF = [torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("dtype", HALF, ids=str)


def base(dtype=torch.bfloat16, family="bert", head=HEAD, **options):
    return models.build(family, head, **options).to(dtype)


def patched(dtype=torch.bfloat16, **settings):
    return apt_kernels.patch(base(dtype), **{"prefix_length": 3, "init_seed": 0, **settings})


def inputs(family):
    given = models.inputs(family, "right")
    if family in models.SEQ2SEQ:  # the decoder gets the same tokens; its state at the end token is classified
        del given["decoder_input_ids"]
        ends = given["attention_mask"].sum(1, keepdim=True) - 1
        given["input_ids"].scatter_(1, ends, {"t5": 1, "bart": 2}[family])
    return given


def logits(model, family="bert"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def beside(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".apt." not in name}


def described(model):
    return {name: (id(p), p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def assert_as(model, before):
    now = described(model)
    assert now.keys() == before.keys()
    for name, (identity, dtype, trains, value) in now.items():
        assert (identity, dtype, trains) == before[name][:3], name
        assert torch.equal(value, before[name][3]), name


def step(model, rate=2e-5, **given):
    labels = torch.tensor([0, 1, 1])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model(**inputs("bert"), labels=labels).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("family", models.some(models.FAMILIES))
@both
def test_heads_are_float32_and_begin_as_the_base_bit_for_bit(family, dtype):
    plain = base(dtype, family)
    model = copy.deepcopy(plain)
    before = described(model)
    apt_kernels.patch(model, prefix_length=3)
    assert beside(model)
    assert all(parameter.dtype == torch.float32 for parameter in beside(model).values())
    with apt_kernels.disabled(model):
        assert torch.equal(logits(model, family), logits(plain, family))
    assert logits(model, family).dtype == dtype
    model(**inputs(family)).logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in beside(model).values())
    with torch.no_grad():
        for parameter in beside(model).values():
            parameter.add_(1)
    assert_as(apt_kernels.unpatch(model), before)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_small_steps_are_not_rounded_away():
    model = patched()
    before = model.classifier.weight.detach().clone()
    step(model)
    assert (model.classifier.weight != before).float().mean() > 0.99
    assert (model.classifier.weight.bfloat16() != before.bfloat16()).float().mean() < 0.9, "this step tells nothing"


def test_gradients_are_unscaled():
    model, scaler = patched(torch.float16).train(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**inputs("bert"), labels=torch.tensor([0, 1, 1])).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not any(torch.equal(p, before[name]) for name, p in beside(model).items())


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@both
def test_weights_that_are_tied_stay_tied(family, dtype):
    model = base(dtype, family, "AutoModelForCausalLM" if family == "gpt2" else "AutoModelForSeq2SeqLM")
    plain, before = copy.deepcopy(model), described(model)
    embedding = model.get_input_embeddings()
    name = next(name for name, p in model.named_parameters() if p is embedding.weight)
    apt_kernels.patch(model, prefix_length=3, trainable=[f"^{name}$"])
    assert model.get_output_embeddings().weight is embedding.weight is beside(model)[name]
    assert embedding.weight.dtype == torch.float32
    with apt_kernels.disabled(model):
        assert torch.equal(logits(model, family), logits(plain, family))
    model(**inputs(family)).logits.float().square().sum().backward()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    assert_as(apt_kernels.unpatch(model), before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("bert", r"bias$"),
        ("bert", "LayerNorm"),
        ("bert", "embeddings"),
        ("llama", "norm"),
        ("gpt2", ".*"),
        ("t5", ".*"),
    ],
)
def test_any_part_of_the_base_may_train(family, pattern):
    """Other parameters of the same module may be frozen, in half precision."""
    head = None if family in ("llama", "gpt2") else HEAD
    plain = base(family=family, head=head)
    model = copy.deepcopy(plain)
    before = described(model)
    apt_kernels.patch(model, prefix_length=3, trainable=[pattern])
    with apt_kernels.disabled(model):
        assert torch.equal(logits(model, family), logits(plain, family))
    model(**inputs(family)).logits.float().square().sum().backward()
    assert all(p.dtype == torch.float32 for p in beside(model).values())
    found = [p.grad is not None and p.grad.dtype == torch.float32 for p in beside(model).values()]
    assert sum(found) > 0.8 * len(found)
    assert_as(apt_kernels.unpatch(model), before)


def test_a_parameter_of_the_model_itself():
    """Wav2Vec2's weights of the sum of layers belong to the module that also contains the base model."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, use_weighted_layer_sum=True, classifier_proj_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval().bfloat16()
    given = {"input_values": torch.randn(2, 800).bfloat16()}
    expected, before = model(**given).logits, described(model)
    apt_kernels.patch(model, prefix_length=3)
    assert {"layer_weights", "projector.weight", "classifier.bias"} <= set(beside(model))
    with apt_kernels.disabled(model):
        assert torch.equal(model(**given).logits, expected)
    model(**given).logits.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in beside(model).values())
    assert_as(apt_kernels.unpatch(model), before)


@both
def test_saved_in_float32_and_loaded_exactly(dtype, tmp_path):
    model = patched(dtype)
    randomise(model)
    with torch.no_grad():
        model.classifier.weight.add_(1e-6)
    apt_kernels.save(model, tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert saved["classifier.weight"].dtype == torch.float32
    assert torch.equal(saved["classifier.weight"], model.classifier.weight)
    plain = base(dtype)
    before = described(plain)
    again = apt_kernels.load(plain, tmp_path)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert torch.equal(logits(again), logits(model))
    assert_as(apt_kernels.unpatch(again), before)


def test_adapters_have_heads_of_their_own():
    model = base()
    before, plain = described(model), logits(model)
    apt_kernels.patch(model, prefix_length=3, init_seed=0)
    step(model, rate=1e-2)
    first, head = logits(model), model.classifier.weight.detach().clone()
    apt_kernels.add_adapter(model, "b", prefix_length=2, trainable=["pooler"])
    assert model.bert.pooler.dense.weight.dtype == torch.float32
    with apt_kernels.disabled(model):
        assert torch.equal(logits(model), plain)
    step(model, rate=1e-2)
    second = logits(model)
    apt_kernels.set_adapter(model, "default")
    assert torch.equal(model.classifier.weight, head)
    assert torch.equal(logits(model), first)
    apt_kernels.set_adapter(model, "b")
    assert torch.equal(logits(model), second)
    apt_kernels.delete_adapter(model, "default")
    assert_as(apt_kernels.unpatch(model), before)


@pytest.mark.parametrize("cast", ["float", "double", "half", "bfloat16"])
def test_the_copies_follow_a_cast_of_the_model(cast):
    model, plain = getattr(patched(), cast)(), getattr(base(), cast)()
    assert len({p.dtype for p in model.parameters()}) == 1
    with apt_kernels.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    apt_kernels.unpatch(model)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters()):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def test_copies_and_pickles_are_whole():
    model = patched()
    step(model, rate=1e-2)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        nn.init.zeros_(other.classifier.weight)
        apt_kernels.unpatch(other)
        assert other.classifier.weight.dtype == torch.bfloat16
        assert torch.equal(other.classifier.weight, base().classifier.weight)
    assert torch.equal(logits(model), expected)


def test_outside_of_a_forward_it_is_an_ordinary_parameter():
    model = patched()
    assert type(model.classifier.weight) is nn.Parameter
    nn.init.ones_(model.classifier.weight)
    assert model.classifier.weight.eq(1).all()
    stop = threading.Event()
    seen = []

    def look():
        while not stop.is_set():
            seen.append(model.classifier.weight.dtype)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        logits(model)
    stop.set()
    thread.join()
    assert set(seen) == {torch.float32}


def test_an_error_within_the_forward_leaves_nothing_behind():
    model = patched()

    def fail(*_):
        raise KeyboardInterrupt

    model.classifier.forward = fail
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    del model.classifier.forward
    with pytest.raises(RuntimeError):
        model.classifier(torch.zeros(1, 5, dtype=torch.bfloat16))
    assert model.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_under_autocast(dtype, autocast):
    """Llama has no LayerNorm, which on the CPU fails in one half-precision dtype under autocast to the other."""
    model = apt_kernels.patch(base(dtype, "llama"), prefix_length=3)
    randomise(model)
    exact = copy.deepcopy(model).float()
    with torch.autocast("cpu", autocast):
        out = model(**inputs("llama"))
    out.logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    expected = logits(exact, "llama")
    assert (out.logits - expected).norm() < 0.05 * expected.norm()  # two layers in bfloat16


def test_replicas_of_data_parallel():
    model = patched()
    step(model, rate=1e-2)
    expected = logits(model)
    replicas = [module for module in _replicas(model, 2)]
    for replica in replicas:
        assert torch.equal(logits(replica), expected)
    replicas[0](**inputs("bert")).logits.float().square().sum().backward()
    assert model.classifier.weight.grad.dtype == torch.float32


def _replicas(model, count):
    """Replicas as nn.DataParallel creates them, on one device."""
    for _ in range(count):
        made = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in made.items():
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else made[child]
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer
        yield made[model]


def test_compiles_in_one_graph():
    model = patched()
    step(model, rate=1e-2)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)
    compiled(**inputs("bert")).logits.float().square().sum().backward()
    assert model.classifier.weight.grad.dtype == torch.float32


def test_a_recurrent_layer_is_named():
    model = base()
    model.classifier = nn.LSTM(32, 4).bfloat16()
    with pytest.warns(UserWarning, match="LSTM trains in torch.bfloat16"):
        apt_kernels.patch(model, prefix_length=3)
    assert model.classifier.weight_ih_l0.dtype == torch.bfloat16
    apt_kernels.unpatch(model)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_models(offload, tmp_path):
    """Offloaded before the patch, trained parameters stay on the device; after it, the hooks store the copies."""
    accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")

    def offloaded(model, name):
        given = (str(tmp_path / name),) if offload == "disk_offload" else ()
        return getattr(accelerate, offload)(model, *given, execution_device=torch.device("cpu"))

    plain, expected = patched(), logits(base())
    model = apt_kernels.patch(offloaded(base(), "before"), prefix_length=3, init_seed=0)
    for each in (plain, model):
        step(each, rate=1e-2)
    assert model.classifier.weight.dtype == torch.float32
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    assert torch.equal(logits(model), logits(plain))
    apt_kernels.save(model, tmp_path / "a")
    assert torch.equal(logits(apt_kernels.load(base(), tmp_path / "a")), logits(plain))
    assert torch.equal(logits(apt_kernels.unpatch(model)), expected)
    assert model.classifier.weight.device.type == "meta"

    model = offloaded(copy.deepcopy(plain), "after")
    for _ in range(2):
        assert torch.equal(logits(model), logits(plain))
    apt_kernels.save(model, tmp_path / "b")
    saved = load_file(tmp_path / "b" / "adapter.safetensors")
    assert torch.equal(saved["classifier.weight"], plain.classifier.weight)
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    apt_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), logits(plain))
    apt_kernels.unpatch(model)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert model.classifier.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_modules_that_peft_saves(first, tmp_path):
    """The copy that PEFT makes of a head trains in float32 as well; `unpatch` keeps what it learned."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)

    def wrapped():
        torch.manual_seed(0)
        model = base()
        if first == "patch":
            apt_kernels.patch(model, prefix_length=3, init_seed=0)
        model = peft.get_peft_model(model, config)
        return model if first == "patch" else apt_kernels.patch(model, prefix_length=3, init_seed=0)

    model = wrapped()
    model(**inputs("bert"), labels=torch.tensor([0, 1, 1])).loss.backward()
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.grad is not None
    assert head.weight.dtype == torch.float32
    with torch.no_grad():
        head.weight.add_(0.01)
    randomise(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-2, atol=1e-2)  # PEFT chooses its copy's dtype
    learned = head.weight.detach().clone()
    apt_kernels.unpatch(model)
    assert torch.equal(head.weight.float(), learned if first == "patch" else learned.bfloat16().float())
    assert head.weight.requires_grad
    original = model.base_model.model.classifier.original_module
    assert original.weight.dtype == torch.bfloat16
    assert torch.equal(original.weight, base().classifier.weight)
    logits(model)


def test_a_head_that_peft_copied_takes_small_steps_also_from_later_adapters():
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = apt_kernels.patch(peft.get_peft_model(base(), config), prefix_length=3)
    expected = logits(model)
    model.add_adapter("b", config)
    assert torch.equal(logits(model), expected)
    heads = model.base_model.model.classifier.modules_to_save
    assert {p.dtype for p in heads.parameters()} == {torch.float32}
    for name in ("default", "b"):
        model.base_model.set_adapter(name)
        before, weight = heads[name].weight.detach().clone(), heads[name].weight
        assert weight.requires_grad
        optimizer = torch.optim.AdamW([weight], lr=2e-5)
        model(**inputs("bert"), labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        assert (weight != before).float().mean() > 0.9


def test_trainer_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("accelerate", reason="the package accelerate is not installed")

    def fresh(seed):
        torch.manual_seed(0)
        return apt_kernels.patch(base(), prefix_length=3, init_seed=seed)

    whole, expected = trainer(fresh(0), tmp_path / "whole", "bert", learning_rate=2e-5)
    start = {name: p.detach().clone() for name, p in beside(whole.model).items()}
    whole.train()
    for name, parameter in beside(whole.model).items():
        assert parameter.dtype == torch.float32
        assert (parameter != start[name]).float().mean() > 0.9
    again, found = trainer(fresh(9), tmp_path / "again", "bert", learning_rate=2e-5)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert found.by_step == {step: expected.by_step[step] for step in (4, 5, 6)}
    for name, parameter in beside(again.model).items():
        assert torch.equal(parameter, beside(whole.model)[name]), name
