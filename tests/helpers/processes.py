"""Models trained on two processes, against one: ``python -m helpers.processes KIND FAMILY...``.

Called by tests/hf/integrations/test_distributed.py.

The packages are imported once; then both processes are forked.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaForSequenceClassification
from transformers.distributed import DistributedConfig

import apt_kernels
from apt_kernels.hf import weights
from apt_kernels.hf.weights import gathered, placed_like
from helpers import models
from helpers.patched import randomise

PROCESSES, LR = 2, 0.1


def batch(family: str) -> dict:
    """Four rows: the first two are one process's."""
    given = models.inputs(family, None, batch=4)
    if head_of(family):
        given["labels"] = given["input_ids"][:, 0] % 2
    else:
        given["labels"] = given.pop("decoder_input_ids") if family in models.SEQ2SEQ else given["input_ids"]
    return given


def head_of(family: str) -> str | None:
    return "AutoModelForSequenceClassification" if family in models.ENCODERS else None


def own_rows(given: dict) -> dict:
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return {name: tensor[rows] for name, tensor in given.items()}


def train(model, given: dict) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The loss, every gradient, and the loss after one step, on one process."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    loss = model(**given).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in grads.items()}
    optimizer.step()
    with torch.no_grad():
        return loss.detach(), grads, model(**given).loss


def alone(given: dict, model):
    """The same on one process, and that the prefix has influence."""
    with torch.no_grad():
        logits = model(**given).logits
        with apt_kernels.disabled(model):
            without = model(**given).logits
    found = train(model, given)
    assert (logits - without).abs().max() > 1e-3, "the prefix has no influence"
    assert all(grad.abs().max() > 0 for grad in found[1].values())
    assert (found[0] - found[2]).abs() > 1e-4, "the step changed nothing"
    return found


def patched(family: str, **settings):
    model = models.build(family, head_of(family)).double().train()
    apt_kernels.patch(model, prefix_length=3, init_seed=0, **settings).double()
    randomise(model)
    return model


