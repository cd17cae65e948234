"""Every call of a patched model is independent of every other: threads, replicas, nesting, exceptions, interrupts."""

import asyncio
import contextlib
import copy
import gc
import inspect
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn

import apt_kernels
from apt_kernels.hf import calls
from helpers import models
from helpers.patched import randomise


def tuned(family="llama", **settings):
    model = apt_kernels.patch(models.build(family), **{"prefix_length": 3, "init_seed": 0, **settings})
    randomise(model)
    return model


def packed(seed=0):
    """A row of two documents, separated by their positions."""
    ids = models.inputs("llama", batch=1, length=12, seed=seed)["input_ids"]
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None], "use_cache": False}


def plain(seed=0, **options):
    return {"input_ids": models.inputs("llama", batch=1, length=12, seed=seed, **options)["input_ids"]}


def nothing_is_left():
    local = calls.local
    return local.call is None and local.documents is None and not local.disabled and local.observe is None


@torch.no_grad()
@pytest.mark.parametrize("gate", ["token", "first", "static", "none"])
def test_eight_threads_call_one_model(gate):
    model = tuned(gate=gate)
    given = [packed(seed) if seed % 2 else plain(seed) for seed in range(10)]
    alone = [model(**each).logits for each in given]
    with apt_kernels.disabled(model):
        bare = [model(**each).logits for each in given]
    assert not any(torch.equal(a, b) for a, b in zip(alone, bare))

    def call(number):
        which = number % len(given)
        if number % 7 == 0:
            with apt_kernels.disabled(model):
                return torch.equal(model(**given[which]).logits, bare[which])
        return torch.equal(model(**given[which]).logits, alone[which])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(250)))
    assert nothing_is_left()


@torch.no_grad()
def test_threads_generate_while_others_are_disabled_or_probe():
    model, given = tuned(gate="first"), models.inputs("llama", "left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(**given, **options)
    with apt_kernels.disabled(model):
        bare = model.generate(**given, **options)
    assert not torch.equal(expected, bare)
    probed = apt_kernels.probe(model, [given]).to_json()

    def without(_):
        with apt_kernels.disabled(model):
            return torch.equal(model.generate(**given, **options), bare)

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(without, 0) for _ in range(6)]
        found += [pool.submit(lambda: torch.equal(model.generate(**given, **options), expected)) for _ in range(6)]
        found += [pool.submit(lambda: apt_kernels.probe(model, [given]).to_json() == probed) for _ in range(3)]
        assert all(each.result() for each in found)


def test_probes_that_overlap_leave_mode_and_compiler_as_they_were():
    model, given = tuned().train(), plain()
    second_began = threading.Event()

    def first_batches():
        yield given
        second_began.wait(0.5)  # times out where the second call begins after this one

    def second_batches():
        second_began.set()
        yield given
        time.sleep(0.5)  # the first call ends meanwhile

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(apt_kernels.probe, model, first_batches())
        time.sleep(0.1)
        second = pool.submit(apt_kernels.probe, model, second_batches())
        assert first.result().to_json() == second.result().to_json()
    assert all(module.training for module in model.modules())
    assert torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")()


