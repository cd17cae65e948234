"""`patch_from_text` from chats, in chunks, and from the best of several texts."""

import copy
import inspect
import itertools
import logging

import pytest
import torch
from transformers import DynamicCache

import apt_kernels
from apt_kernels.hf import capture, initialise
from helpers import accuracy, chats, documentation, models, pretrained
from helpers.causal import EXACT, build, close
from helpers.patched import assert_unchanged, snapshot

TEXT = torch.tensor([7, 31, 12, 55, 60, 9])
LONG = torch.randint(5, 99, (40,), generator=torch.Generator().manual_seed(2))


def tokens(model):
    return {name: [part.detach() for part in prefix.tokens()] for name, prefix in apt_kernels.prefixes(model).items()}


def copied(model, given, **options):
    """The keys and values of a prefix from ``given``; the model is left as it was."""
    return tokens(apt_kernels.patch_from_text(copy.deepcopy(model), given, **options))


# ---- In chunks


@pytest.mark.parametrize(
    ("case", "chunk_size"), [*itertools.product(EXACT, (1, 4, 5)), *itertools.product(["llama"], (2, 6, 100))]
)
def test_chunks_give_the_prefix_of_the_whole_text(case, chunk_size):
    model = build(case)
    expected, found = copied(model, TEXT), copied(model, TEXT, chunk_size=chunk_size)
    for name, parts in expected.items():
        for ours, theirs in zip(found[name], parts):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # both rounded to float32
    given = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, bare = model(torch.cat([TEXT.expand(2, -1), given], 1)).logits[:, len(TEXT) :], model(given).logits
        close(apt_kernels.patch_from_text(model, TEXT, chunk_size=chunk_size)(given).logits, whole, bare)


@pytest.mark.parametrize("chunk_size", [1, 7, 16])
def test_chunks_are_as_near_to_the_truth_as_the_whole_text(chunk_size):
    """The error rule, with the whole text in float64 as the truth and in float32 as the eager result."""
    model = build("llama")
    truth, single = copied(model, LONG), model.float()
    eager, ours = copied(single, LONG), copied(single, LONG, chunk_size=chunk_size)
    for name, parts in truth.items():
        for exact, theirs, found in zip(parts, eager[name], ours[name]):
            worst, scale = (theirs - exact).abs().max(), exact.abs().max()
            allowed = 2 * worst + accuracy.CONSTANT * torch.finfo(torch.float32).eps * scale
            assert (found - exact).abs().max() <= allowed, name


def test_no_forward_gets_more_tokens_than_a_chunk():
    model, seen = build("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    apt_kernels.patch_from_text(model, LONG, chunk_size=9)
    assert max(seen) == 9 > capture._TRIED


def broken(model, fault):
    """The model with a body whose cache has a fault."""
    forward = model.model.forward

    def call(input_ids=None, position_ids=None, past_key_values=None, use_cache=None, **given):
        if fault == "no cache":
            return forward(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        if fault == "forgets":
            past_key_values = DynamicCache(config=model.config) if use_cache else None
        if fault == "misplaces" and past_key_values is not None:
            position_ids = position_ids + 1
        return forward(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **given,
        )

    model.model.forward = call
    return model


def without_argument(model):
    forward = model.model.forward

    def call(**given):
        return forward(**given)

    call.__signature__ = inspect.signature(lambda input_ids, position_ids: None)
    model.model.forward = call
    return model


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no cache", "LlamaForCausalLM returns no cache, so it cannot read a text in chunks; use chunk_size=None"),
        ("forgets", r"layers\.0\.self_attn got the keys of . of . tokens from the cache .*use chunk_size=None"),
        ("misplaces", "has other keys or values where LlamaForCausalLM reads a text in chunks"),
        ("no argument", "LlamaForCausalLM takes no cache"),
    ],
)
def test_a_cache_that_cannot_do_it_is_refused_by_name(fault, message):
    model = models.build("llama")
    model = without_argument(model) if fault == "no argument" else broken(model, fault)
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=message):
        apt_kernels.patch_from_text(model, LONG, chunk_size=8)
    assert_unchanged(model, before)