def mean(loss: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(loss, op=dist.ReduceOp.SUM)
    return loss / PROCESSES


def agree(found, expected, averaged: bool) -> None:
    theirs = {name.removeprefix("module."): grad for name, grad in found[1].items()}
    torch.testing.assert_close(theirs, expected[1])
    losses = [mean(loss) if averaged else loss for loss in (found[0], found[2])]
    torch.testing.assert_close(losses, [expected[0], expected[2]])


def saved_as(model, twin, folder: Path, given: dict) -> None:
    """The sharded model saves what the model of one process saves, and loads it again unless it was folded."""
    folder = folder / str(dist.get_rank())
    apt_kernels.save(model, folder / "spread")
    apt_kernels.save(twin, folder / "alone")
    expected = load_file(folder / "alone" / "adapter.safetensors")
    torch.testing.assert_close(load_file(folder / "spread" / "adapter.safetensors"), expected)
    if any(prefix.mlp is not None for prefix in apt_kernels.prefixes(model).values()):
        return
    weights.reshard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(), gathered(model, trained, changed=True):
        for parameter in trained:
            parameter.mul_(3)
    with torch.no_grad():
        model(**given)  # after which FSDP2 keeps some weights gathered
    apt_kernels.load(model, folder / "alone")
    weights.reshard(model)
    apt_kernels.save(model, folder / "again")
    torch.testing.assert_close(load_file(folder / "again" / "adapter.safetensors"), expected)


def half_precision(family: str, wrap) -> None:
    """A bfloat16 base: what trains is float32 on each process, as on one."""
    given = batch(family)
    twin, model = (models.build(family, head_of(family)).bfloat16().train() for _ in range(2))
    for each in (twin, model):
        apt_kernels.patch(each, prefix_length=3, init_seed=0)
    wrapped = wrap(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    expected, found = train(twin, given), train(wrapped, own_rows(given))
    theirs = {name.removeprefix("module."): grad for name, grad in found[1].items()}
    assert all(grad.dtype == torch.float32 for grad in theirs.values())
    for name, grad in expected[1].items():  # rows are summed in another order, in bfloat16
        torch.testing.assert_close(theirs[name], grad, rtol=0.1, atol=0.05 * float(grad.abs().max()))


def ddp(family: str, folder: Path) -> None:
    given = batch(family)
    for settings in ({}, {"num_frozen_tokens": 1}):
        twin, model = patched(family, **settings), patched(family, **settings)
        expected = alone(given, twin)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        agree(train(wrapped, own_rows(given)), expected, averaged=True)
        saved_as(wrapped, twin, folder, given)
    refused(lambda: apt_kernels.add_adapter(wrapped, "x"))
    refused(lambda: apt_kernels.prune(wrapped, [1] * len(apt_kernels.prefixes(model))))
    refused(lambda: apt_kernels.unpatch(wrapped))
    bare = torch.nn.parallel.DistributedDataParallel(models.build(family).train())
    refused(lambda: apt_kernels.patch(bare))
    half_precision(family, torch.nn.parallel.DistributedDataParallel)


def fsdp2(family: str, folder: Path) -> None:
    given, mesh = batch(family), init_device_mesh("cpu", (PROCESSES,))
    for settings in ({"num_frozen_tokens": 1}, {}):
        twin, model = patched(family, **settings), patched(family, **settings)
        expected = alone(given, twin)
        layers = {name.rpartition(".")[0] for name in apt_kernels.prefixes(model)}
        for layer in layers:
            fully_shard(model.get_submodule(layer), mesh=mesh)
        fully_shard(model, mesh=mesh)
        agree(train(model, own_rows(given)), expected, averaged=True)
        saved_as(model, twin, folder, given)
        saved_by_one(model, folder)
        assert apt_kernels.summary(model) == apt_kernels.summary(twin)
    unpatched(model, family, given)
    bare = fully_shard(models.build(family).train(), mesh=mesh)
    refused(lambda: apt_kernels.patch(bare))
    half_precision(family, lambda model: fully_shard(model, mesh=mesh))
    if head_of(family):
        half_precision_unpatched(family, given, mesh)


def half_precision_unpatched(family: str, given: dict, mesh) -> None:
    """FSDP2 goes on with the float32 copies, which have the base's values again and are read in its dtype."""
    given = own_rows(given)
    base = models.build(family, head_of(family)).bfloat16()
    model = apt_kernels.patch(copy.deepcopy(base), prefix_length=3)
    fully_shard(model, mesh=mesh)
    train(model, given)
    apt_kernels.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, base(**given).logits)


def unpatched(model, family: str, given: dict) -> None:
    """Disabled and unpatched, a sharded model equals the base model (except for an encoder's trained head)."""
    base = models.build(family, head_of(family)).double().train()
    with torch.no_grad():
        expected = base(**given).logits
        with apt_kernels.disabled(model):
            assert family in models.ENCODERS or torch.equal(model(**given).logits, expected)
        apt_kernels.unpatch(model)
        assert family in models.ENCODERS or torch.equal(model(**given).logits, expected)


def saved_by_one(model, folder: Path) -> None:
    """One process writes, as in Trainer; one that saves alone gets an error instead of waiting for ever."""
    main = not dist.get_rank()
    model.save_pretrained(folder / f"main{dist.get_rank()}", is_main_process=main)
    assert (folder / f"main{dist.get_rank()}").exists() == main
    if main:
        found, expected = (load_file(folder / name / "adapter.safetensors") for name in ("main0", "0/alone"))
        torch.testing.assert_close(found, expected)
    if any(hasattr(p, "device_mesh") for p in model.parameters() if p.requires_grad):  # not Phi-3's prefixes
        saving_alone_raises(model, folder)


def saving_alone_raises(model, folder: Path) -> None:
    if not dist.get_rank():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "PATIENCE", timedelta(seconds=0.5))
            with pytest.raises(apt_kernels.AdapterError, match=r"\[1\] did not"):
                apt_kernels.save(model, folder / "one")
        assert not (folder / "one").exists()
    dist.barrier()
    apt_kernels.save(model, folder / str(dist.get_rank()) / "after")  # afterwards the processes are synchronised again


