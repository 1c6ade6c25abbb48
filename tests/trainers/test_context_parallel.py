"""PerplexityTrainer on parts of rows: in one process with rows cut by hand, and on four with torch's ring attention."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BambaConfig, BambaForCausalLM, BartConfig, BartForCausalLM

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError
from hf_objectives.labels import encode_row
from hf_objectives.trainers.context_parallel import (
    check_rows,
    collator_of_parts,
    columns_to_cut,
    refuse_uncuttable,
)
from tests.support import parts_of_rows
from tests.support.language_models import TOKENIZER, by_autograd, chats, llama, mixtral, nats_of, trainer
from tests.support.mixtures import mixture, taken

IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14]])


def halves(tensor, part):
    return tensor.chunk(2, dim=1)[part]


def both_ends(tensor, part):
    """The order of `torch.distributed.tensor.experimental.context_parallel`: quarters 0 and 3, and 1 and 2."""
    quarters = tensor.chunk(4, dim=1)
    return torch.cat([quarters[part], quarters[3 - part]], dim=1)


def tokenwise():
    """A model without attention, of which a part of a row is right by itself."""
    model = llama()
    model.model.layers = torch.nn.ModuleList()
    return model.train()


@pytest.mark.parametrize("cut", [halves, both_ends])
def test_sums_and_gradients_of_parts_are_those_of_whole_rows(tmp_path, monkeypatch, cut):
    model = tokenwise()
    rows = parts_of_rows.weighed()
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER, pad_to_multiple_of=4, return_source=True)(rows)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    expected = (nats * batch["loss_weights"][:, 1:]).sum() / 100
    expected.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    run = trainer(tmp_path, model=model)
    monkeypatch.setattr(run.accelerator.state, "parallelism_config", ParallelismConfig(cp_size=2))
    before = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
    total = 0.0
    for part in (0, 1):
        context, inputs = run._prepare_context_parallel_inputs(model, batch)
        for buffer, dim in zip(context.keywords["buffers"], context.keywords["buffer_seq_dims"], strict=True):
            assert dim == 1
            buffer.data = cut(buffer, part)
        loss = run.compute_loss(model, inputs, num_items_in_batch=100)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradient[name], rtol=1e-6, atol=1e-6 * float(gradient[name].abs().max()))
    nats, logs = nats.detach(), run.token_metrics.take() | run.source_losses.take()
    trained = batch["labels"][:, 1:] != -100
    assert logs["num_supervised_tokens"] == int(trained.sum())
    assert logs["num_tokens_seen"] == sum(len(row["input_ids"]) for row in rows)
    assert logs["perplexity"] == pytest.approx(math.exp(float(nats.sum() / trained.sum())), rel=1e-6)
    for name, places in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        assert logs[f"loss/{name}"] == pytest.approx(float(nats[places].sum() / trained[places].sum()), rel=1e-6)
    assert all(torch.equal(batch[name], value) for name, value in before.items()), "the batch itself was cut"


def test_columns_by_hand():
    labels = torch.tensor([[-100, 8, 9, -100, -100, 12, 13, -100]])
    batch = {
        "input_ids": IDS,
        "labels": labels,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]),
        "source_ids": torch.tensor([[0, 0, 0, 0, 0, 0, 0, -1]]),
        "row_ids": torch.tensor([[5, 5, 5, 5, 5, 5, 5, -1]]),
        "source_names": ["a"],
    }
    cut = columns_to_cut(batch, 2)
    assert cut.keys() == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "shift_labels",
        "shift_sources",
        "source_names",
    }
    assert cut["shift_labels"].tolist() == [[8, 9, -100, -100, 12, 13, -100, -100]]
    assert cut["shift_sources"].tolist() == [[0, 0, 0, 0, 0, 0, -1, -1]]
    assert cut["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert cut["input_ids"].data_ptr() != IDS.data_ptr()


def test_our_collator_is_told_widths_that_divide():
    for given, parts, expected in ((None, 2, 4), (6, 2, 12), (64, 4, 64)):
        collator = DataCollatorForAssistantOnlyLM(TOKENIZER, pad_to_multiple_of=given)
        assert collator_of_parts(collator, parts).pad_to_multiple_of == expected
        assert collator.pad_to_multiple_of == given
    assert collator_of_parts(len, 2) is len
    with pytest.raises(ConfigError, match="documents of a packed row.* cp_size to 1"):
        collator_of_parts(DataCollatorWithEosPacking(TOKENIZER, max_length=64), 2)


BAD = {
    "width": ({"input_ids": IDS[:, :7]}, "rows of 7 tokens cannot be cut into cp_size=2 .*pad_to_multiple_of"),
    "documents": ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}, "documents of a packed row"),
    "bounds": ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "documents of a packed row"),
    "left": ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}, "padding on the right"),
    "block mask": ({"attention_mask": torch.ones(1, 1, 8, 8)}, "padding on the right"),
    "pictures": ({"pixel_values": torch.zeros(1, 3)}, "pixel_values, of which context parallelism knows no parts"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_of_which_parts_would_be_wrong(name):
    more, words = BAD[name]
    batch = {"input_ids": IDS, "labels": IDS, **more}
    batch["labels"] = batch["input_ids"]
    with pytest.raises(ConfigError, match=words):
        columns_to_cut(batch, 2)


def test_rows_that_are_right():
    check_rows({"input_ids": IDS, "position_ids": torch.arange(8)[None], "attention_mask": torch.ones_like(IDS)})
    check_rows({"input_ids": IDS, "max_length": 8, "labels": IDS, "row_ids": IDS})


def bamba():
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return BambaForCausalLM(
        BambaConfig(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_indices=[0],
            mamba_n_heads=8,
            mamba_d_head=8,
        )
    )


def stretched(kind, **options):
    return llama(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **options})


MODELS = {
    "a state": (bamba, "BambaForCausalLM carries a state along a row"),
    "a learned prompt": (
        lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "PEFT puts 3 virtual tokens before each part",
    ),
    "dynamic": (lambda: stretched("dynamic"), "rotary embeddings of type dynamic"),
    "longrope": (
        lambda: stretched(
            "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=128
        ),
        "rotary embeddings of type longrope",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_which_parts_would_be_wrong(name):
    make, words = MODELS[name]
    with pytest.raises(ConfigError, match=words):
        refuse_uncuttable(make(), compiled=False)


def test_models_of_which_parts_are_right():
    for model in (llama(), mixtral(), stretched("linear")):
        refuse_uncuttable(model, compiled=False)
    with pytest.raises(ConfigError, match="torch_compile"):
        refuse_uncuttable(llama(), compiled=True)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_counts_places_by_itself(adapted):
    """Each part would have the places 0, 1, ... of its own."""
    sizes = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    models = BartForCausalLM(BartConfig(vocab_size=32, **sizes)), llama()
    if adapted:
        models = [get_peft_model(model, LoraConfig(target_modules=["q_proj"])) for model in models]
    refuse_uncuttable(models[1], compiled=False)
    with pytest.raises(
        ConfigError, match="BartForCausalLM takes no position_ids, so that each part .*; set cp_size to 1"
    ):
        refuse_uncuttable(models[0], compiled=False)


def test_the_balance_of_experts_is_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, model=mixtral())
    batch = run.data_collator(chats(2))
    monkeypatch.setattr(run.accelerator.state, "parallelism_config", ParallelismConfig(cp_size=2))
    with pytest.raises(ConfigError, match="output_router_logits=False"):
        run.compute_loss(run.model, batch, num_items_in_batch=1)


# -- four processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts_of_rows")
    return SimpleNamespace(folder=folder, of=parts_of_rows.start(folder))


def by_hand(rows):
    """Nats of the trained tokens of each row, and their weights."""
    model = llama()
    found = []
    for row in rows:
        encoded = row if "labels" in row else encode_row(TOKENIZER, row)
        nats, labels = nats_of(model, encoded["input_ids"]), encoded["labels"]
        places = [i for i in range(1, len(labels)) if labels[i] != -100]
        weights = encoded.get("loss_weights") or [1.0] * len(labels)
        found.append(([nats[i - 1] for i in places], [weights[i] for i in places]))
    return found


def weighed_by_autograd():
    model = llama().double()
    total = weight = 0
    for row in parts_of_rows.weighed():
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels, weights = torch.tensor(row["labels"][1:]), torch.tensor(row["loss_weights"][1:])
        total = total + (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
        weight += float(weights[labels != -100].sum())
    (total / weight).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), [("plain", by_autograd), ("weighed", weighed_by_autograd)])
def test_gradient_of_a_step(four_processes, name, make):
    expected = make()
    scale = max(float(g.abs().max()) for g in expected.values())
    for rank in range(parts_of_rows.PROCESSES):
        found = torch.load(four_processes.folder / "step" / f"{name}_{rank}.pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key].double(), value, rtol=0, atol=1e-6 * scale), key


@pytest.mark.slow
def test_logs_of_a_step(four_processes):
    rows = [encode_row(TOKENIZER, row) for row in chats(8)]
    for name, given in (("plain", chats(8)), ("weighed", parts_of_rows.weighed())):
        counted = by_hand(given)
        nats = [value for own, _ in counted for value in own]
        weights = [value for _, own in counted for value in own]
        for logs in (outcome[name] for outcome in four_processes.of["step"]):
            mean = sum(a * b for a, b in zip(nats, weights, strict=True)) / sum(weights)
            assert logs["loss"] == pytest.approx(mean, rel=1e-6)
            assert logs["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
            assert logs["num_supervised_tokens"] == len(nats)
            assert logs["num_tokens_seen"] == sum(len(row["input_ids"]) for row in rows)
            for source, own in (("even", counted[::2]), ("odd", counted[1::2])):
                values = [value for part, _ in own for value in part]
                assert logs[f"loss/{source}"] == pytest.approx(sum(values) / len(values), rel=1e-6)
            assert logs["stops"] == [TOKENIZER.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.slow
def test_evaluation_counts_each_row_once(four_processes):
    counted = by_hand(chats())
    nats = [value for own, _ in counted for value in own]
    odd = [value for own, _ in counted[1::2] for value in own]
    for metrics in (outcome[when] for outcome in four_processes.of["evaluate"] for when in ("before", "after")):
        assert metrics["eval_num_tokens"] == len(nats)
        assert metrics["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
        assert metrics["eval_odd_loss"] == pytest.approx(sum(odd) / len(odd), rel=1e-6)
        assert metrics["eval_odd_num_tokens"] == len(odd)


@pytest.mark.slow
def test_a_mixture_is_read_once_by_each_group(four_processes):
    rows = taken(mixture(), 24)  # three steps of two micro-batches of two rows in each of two groups
    for rank, outcome in enumerate(four_processes.of["stream"]):
        group = rank // 2
        expected = [row for i, row in enumerate(rows) if i // 2 % 2 == group]
        assert [tuple(row) for row in outcome["rows"]][:12] == expected
        assert outcome["taken"] == 24 and outcome["batch_rows"] == 4


@pytest.mark.slow
def test_a_bad_row_stops_all_and_is_named_by_those_that_had_it(four_processes):
    outcomes = four_processes.of["not_finite"]
    assert {outcome["step"] for outcome in outcomes} == {3}
    assert all("stopped before the weights changed" in outcome["stopped"] for outcome in outcomes)
    assert ["row 5" in outcome["stopped"] and "Zap" in outcome["stopped"] for outcome in outcomes] == [
        False,
        False,
        True,
        True,
    ]