@pytest.mark.parametrize("chunk_size", [0, -1, True, 2.0, "8"])
def test_wrong_chunk_sizes_are_named(chunk_size):
    with pytest.raises(apt_kernels.ArgumentError, match="it needs an int of at least 1 or None"):
        apt_kernels.patch_from_text(models.build("llama"), TEXT, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("window", [7, 8, 9, 10])
def test_a_window_that_hides_the_text_from_the_fourth_token_on_is_no_obstacle(window, chunk_size):
    """The tokens that see the whole text in the source are enough for the comparison."""
    model = models.build("mistral", sliding_window=window).double()
    with torch.no_grad():
        given = torch.randint(5, 99, (1, window - 6), generator=torch.Generator().manual_seed(0))
        expected, bare = model(torch.cat([TEXT[None], given], 1)).logits[:, 6:], model(given).logits
        close(apt_kernels.patch_from_text(model, TEXT, chunk_size=chunk_size)(given).logits, expected, bare)


# ---- From a chat

CHAT = [{"role": "system", "content": "the cat is red ."}, {"role": "user", "content": "where is the cat"}]


def tokenizer(template=chats.TEMPLATE):
    return chats.tokenizer("the cat is red dog green where lives .", template)


@pytest.mark.parametrize(
    ("given", "rendered"),
    [
        (CHAT, "system : the cat is red . <e> user : where is the cat <e>"),
        (tuple(CHAT), "system : the cat is red . <e> user : where is the cat <e>"),
        (CHAT[:1], "system : the cat is red . <e>"),
        ("the dog is green .", "the dog is green ."),
    ],
)
def test_messages_and_strings_are_the_tokens_that_the_tokenizer_makes(given, rendered):
    model = build("llama")
    expected = copied(model, tokenizer()(rendered).input_ids)
    found = copied(model, given, tokenizer=tokenizer())
    for name, parts in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, found[name]))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (CHAT, {}, "input_ids is a list of messages; it needs tokenizer="),
        ("the cat", {}, r"input_ids is a str; .*tokenizer\(text\)\.input_ids, or the text with tokenizer="),
        (CHAT, {"tokenizer": tokenizer(None)}, "the tokenizer cannot read input_ids: .*chat_template"),
        (CHAT, {"tokenizer": tokenizer("{{ messages[0].rule + 'x' }}")}, "the tokenizer cannot read"),
        (CHAT, {"tokenizer": models}, "tokenizer is a module; it needs the tokenizer of the model"),
        ([CHAT, CHAT], {"tokenizer": tokenizer()}, "input_ids is a list of texts; it needs one text.*pass batches="),
        (
            ["the cat", "dog"],
            {"tokenizer": tokenizer()},
            r"a list of texts; it needs one text.*input_ids\[0\].*batches=",
        ),
        (("the cat",), {"tokenizer": tokenizer()}, "input_ids is a list of texts; it needs one text"),
        ([[5, 6], [7]], {}, "input_ids is a list of texts; it needs one text"),
        ([TEXT, TEXT], {}, "input_ids is a list of texts; it needs one text"),
        ("", {"tokenizer": tokenizer()}, "the text is empty: the tokenizer makes no tokens of input_ids"),
        ("  ", {"tokenizer": tokenizer()}, "the text is empty: the tokenizer makes no tokens of input_ids"),
        (CHAT, {"tokenizer": tokenizer("{{ '' }}")}, "the text is empty: the tokenizer makes no tokens of input_ids"),
        ([], {"tokenizer": tokenizer()}, "the text is empty: input_ids has no tokens; it needs at least one"),
        ([[]], {}, "the text is empty: input_ids has no tokens"),
        (torch.tensor([]), {}, "the text is empty: input_ids has no tokens"),
        (torch.empty(1, 0, dtype=torch.long), {}, "the text is empty: input_ids has no tokens"),
        (
            [CHAT[0], "b"],
            {"tokenizer": tokenizer()},
            r"input_ids\[1\] is a str, not a message;.*a list of messages needs",
        ),
        (["b", CHAT[0]], {"tokenizer": tokenizer()}, r"input_ids\[0\] is a str, not a message"),
        (
            [{"from": "user", "value": "a"}],
            {"tokenizer": tokenizer()},
            r"input_ids\[0\] has no 'role', but 'from', 'value'",
        ),
        ([CHAT[0], {"role": "user"}], {"tokenizer": tokenizer()}, r"input_ids\[1\] has no 'content', but 'role'"),
        ([{}], {"tokenizer": tokenizer()}, r"input_ids\[0\] has no 'role'; a message needs 'role' and 'content'"),
        ({"role": "user"}, {"tokenizer": tokenizer()}, "input_ids is a dict"),
    ],
)
def test_what_is_no_text_is_named(given, options, message):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.patch_from_text(model, given, **options)
    assert_unchanged(model, before)