def replicas(model, count):
    """As `torch.nn.parallel.replicate` makes them, on one device."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    made = [[module._replicate_for_data_parallel() for module in modules] for _ in range(count)]
    for copies in made:
        for i, module in enumerate(modules):
            for name, child in module._modules.items():
                if child is None:
                    copies[i]._modules[name] = None
                else:
                    setattr(copies[i], name, copies[index[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    copies[i]._parameters[name] = None
                else:
                    setattr(copies[i], name, parameter.detach().clone())
            for name, buffer in module._buffers.items():
                copies[i]._buffers[name] = buffer
    return [copies[0] for copies in made]


@torch.no_grad()
@pytest.mark.parametrize("off", [False, True], ids=["prefix", "disabled"])
@pytest.mark.parametrize("family", ["llama", "bert", "bloom"])
def test_replicas_of_data_parallel(family, off):
    if family == "bloom":
        torch.manual_seed(0)
        config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
        model = apt_kernels.patch(transformers.BloomForCausalLM(config).eval(), prefix_length=3)
        randomise(model)
    else:
        model = tuned(family, gate="first")
    given = [models.inputs("llama", batch=1, seed=seed) for seed in range(4)]
    if family == "llama":
        given[1], given[3] = packed(1), packed(3)
    with apt_kernels.disabled(model) if off else contextlib.nullcontext():
        expected = [model(**each).logits for each in given]
        for _ in range(5):
            made = replicas(model, len(given))
            # In new threads, as `parallel_apply` starts them, with the state of the thread that began the forward.
            with ThreadPoolExecutor(len(given)) as pool:
                found = list(pool.map(lambda pair: pair[0](**pair[1]).logits, zip(made, given)))
            assert all(map(torch.equal, found, expected))
    assert nothing_is_left()


class Stop(BaseException):
    """Neither an Exception nor one that pytest treats."""


# The user's hook that raises: its module, and its kind.
POINTS = {
    "before the model": ("", "pre"),
    "before the body": ("model", "pre"),
    "before a layer": ("model.layers.0", "pre"),
    "before attention": ("model.layers.1.self_attn", "pre"),
    "inside attention": ("model.layers.1.self_attn.q_proj", "post"),
    "behind the op": ("model.layers.1.self_attn.o_proj", "pre"),
    "in the prefix": ("model.layers.1.self_attn.apt", "pre"),
    "after attention": ("model.layers.1.self_attn", "post"),
    "after a layer": ("model.layers.1", "post"),
    "after the body": ("model", "post"),
    "after the model": ("", "post"),
}


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, Stop])
@pytest.mark.parametrize("point", POINTS)
def test_the_next_call_is_right_after_an_interrupt(point, error):
    model, other = tuned(gate="first"), tuned("mistral", gate="first")
    expected, elsewhere = model(**plain()).logits, other(**plain()).logits
    name, kind = POINTS[point]
    held = []

    def interrupt(module, args, *output):
        held.extend(weakref.ref(part) for part in (*args, *output) if isinstance(part, torch.Tensor))
        raise error

    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(interrupt) if kind == "pre" else module.register_forward_hook(interrupt)
    for given in (packed(), {**plain(), "use_cache": True}):
        with pytest.raises(error):
            model(**given)
        with apt_kernels.disabled(model):
            if ".apt" in name:
                model(**given)  # no prefix is called
            else:
                with pytest.raises(error):
                    model(**given)
        assert nothing_is_left()
    handle.remove()
    gc.collect()
    assert not any(ref() is not None for ref in held)
    assert torch.equal(model(**plain()).logits, expected)
    assert torch.equal(other(**plain()).logits, elsewhere)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_nothing_stays_alive_after_running_out_of_memory(family, error, monkeypatch):
    """The op itself raises: hidden states and caches of the failed forward are freed."""
    from apt_kernels.hf.attention import function, inline

    if family == "bloom":
        torch.manual_seed(0)
        config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
        model = apt_kernels.patch(transformers.BloomForCausalLM(config).eval(), gate="first")
    else:
        model = tuned(family, gate="first")
    randomise(model)
    expected, alive = model(**plain()).logits, []
    cache = transformers.DynamicCache(config=model.config)
    alive.append(weakref.ref(cache))

    def fail(query, *args, **kwargs):
        alive.append(weakref.ref(query))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(inline if family == "bloom" else function, "attention", fail)
        site = next(iter(apt_kernels.prefixes(model)))

        def note(module, args, kwargs):
            alive.append(weakref.ref(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

        keep = model.get_submodule(site).register_forward_pre_hook(note, with_kwargs=True)
        with pytest.raises(error):
            model(**plain(), past_key_values=cache)
        keep.remove()
    assert len(alive) == 3
    del cache
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert torch.equal(model(**plain()).logits, expected)


@torch.no_grad()
def test_nested_and_recursive_calls():
    model, other = tuned(gate="first"), tuned("mistral", gate="token")
    expected, elsewhere, several = model(**plain()).logits, other(**plain(3)).logits, model(**packed()).logits
    with apt_kernels.disabled(model):
        bare = model(**plain()).logits
    found = []

    def call_again(module, args, kwargs):
        if found:
            return
        found.append(None)  # once
        found.append(torch.equal(model(**plain()).logits, expected))
        found.append(torch.equal(model(**packed()).logits, several))
        found.append(torch.equal(other(**plain(3)).logits, elsewhere))
        with apt_kernels.disabled(model):
            found.append(torch.equal(model(**plain()).logits, bare))
            found.append(torch.equal(other(**plain(3)).logits, elsewhere))
        if module is not model:
            found.append(torch.equal(model.model(**plain()).last_hidden_state, body))

    body = model.model(**plain()).last_hidden_state
    for name in ("", "model", "model.layers.0.self_attn", "model.layers.1.self_attn.v_proj"):
        found.clear()
        handle = model.get_submodule(name).register_forward_pre_hook(call_again, with_kwargs=True)
        assert torch.equal(model(**packed()).logits, several)
        handle.remove()
        assert len(found) == 6 + bool(name)
        assert all(found[1:]), (name, found)


@torch.no_grad()
def test_asyncio_tasks_on_one_thread_are_kept_apart():
    model = tuned()
    expected = model(**plain()).logits
    with apt_kernels.disabled(model):
        bare = model(**plain()).logits

    async def without():
        with apt_kernels.disabled(model):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(model(**plain()).logits, bare)
            child = asyncio.create_task(inside())
            await child

    async def inside():
        await asyncio.sleep(0)
        assert torch.equal(model(**plain()).logits, bare)

    async def with_prefix():
        for _ in range(8):
            await asyncio.sleep(0)
            assert torch.equal(model(**plain()).logits, expected)

    async def main():
        await asyncio.gather(without(), with_prefix(), without(), with_prefix())

    asyncio.run(main())
    with apt_kernels.disabled(model):  # entered before there are tasks: it holds for all of them
        asyncio.run(inside())
    assert nothing_is_left()


@torch.no_grad()
def test_disabled_that_another_thread_leaves_is_left():
    model = tuned()
    expected = model(**plain()).logits
    context = apt_kernels.disabled(model)
    context.__enter__()
    assert not torch.equal(model(**plain()).logits, expected)
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert torch.equal(model(**plain()).logits, expected)


@torch.no_grad()
def test_a_copy_made_inside_disabled_has_its_prefix():
    model = tuned()
    expected = model(**plain()).logits
    with apt_kernels.disabled(model):
        bare = model(**plain()).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**plain()).logits, expected)
        with apt_kernels.disabled(twin):
            assert torch.equal(twin(**plain()).logits, bare)
        assert torch.equal(twin(**plain()).logits, expected)
        assert torch.equal(model(**plain()).logits, bare)
    assert torch.equal(twin(**plain()).logits, expected)
    assert torch.equal(model(**plain()).logits, expected)


@pytest.mark.parametrize("first", ["body", "whole"])
def test_a_second_patch_around_or_inside_the_first_is_refused(first):
    model = models.build("llama")
    one, two = (model.model, model) if first == "body" else (model, model.model)
    apt_kernels.patch(one, prefix_length=3)
    randomise(one)
    expected = model(**plain()).logits
    with pytest.raises(apt_kernels.PatchError, match=r"unpatch on (it|that) first"):
        apt_kernels.patch(two, prefix_length=3)
    assert torch.equal(model(**plain()).logits, expected)


@torch.no_grad()
def test_models_are_patched_in_several_threads_at_once():
    config = models.config("llama")
    built = []
    for _ in range(6):
        torch.manual_seed(0)
        built.append(transformers.AutoModelForCausalLM.from_config(config).eval())
    bystander, expected = built[-1], built[-1](**plain()).logits
    seen = []

    def work(number):
        if number >= 5:
            seen.append(torch.equal(bystander(**plain()).logits, expected))
        else:
            apt_kernels.patch(built[number // 2], prefix_length=3, init_seed=0)  # two threads for each of two models

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [0, 5, 1, 6, 2, 7, 3, 8, 4, *range(9, 30)]))
    assert all(seen)
    patched = [model(**plain()).logits for model in built[:3]]
    assert all(torch.equal(patched[0], each) for each in patched)
    assert torch.equal(bystander(**plain()).logits, expected)


class AddOne:
    """A pre-hook of somebody that changes the hidden states."""

    def __call__(self, module, args, kwargs):
        if args:
            return (args[0] + 1, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}


@torch.no_grad()
@pytest.mark.parametrize("gate", ["token", "first"])
def test_the_gate_reads_what_the_module_receives_whatever_the_order_of_hooks(gate):
    outputs = [_with_a_hook(gate, order) for order in ("before", "after", "first of all")]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def _with_a_hook(gate, order):
    model, seen = models.build("llama"), []
    attention = model.model.layers[0].self_attn
    if order == "before":
        attention.register_forward_pre_hook(AddOne(), with_kwargs=True)
    # Tokens of the vocabulary are read through the hooks that are there: another start for each order.
    apt_kernels.patch(model, prefix_length=3, gate=gate, init="normal", init_seed=0)
    randomise(model)
    if order != "before":
        attention.register_forward_pre_hook(AddOne(), with_kwargs=True, prepend=order == "first of all")
    for module in (attention.apt, attention.q_proj):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(**plain()).logits
    assert len(seen) == 2
    assert torch.equal(*seen)
    return output


@torch.no_grad()
@pytest.mark.parametrize("order", ["hook first", "patch first"])
def test_accelerates_hooks_in_either_order(order):
    hooks = pytest.importorskip("accelerate.hooks", reason="the package accelerate is not installed")
    model, expected = models.build("llama"), tuned(gate="first")(**packed()).logits
    bare = model(**packed()).logits

    def hook():
        for name in ("", "model", "model.layers.0.self_attn", "model.layers.1.self_attn"):
            hooks.add_hook_to_module(model.get_submodule(name), AddNothing())

    class AddNothing(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    def patch():
        apt_kernels.patch(model, prefix_length=3, init_seed=0, gate="first")
        randomise(model)

    seen = []
    for step in (hook, patch) if order == "hook first" else (patch, hook):
        step()
    seen.clear()
    assert torch.equal(model(**packed()).logits, expected)
    assert len(seen) == 4
    twin = copy.deepcopy(model)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**packed()).logits, expected)
    assert torch.equal(apt_kernels.unpatch(model)(**packed()).logits, bare)
    assert torch.equal(apt_kernels.unpatch(twin)(**packed()).logits, bare)


@torch.no_grad()
def test_a_forward_that_was_replaced_on_the_module_is_called():
    model, expected = models.build("llama"), tuned()(**plain()).logits
    attention, called = model.model.layers[0].self_attn, []
    original = attention.forward
    attention.forward = lambda *args, **kwargs: called.append(None) or original(*args, **kwargs)
    apt_kernels.patch(model, prefix_length=3, init_seed=0)
    randomise(model)
    called.clear()
    assert torch.equal(model(**plain()).logits, expected)
    assert len(called) == 1
    before = vars(attention).get("forward")
    apt_kernels.unpatch(model)
    model(**plain())
    assert before is None
    assert len(called) == 2


def test_output_attentions_warns_once():
    model = models.build("llama")
    model.set_attn_implementation("eager")
    weights = model(**plain(), output_attentions=True).attentions
    apt_kernels.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**plain(), output_attentions=True)
    assert [str(w.message) for w in caught if "output_attentions" in str(w.message)] != []
    assert sum("output_attentions" in str(w.message) for w in caught) == 1
    with apt_kernels.disabled(model):
        found = model(**plain(), output_attentions=True).attentions
    assert all(map(torch.equal, found, weights))
    assert len(found) == 2


def test_the_implementation_is_not_set_while_disabled():
    model = tuned()
    with apt_kernels.disabled(model):
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(apt_kernels.PatchError, match="cannot be set while the prefix is disabled"):
            model.set_attn_implementation("eager")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: model.config._attn_implementation).result() == "apt_kernels"
    assert model.config._attn_implementation == "apt_kernels"


def test_configs_and_classes_of_a_patched_model_pass_for_their_own(tmp_path):
    plain_model = models.build("llama")
    model = apt_kernels.patch(copy.deepcopy(plain_model))
    assert str(type(model)) == str(type(plain_model))
    assert isinstance(model.config, transformers.LlamaConfig)
    assert model.config.to_dict().keys() == plain_model.config.to_dict().keys()
    assert "apt" not in model.config.to_json_string(use_diff=False).replace("apt_kernels", "")
    model.config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(plain_model.config)
    assert loaded.to_diff_dict() == plain_model.config.to_diff_dict()
    twin = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(plain_model.config))
    assert type(twin) is type(plain_model)
    again = type(model)(copy.deepcopy(plain_model.config)).eval()  # of a patched model's class, and without a prefix
    assert again(**plain()).logits.isfinite().all()
    assert inspect.signature(model.forward) == inspect.signature(plain_model.forward)
    assert isinstance(model.model.layers[0].self_attn, type(plain_model.model.layers[0].self_attn))
    apt_kernels.unpatch(model)
    for ours, theirs in zip(model.modules(), plain_model.modules()):
        assert type(ours) is type(theirs)
    assert type(model.config) is type(plain_model.config)
    assert model.config == plain_model.config


@torch.no_grad()
def test_compiled_steps_follow_disabled_without_compiling_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, other = tuned(), tuned()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = {**plain(), "use_cache": False}
    expected = model(**given).logits
    with apt_kernels.disabled(model):
        bare = model(**given).logits

    @torch.no_grad()  # a mode of the thread, which Dynamo guards
    def check():
        torch.testing.assert_close(compiled(**given).logits, expected)
        with apt_kernels.disabled(model):
            torch.testing.assert_close(compiled(**given).logits, bare)
        with apt_kernels.disabled(other):
            torch.testing.assert_close(compiled(**given).logits, expected)

    check()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before <= 3
    for _ in range(3):
        check()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check).result()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before

    async def step():
        with apt_kernels.disabled(model):
            return compiled(**given).logits

    with pytest.raises(torch._dynamo.exc.Unsupported, match="an asyncio task entered"):
        asyncio.run(step())


def test_a_module_called_outside_of_the_models_forward():
    """Attention modules may be called alone, as some training loops do layer by layer."""
    model = tuned()
    hidden = model.get_input_embeddings()(plain()["input_ids"])
    positions = torch.arange(12)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    layer = model.model.layers[0]
    alone = layer.self_attn.forward(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)[0]
    assert torch.equal(alone, layer.self_attn(hidden, rotary, None)[0])
    with apt_kernels.disabled(model):
        assert not torch.equal(alone, layer.self_attn(hidden, rotary, None)[0])
    assert isinstance(layer, nn.Module)