def fsdp1(family: str, folder: Path) -> None:
    """FullyShardedDataParallel, around the whole model and around every attention's layer as well."""
    given = batch(family)
    for settings in ({}, {"reparameterisation": 8}, {"num_frozen_tokens": 1}):
        for nested in (False, True):
            twin, model = patched(family, **settings), patched(family, **settings)
            start = {n: p.detach().clone() for n, p in twin.named_parameters() if p.requires_grad}
            expected = alone(given, twin)
            layers = {type(model.get_submodule(name.rpartition(".")[0])) for name in apt_kernels.prefixes(model)}
            wrapped = FullyShardedDataParallel(
                model,
                use_orig_params=True,
                device_id=torch.device("cpu"),
                auto_wrap_policy=ModuleWrapPolicy(layers) if nested else None,
            )
            assert list(apt_kernels.prefixes(wrapped)) == list(apt_kernels.prefixes(twin))
            loss, _, after = train(wrapped, own_rows(given))
            # Gradients from a step of SGD: one process alone may hold only frozen weights of a unit.
            with FullyShardedDataParallel.summon_full_params(wrapped):
                ends = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
            grads = {n: (start[n] - ends[n]) / LR for n in start}
            agree((loss, grads, after), expected, averaged=True)
            saved_as(wrapped, twin, folder, given)
    saving_alone_raises(wrapped, folder)
    with pytest.raises(apt_kernels.PatchError, match="pass the FullyShardedDataParallel"):
        apt_kernels.save(model, folder / "inner")
    refused(lambda: apt_kernels.add_adapter(wrapped, "x"))
    refused(lambda: apt_kernels.summary(wrapped))
    refused(lambda: apt_kernels.unpatch(wrapped))
    refused(lambda: apt_kernels.patch(FullyShardedDataParallel(models.build(family), device_id=torch.device("cpu"))))
    with pytest.raises(ValueError, match="uniform `requires_grad`"):  # torch's error without use_orig_params
        FullyShardedDataParallel(patched(family), device_id=torch.device("cpu"))


def tensor_parallel(family: str, folder: Path) -> None:
    """By transformers' plan: every process has all rows and its own heads."""
    given, base = batch(family), models.build(family, vocab_size=100).double()
    if not dist.get_rank():
        base.save_pretrained(folder / family)
    dist.barrier()
    for settings in ({}, {"reparameterisation": 8}, {"gate": "first"}, {"num_frozen_tokens": 1}):
        twin = apt_kernels.patch(copy.deepcopy(base).train(), prefix_length=3, init_seed=0, **settings).double()
        randomise(twin)
        start = {n: p.detach().clone() for n, p in twin.named_parameters() if p.requires_grad or ".frozen_" in n}
        expected = alone(given, twin)
        model = type(base).from_pretrained(
            folder / family, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=PROCESSES)
        )
        torch.manual_seed(dist.get_rank())
        apt_kernels.patch(model.train(), prefix_length=3, **settings).double()
        for name, prefix in apt_kernels.prefixes(model).items():
            check_sharding(prefix, apt_kernels.prefixes(twin)[name], whole=family == "phi3")
        with torch.no_grad():
            for name, tensor in start.items():
                parameter = model.get_parameter(name)
                parameter.copy_(placed_like(parameter, tensor))
        agree(train(model, given), expected, averaged=False)
        ids = given["input_ids"]
        generated = (each.eval().generate(ids, max_new_tokens=4, do_sample=False) for each in (model, twin))
        assert torch.equal(*generated)
        saved_as(model, twin, folder, given)
        saved_by_one(model, folder)
        assert apt_kernels.summary(model) == apt_kernels.summary(twin)
        if family != "phi3":  # whose prefixes are replicated
            refused(functools.partial(apt_kernels.prune, model, [1] * len(apt_kernels.prefixes(model))))
    if family == "llama":
        tensor_parallel_head(folder)


