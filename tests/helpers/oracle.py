"""An eager model that attends over concatenated prefixes: transformers' own masks and hand-written gates.

It shares no code with the patch: no op, no `Mask`, no recording. Only the prefix parameters come from a patched
model, by module name.
"""

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "apt_test_oracle"
FIELDS = ("key", "value", "gate_weight", "gate_logits", "layer_scale")


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **_):
    prefixes = getattr(module, "oracle_prefixes", [])
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    batch, heads, queries, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        logits = logits + attention_mask
    gates, values, before = [], [], []
    for params in prefixes:
        gate = _gate(module, params, queries)
        prefix_key, prefix_value = (params[n].repeat_interleave(group, dim=0) for n in ("key", "value"))
        prefix = torch.einsum("bhtd,hmd->bhtm", query, prefix_key) * scaling * gate
        before.append(prefix if softcap is None else softcap * torch.tanh(prefix / softcap))
        gates.append(gate)
        values.append(prefix_value)
    logits = torch.cat([*before, logits], dim=-1)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(batch, heads, queries, 1)], dim=-1)
    p = logits.softmax(-1)
    length = sum(prefix_value.shape[1] for prefix_value in values)
    out = p[..., length : length + key.shape[2]] @ value
    for weights, gate, prefix_value in zip(p[..., :length].split([x.shape[-1] for x in before], -1), gates, values):
        out = out + torch.einsum("bhtm,hmd->bhtd", weights * gate, prefix_value)
    return out.transpose(1, 2).contiguous(), None


def _gate(module, params, queries):
    """``lambda * alpha`` as ``[B, 1, T or 1, M]``."""
    scale = params["layer_scale"] if params["layer_scale"] is not None else 1.0
    mode = params["gate"]
    if mode == "none":
        return torch.ones(()) * scale
    if mode == "static":
        return torch.sigmoid(params["gate_logits"]) * scale
    hidden = module.oracle_hidden
    if mode == "token":
        return scale * torch.sigmoid(hidden @ params["gate_weight"].T)[:, None]
    rows = []
    for b in range(hidden.shape[0]):
        real = [t for t in range(queries) if module.oracle_real is None or module.oracle_real[b, t]]
        rows.append(hidden[b, real[0]] if mode == "first" else torch.stack([hidden[b, t] for t in real]).mean(0))
    return scale * torch.sigmoid(torch.stack(rows) @ params["gate_weight"].T)[:, None, None]


def _copied(prefix):
    """Copies of a prefix's parameters by `FIELDS`, and its gate's name."""
    found = {field: getattr(prefix, field) for field in FIELDS}
    found = {field: None if x is None else x.detach().clone().requires_grad_() for field, x in found.items()}
    return {**found, "gate": prefix.gate}


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)


def _remember(module, args, kwargs):
    module.oracle_hidden = kwargs.get("hidden_states", args[0] if args else None)


def build(model, prefixes, real=lambda name: None, behind=()):
    """``model`` (unpatched, copied) attending by the oracle with copies of ``prefixes``; params by name in a dict.

    ``real``: a function from a module's name to the ``[B, T]`` bool of its real tokens, or to None where all are.
    ``behind``: further prefixes, each like ``prefixes``, between those and the tokens.
    """
    oracle = copy.deepcopy(model)
    params = {}
    for name, module in oracle.named_modules():
        if name in prefixes:
            own = _copied(prefixes[name])
            params |= {f"{name}.apt.{field}": own[field] for field in FIELDS if own[field] is not None}
            module.oracle_prefixes = [own]
        for other in behind:
            if name in other:
                module.oracle_prefixes = [*getattr(module, "oracle_prefixes", []), _copied(other[name])]
        if hasattr(module, "oracle_prefixes"):
            module.oracle_real = real(name)
            module.register_forward_pre_hook(_remember, with_kwargs=True)
    for module in oracle.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = NAME
    for parameter in oracle.parameters():
        parameter.requires_grad_(False)
    return oracle, params