def test_a_message_may_have_other_keys_than_content():
    calls = [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "cat", "arguments": {}}}]}]
    model = apt_kernels.patch_from_text(build("llama"), calls, tokenizer=tokenizer())
    assert {prefix.length for prefix in apt_kernels.prefixes(model).values()} == {11}
    apt_kernels.unpatch(model)


# ---- The best of several texts

CANDIDATES = [[7, 31, 12, 55], [60, 9], [44, 8, 71, 15, 33], [90, 91, 92]]


def batches():
    """Two batches with different numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randint(5, 99, shape, generator=generator) for shape in ((3, 9), (1, 4))]
    labels = [ids.clone() for ids in found]
    labels[0][:, :6] = -100
    return [{"input_ids": ids, "labels": each} for ids, each in zip(found, labels)]


def loss_after(model, text):
    """The mean loss over all labels of `batches` where the model reads the text as tokens before them."""
    parts = []
    for batch in batches():
        ids = torch.cat([torch.tensor(text).expand(len(batch["input_ids"]), -1), batch["input_ids"]], 1)
        logits = model(ids).logits[:, len(text) : -1]
        parts.append(
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
            )[batch["labels"][:, 1:] != -100]
        )
    return torch.cat(parts).mean().item()


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))][::8])
def test_the_text_with_the_lowest_loss_is_chosen(order, caplog):
    model, texts = build("llama"), [CANDIDATES[i] for i in order]
    with torch.no_grad():
        losses = [loss_after(model, text) for text in texts]
    best = losses.index(min(losses))
    assert sorted(losses)[1] - min(losses) > 1e-3, "the texts do not differ"
    expected = copied(model, texts[best])
    with caplog.at_level(logging.INFO, "apt_kernels"):
        assert apt_kernels.patch_from_text(model, texts, batches=batches()) is model
    assert f"input_ids[{best}] has the lowest of the losses" in caplog.text
    (logged,) = [record.args[1] for record in caplog.records if "has the lowest" in record.msg]
    assert logged == pytest.approx(losses, rel=2e-4)  # the prefix is float32
    for name, parts in tokens(model).items():
        assert all(torch.equal(a, b) for a, b in zip(parts, expected[name]))
    assert {prefix.length for prefix in apt_kernels.prefixes(model).values()} == {len(texts[best])}
    apt_kernels.unpatch(model)


def test_candidates_of_every_kind():
    model, made = build("llama"), tokenizer()
    given = ["the cat is red .", CHAT, torch.tensor([5, 6, 7]), [[8, 9]], [5, 6]]
    apt_kernels.patch_from_text(model, tuple(given), tokenizer=made, batches=batches(), chunk_size=2)
    assert {prefix.length for prefix in apt_kernels.prefixes(model).values()} <= {5, 15, 3, 2}


def test_batches_of_a_generator_are_used_for_every_text():
    model = build("llama")
    listed = copied(model, CANDIDATES, batches=batches())
    once = copied(model, CANDIDATES, batches=(batch for batch in batches()))
    for name, parts in listed.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, once[name]))


@pytest.mark.parametrize(
    ("given", "examples", "message"),
    [
        (TEXT, batches(), "input_ids is a Tensor; with batches, it needs a list of texts"),
        ([7, 8], batches(), "input_ids is a list; with batches, it needs a list of texts"),
        (CHAT, batches(), "input_ids is a list of messages; with batches, it needs a list of texts"),
        ("text", batches(), "input_ids is a str; with batches"),
        ([], batches(), "input_ids is a list; with batches"),
        (CANDIDATES, [], "batches is empty"),
        (CANDIDATES, {"input_ids": TEXT}, "batches is a dict"),
        (CANDIDATES, [TEXT], "a batch is a Tensor"),
        (CANDIDATES, [{"input_ids": TEXT[None]}], "a batch has no labels to predict, but input_ids"),
        (CANDIDATES, [{"input_ids": TEXT[None], "labels": torch.full((1, 6), -100)}], "all labels of a batch are -100"),
        (
            CANDIDATES,
            [{"input_ids": TEXT[None], "labels": torch.tensor([[7] + 5 * [-100]])}],
            "the first token of a row",
        ),
        (
            CANDIDATES,
            [{"input_ids": TEXT[None], "labels": TEXT.tolist()}],
            "the labels of a batch are a list; .*tensor",
        ),
        ([[7, 8], []], batches(), r"the text is empty: input_ids\[1\] has no tokens"),
        ([[7, 8], [{"role": "user"}]], batches(), r"input_ids\[1\]\[0\] has no 'content'"),
        (CANDIDATES, [{"ids": TEXT[None], "labels": TEXT[None]}], "cannot run a batch of ids"),
        ([[7, 8], [1, 99999]], batches(), r"input_ids\[1\] has 99999; the model has tokens from 0 to 98"),
        ([[7, 8], "text"], batches(), r"input_ids\[1\] is a str"),
    ],
)
def test_wrong_candidates_and_batches_are_named(given, examples, message):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.patch_from_text(model, given, batches=examples)
    assert_unchanged(model, before)


def test_a_text_that_cannot_be_copied_is_named():
    model = models.build("mistral", sliding_window=4)
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=r"input_ids\[2\]: .*has a window of 4 tokens"):
        apt_kernels.patch_from_text(model, [[5, 6], [7, 8, 9], [5, 6, 7, 8]], batches=batches())
    assert_unchanged(model, before)


def test_an_interrupt_between_the_texts_leaves_the_model_as_it_was(monkeypatch):
    model, losses = models.build("llama"), []

    def interrupted(*given):
        losses.append(1.0)
        if len(losses) > 1:
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(initialise, "next_token_loss", interrupted)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        apt_kernels.patch_from_text(model, CANDIDATES, batches=batches())
    assert_unchanged(model, before)


# ---- On a pretrained model


@pytest.mark.slow
def test_smollm2_reads_a_chat_in_chunks_and_chooses_the_text_with_the_answer():
    model, made = pretrained.smollm2()
    text = (documentation.ROOT / "bench/demo/observatory.txt").read_text(encoding="utf-8")
    others = pretrained.long_docstrings(*pretrained.HELD_OUT)[:2]
    chats = [[{"role": "system", "content": each}] for each in (others[0], text, others[1])]
    ids = made.apply_chat_template(chats[1], tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    question = [{"role": "user", "content": "Who founded the observatory, and when?"}]
    answer = [{"role": "assistant", "content": "The botanist Ingrid Solberg founded it in 1931."}]
    whole = made.apply_chat_template(
        [*chats[1], *question, *answer], tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    rest = whole[:, ids.shape[1] :]
    assert torch.equal(whole[:, : ids.shape[1]], ids)
    with torch.no_grad():
        expected, bare = model(whole).logits[:, ids.shape[1] :], model(rest).logits
        examples = [{"input_ids": rest, "labels": rest}]
        apt_kernels.patch_from_text(model, chats, tokenizer=made, chunk_size=64, batches=examples)
        assert {prefix.length for prefix in apt_kernels.prefixes(model).values()} == {ids.shape[1]}
        apart = (model(rest).logits - expected).abs().max()
    assert apart < 1e-3 * (expected - bare).abs().max(), "float32: other sums, and rotations of other positions"