def tensor_parallel_head(folder: Path) -> None:
    """A new head on a bfloat16 base: a float32 copy, equal on every process; `unpatch` gives the base's head back."""
    config = models.config("llama")
    config.num_labels, config.pad_token_id, config.vocab_size = 2, 0, 100
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config).bfloat16()
    if not dist.get_rank():
        base.save_pretrained(folder / "head")
    dist.barrier()
    given = models.inputs("llama", None, batch=4)
    given["labels"] = given["input_ids"][:, 0] % 2
    twin = apt_kernels.patch(copy.deepcopy(base).train(), prefix_length=3, init_seed=0)
    randomise(twin)
    plan = DistributedConfig(tp_size=PROCESSES)
    model = type(base).from_pretrained(folder / "head", dtype=torch.bfloat16, distributed_config=plan)
    apt_kernels.patch(model.train(), prefix_length=3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(placed_like(parameter, twin.get_parameter(name)))
    expected, found = train(twin, given), train(model, given)
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0.02)  # sums in bfloat16, in another order
    for name, grad in expected[1].items():
        assert torch.cosine_similarity(found[1][name].flatten(), grad.flatten(), dim=0) > 0.98, name
    heads = [torch.empty_like(model.score.weight) for _ in range(PROCESSES)]
    dist.all_gather(heads, model.score.weight.detach())
    assert torch.equal(*heads)
    apt_kernels.save(model, folder / f"head{dist.get_rank()}")
    saved = load_file(folder / f"head{dist.get_rank()}" / "adapter.safetensors")["score.weight"]
    assert torch.equal(saved, heads[0])
    apt_kernels.unpatch(model)
    assert model.score.weight.dtype == torch.bfloat16
    assert torch.equal(model.score.weight, base.score.weight)


def check_sharding(prefix, twin, whole: bool) -> None:
    """Every process has its heads (all if ``whole``); parameters without a head dimension are equal everywhere."""
    for name, parameter in prefix.named_parameters():
        assert parameter.shape == twin.get_parameter(name).shape
        here = parameter if whole else parameter.to_local()
        if name.removeprefix("frozen_") in ("key", "value") and not whole:
            assert here.shape[0] == parameter.shape[0] // PROCESSES
            continue
        others = [torch.empty_like(here) for _ in range(PROCESSES)]
        dist.all_gather(others, here.detach().contiguous())
        assert torch.equal(*others)


def zero3(family: str, folder: Path) -> None:
    # DeepSpeed compiles its shared-memory collectives at the first use; gloo does not need them.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    given = batch(family)
    for frozen in (0, 1):
        zero3_with(family, folder, frozen, given)


def zero3_with(family: str, folder: Path, frozen: int, given: dict) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    twin, model = (patched(family, num_frozen_tokens=frozen).float() for _ in range(2))
    expected = alone(given, twin)
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        # Parameters are gathered only while their module runs.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=LR), config=settings)
    assert all(p.numel() == 0 for p in trained)
    loss = engine(**own_rows(given)).loss
    engine.backward(loss)
    grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    engine.step()
    with torch.no_grad():
        agree((loss.detach(), grads, engine(**own_rows(given)).loss), expected, averaged=True)
    for parameter in trained:
        parameter.partition()
    saved_as(engine, twin, folder, given)
    saving_alone_raises(engine, folder)
    assert apt_kernels.summary(engine) == apt_kernels.summary(twin)
    refused(lambda: apt_kernels.unpatch(engine))
    if head_of(family):
        zero3_half(family, folder)


def zero3_half(family: str, folder: Path) -> None:
    """In bfloat16, DeepSpeed trains float32 copies: they are saved, and a load that they would overwrite is refused."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    given, base = batch(family), models.build(family, head_of(family)).bfloat16()
    twin, model = (apt_kernels.patch(copy.deepcopy(base).train(), prefix_length=3, init_seed=0) for _ in range(2))
    expected = train(twin, given)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(trained.values(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.backward(engine(**own_rows(given)).loss)
    for name, grad in expected[1].items():  # rows are summed in another order, in bfloat16
        found = safe_get_full_grad(trained[name]).float()
        torch.testing.assert_close(found, grad, rtol=0.1, atol=0.06 * float(grad.abs().max()))
    engine.step()
    copies = {name: safe_get_full_fp32_param(parameter).view(parameter.ds_shape) for name, parameter in trained.items()}
    place = folder / f"half{dist.get_rank()}"
    apt_kernels.save(engine, place)
    saved = load_file(place / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    torch.testing.assert_close(saved, copies, rtol=0, atol=0)
    refused(lambda: apt_kernels.load(engine, place))


def refused(call) -> None:
    with pytest.raises(apt_kernels.PatchError, match="before"):
        call()


def worker(rank: int, kind: str, families: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, store=store)
    for family in families:
        globals()[kind](family, Path(folder))
        dist.barrier()
        if not rank:
            print(f"done {kind} {family}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (sys.argv[1], sys.argv[2:], folder), nprocs=PROCESSES, start_method="fork")
