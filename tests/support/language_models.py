"""Small language models, conversations and trainers for the tests of evaluation and trainers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_objectives.evaluation import Asked, evaluate_answers
from hf_objectives.labels import encode_row
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments
from tests.support.chat_corpus import byte_tokenizer

TOKENIZER = byte_tokenizer()


def llama(attention: str = "sdpa", **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,  # room for a few more control tokens
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation=attention,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def mixtral(**options) -> MixtralForCausalLM:
    """A mixture of experts that is trained with its auxiliary loss."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4,
    }  # fmt: skip
    return MixtralForCausalLM(
        MixtralConfig(**{**sizes, "router_aux_loss_coef": 0.3, "output_router_logits": True, **options})
    ).eval()


def nats_of(model, ids, scored=1):
    """Float64 negative log-likelihoods of ids[scored:], one document at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    log_p = logits.log_softmax(-1)
    return [-log_p[i - 1, ids[i]].item() for i in range(scored, len(ids))]


def chats(n: int = 23) -> list[dict]:
    """Conversations with very uneven numbers of trained tokens."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Count to {i}"},
                {"role": "assistant", "content": " ".join(map(str, range(1 + (i * 7) % 19)))},
            ],
            "source": "even" if i % 2 == 0 else "odd",
        }
        for i in range(n)
    ]


def arguments(folder, **options) -> PerplexityTrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
    }
    return PerplexityTrainingArguments(
        str(folder), **{**defaults, "save_strategy": "no", "disable_tqdm": True, **options}
    )


def trainer(folder, *, model=None, collator=None, rows=None, **options) -> PerplexityTrainer:
    return PerplexityTrainer(
        model or llama(),
        arguments(folder, **options),
        collator,
        train_dataset=rows or chats(),
        eval_dataset=chats(),
        processing_class=TOKENIZER,
    )


def by_autograd():
    """The gradient of the mean over all trained tokens of eight chats, one document at a time in float64."""
    model = llama().double()
    total = count = 0
    for row in chats(8):
        encoded = encode_row(TOKENIZER, row)
        labels = torch.tensor(encoded["labels"][1:])
        logits = model(torch.tensor([encoded["input_ids"]]), use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def answer_five() -> list:
    """The figures of five answered prompts, and what was said."""
    asked = [Asked([5, *range(7, 7 + i)], [8]) for i in range(5)]
    figures, said = evaluate_answers(llama(), TOKENIZER, asked, max_new_tokens=4, stop_ids=[], batch_size=2)
    return [figures, [(answer.prompt, answer.said) for answer in said]]


def poisoned():
    """A model whose loss is NaN for rows that hold a letter that no other row holds."""
    model = llama()
    letter = TOKENIZER.encode("Z")[0]
    hook = lambda module, args, output: output.masked_fill(  # noqa: E731
        args[0].eq(letter).any(-1)[:, None, None], float("nan")
    )
    model.model.embed_tokens.register_forward_hook(hook)
    return model


def rows_with_a_bad_one():
    rows = [{**row, "row": i} for i, row in enumerate(chats(8))]
    rows[5] = {**rows[5], "messages": [{"role": "user", "content": "Zap"}, rows[5]["messages"][1]]}
    return rows
