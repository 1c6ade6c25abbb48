"""What goes into PPO: prompts of every format, and rewards of functions and models."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.trainers import reward_functions
from hf_objectives.trainers.reward_functions import RewardError
from tests.support.ppo_worlds import CHAT, EOS, LETTERS, ScriptedPPO, count_a, logged, ppo, small_model, words

SCRIPT = {"ask a": "b a <eos>", "ask b": "a a a <eos>", "ask c": "c <eos>", "ask d": "a b c d"}
ROWS = [{"prompt": prompt} for prompt in SCRIPT]
WHOLE = {"whiten_advantages": False, "beta": 0.0, "critic": "none", "lam": 1.0}  # an advantage is the reward to go


def scripted(folder, rows=None, **options):
    return ppo(
        folder, ROWS if rows is None else rows, **{"kind": ScriptedPPO, "script": SCRIPT, "max_steps": 1, **options}
    )


def generated(run) -> dict[str, torch.Tensor]:
    """The batch of answers to all prompts, in their order."""
    run.model.train()
    return run._generate_and_score_completions([dict(row) for row in run.train_dataset])


def later(completion_ids, **_):
    return [0.5 * len(ids) for ids in completion_ids]


async def later_async(**arguments):
    return later(**arguments)


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [later, later_async, lambda **kw: torch.tensor(later(**kw))])
def test_functions_add_up_by_their_weights(tmp_path, second):
    batch = generated(scripted(tmp_path, reward=[count_a, second], reward_weights=[2.0, 10.0], **WHOLE))
    # The reward to go of an answer's first token is its score: twice its a's and five times its tokens.
    assert batch["advantages"][:, 0].tolist() == [2 + 15, 6 + 20, 0 + 10, 2 + 20]
    assert batch["advantages"][0].tolist() == [17, 17, 17, 0]


def test_the_score_is_clipped_before_the_penalty_for_not_stopping(tmp_path):
    batch = generated(scripted(tmp_path, reward_clip_range=(0.5, 2.0), missing_eos_penalty=3.0, **WHOLE))
    assert batch["advantages"][:, 0].tolist() == [1, 2, 0.5, 1 - 3]


def test_padding_that_is_the_stop_token_hides_no_stop(tmp_path):
    tokenizer = words("ask", "a", "b", "c", "d", "e")
    tokenizer.pad_token = "<eos>"
    run = scripted(tmp_path, tokenizer=tokenizer, missing_eos_penalty=3.0, pad_to_multiple_of=8, **WHOLE)
    batch = generated(run)
    assert batch["advantages"][:, 0].tolist() == [1, 3, 0, 1 - 3]
    assert batch["loss_mask"].sum(dim=1).tolist() == [3, 4, 2, 4]  # the stop is an action too
    assert run._metrics["train"]["completions/finished"] == [0.75]


def test_every_stop_token_of_the_model_is_a_stop(tmp_path):
    model = small_model()
    model.generation_config.eos_token_id = [EOS, LETTERS.convert_tokens_to_ids("d")]
    batch = generated(scripted(tmp_path, model=model, missing_eos_penalty=3.0, **WHOLE))
    assert batch["advantages"][:, 0].tolist() == [1, 3, 0, 1]


def test_whitening(tmp_path):
    plain = generated(scripted(tmp_path, **WHOLE))
    used = plain["loss_mask"].bool()
    rewards = torch.zeros(4, 4)
    for i, (score, length) in enumerate(zip((1.0, 3.0, 0.0, 1.0), (3, 4, 2, 4), strict=True)):
        rewards[i, length - 1] = score
    white = (rewards - rewards[used].mean()) / rewards[used].std(correction=0) + rewards[used].mean()
    white = (white * used).flip(1).cumsum(1).flip(1) * used
    found = generated(scripted(tmp_path, whiten_rewards=True, **WHOLE))
    assert torch.allclose(found["advantages"], white, atol=1e-5)
    found = generated(scripted(tmp_path, **{**WHOLE, "whiten_advantages": True}))
    values = found["advantages"][used]
    assert float(values.mean()) == pytest.approx(0, abs=1e-6) and float(values.var(correction=0)) == pytest.approx(
        1, abs=1e-5
    )
    assert found["advantages"][~used].abs().max() == 0 and torch.equal(found["returns"], plain["returns"])


# -- rewards that are missing ----------------------------------------------------------------------------------------


def bad_on_c(value):
    def reward(prompts, completion_ids, **_):
        if isinstance(value, Exception) and "ask c" in prompts:
            raise value
        return [value if p == "ask c" else float(len(ids)) for p, ids in zip(prompts, completion_ids, strict=True)]

    return reward


def gradients(run) -> dict[str, torch.Tensor]:
    seen = {}
    keep = run._get_grad_norm

    def look(model, grad_norm=None):
        own = [*run.model.named_parameters(), *run.critic.named_parameters("critic")]
        seen.update({name: parameter.grad.clone() for name, parameter in own})
        return keep(model, grad_norm)

    run._get_grad_norm = look
    run.train()
    return seen


SPICED = {"beta": 0.3, "entropy_coef": 0.1, "whiten_rewards": True, "max_grad_norm": 0.0, "num_iterations": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "beside"),
    [(ValueError("no"), False), (math.nan, True), (None, False), (None, True)],
    ids=["raises alone", "nan beside another", "none alone", "none beside another"],
)
def test_an_answer_without_a_reward_has_no_influence(tmp_path, value, beside):
    """Whatever another function says of it, where one has failed; None says that a function has nothing to say."""
    functions = [bad_on_c(value), count_a] if beside else bad_on_c(value)
    run = scripted(tmp_path, reward=functions, reward_errors="missing", critic="shared", **SPICED)
    found = gradients(run)
    failed, left_out = value is not None, value is not None or not beside
    assert logged(run, "rewards/missing") == [left_out] and logged(run, "rewards/failed") == [failed]
    rows = [row for row in ROWS if row["prompt"] != "ask c"] if left_out else ROWS
    if not left_out:
        functions = [bad_on_c(0.0), count_a]  # a sum with nothing in it
    other = scripted(tmp_path, rows, reward=functions, per_device_train_batch_size=len(rows), critic="shared", **SPICED)
    expected = gradients(other)
    assert logged(other, "rewards/missing") == [0]
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, one in expected.items():
        assert torch.allclose(found[name], one, atol=1e-6), name


@pytest.mark.slow
def test_a_batch_without_any_reward_teaches_nothing(tmp_path):
    run = scripted(
        tmp_path, reward=lambda completion_ids, **_: [math.nan] * len(completion_ids), reward_errors="missing"
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in before.items())
    assert logged(run, "rewards/missing") == [4] and logged(run, "rewards/failed") == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bad_on_c(ValueError("no")), "raised ValueError: no; for row 2, answer . of 4, prompt 'ask c', answered 'c'"),
        (bad_on_c(math.nan), "returned nan for row 2, answer . of 4, prompt 'ask c'"),
        (lambda **_: [1.0], "returned 1 rewards for 4 answers"),
        (lambda **_: torch.zeros(4, device="meta"), "a tensor without values"),
    ],
)
def test_what_is_no_reward_is_an_error_that_names_the_row(tmp_path, function, message):
    with pytest.raises(RewardError, match=message):
        scripted(tmp_path, reward=function).train()


# -- reward models ---------------------------------------------------------------------------------------------------


def judge(vocab_size: int = len(LETTERS), **options):
    model = small_model(vocab_size, kind=LlamaForSequenceClassification, num_labels=1, **options)
    torch.nn.init.normal_(model.score.weight)
    return model


def saved(model, folder, tokenizer=LETTERS) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CHATS = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b c d e", "c c", "d")]
TEXTS = ["a ask b", "b c d e ask c c c", "c c ask", "d ask a b c d"]


@pytest.mark.parametrize("how", ["folder", "folder with another policy tokenizer", "instance"])
def test_a_reward_model_says_of_an_answer_in_a_batch_what_it_says_alone(tmp_path, how):
    """Whatever the policy's tokenizer, the judge reads the text with its own; here the words have other numbers."""
    theirs = words("e", "d", "c", "b", "a", "ask")
    theirs.chat_template = CHAT
    ours = words("ask", "b", "a", "c", "d", "e") if how.endswith("tokenizer") else LETTERS
    ours.chat_template = CHAT
    script = dict(
        zip(
            (text.rsplit(" ask", 1)[0] + " ask" for text in TEXTS),
            ("b <eos>", "c c c", "<eos>", "a b c d"),
            strict=True,
        )
    )
    model = judge(attention_dropout=0.5).train()
    given = model if how == "instance" else saved(model, tmp_path / "judge", theirs)
    own = {"reward_processing_classes": theirs} if how == "instance" else {}
    run = scripted(tmp_path, CHATS, reward=given, tokenizer=ours, script=script, **own)
    generated(run)
    model.eval()
    found = run._rewards[:, 0].tolist()
    # The template writes answers like questions, without the word that asks for one.
    expected = []
    with torch.no_grad():
        for chat, answer in zip(CHATS, ("b", "c c c", "", "a b c d"), strict=True):
            ids = theirs(f"{chat['prompt'][0]['content']} {answer}")["input_ids"]
            expected.append(float(model(torch.tensor([ids])).logits[0, 0]))
    assert len(set(expected)) == 4 and found == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_beside_a_function_reads_texts_with_the_eos_that_it_was_trained_with(tmp_path):
    """An answer in plain text ends in EOS where it stopped, as in `encode_pair`, and in nothing where it did not."""
    path = saved(judge(), tmp_path / "judge")
    run = scripted(
        tmp_path, reward=[path, count_a], reward_weights=[1.0, 100.0], normalize_reward_models=False, **WHOLE
    )
    batch = generated(run)
    model, expected = run.reward_funcs[0], []
    for prompt, answer in SCRIPT.items():
        said = answer.removesuffix(" <eos>")
        ids = LETTERS(f"{prompt}{said}")["input_ids"] + [EOS] * (said != answer)
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids])).logits[0, 0]) + 100 * said.split().count("a"))
    assert batch["advantages"][:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_reward_models_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="speaks has no score head; expected a reward model"):
        scripted(tmp_path, reward=saved(small_model(), tmp_path / "speaks"))
    path = saved(judge(), tmp_path / "judge")
    with pytest.raises(ConfigError, match="was given a tokenizer of 4 tokens that is not its own, of 8"):
        scripted(tmp_path, reward=path, reward_processing_classes=words("x", "y"))
    with pytest.raises(ConfigError, match="2 reward_processing_classes for 1 reward functions"):
        scripted(tmp_path, reward=path, reward_processing_classes=[LETTERS, LETTERS])
    with pytest.raises(ConfigError, match="reward function 1 is int; expected a function or a model"):
        scripted(tmp_path, reward=[count_a, 7])


@pytest.mark.slow
def test_a_reward_model_that_says_nan(tmp_path):
    model = judge()
    with torch.no_grad():
        model.model.embed_tokens.weight[LETTERS.convert_tokens_to_ids("c")] = math.nan
    given = {"reward": model, "reward_processing_classes": LETTERS}
    with pytest.raises(RewardError, match="says nan for answer . of 4, answered '"):
        scripted(tmp_path, **given).train()
    run = scripted(tmp_path, reward_errors="missing", **given)
    run.train()
    assert logged(run, "rewards/missing") == logged(run, "rewards/failed") == [1]  # of "ask d" and "a b c d"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["folder", "instance", "folder without a head"])
def test_a_critic_that_begins_as_the_reward_model(tmp_path, how):
    model = judge() if how != "folder without a head" else small_model(seed=4)
    folder = saved(model, tmp_path / "judge")
    run = scripted(tmp_path, critic_model=model if how == "instance" else folder, reward=count_a, learning_rate=0.1)
    assert run.critic.training and all(parameter.requires_grad for parameter in run.critic.parameters())
    assert torch.equal(run.critic.backbone.embed_tokens.weight, model.model.embed_tokens.weight)
    head = run.critic.head.weight
    assert torch.equal(head, model.score.weight) if how != "folder without a head" else not head.any()
    run.train()
    moved = not torch.equal(run.critic.backbone.embed_tokens.weight, model.model.embed_tokens.weight)
    assert moved if how != "folder without a head" else head.any()


# -- prompts ---------------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "a b"}
MIXED = [
    {"prompt": [ASKED]},
    {"messages": [ASKED, {"role": "assistant", "content": "c"}]},
    {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]},
    {
        "chosen": [ASKED, {"role": "assistant", "content": "c"}],
        "rejected": [ASKED, {"role": "assistant", "content": "d"}],
    },
    {"instruction": "a b", "output": "c"},
]


@pytest.mark.slow
def test_prompts_of_mixed_formats(tmp_path):
    seen = []

    def reward(prompts, completions, row, **_):
        seen.extend(zip(row, prompts, completions, strict=True))
        return [0.0] * len(prompts)

    run = scripted(tmp_path, MIXED, reward=reward, script={"a b ask": "c d <eos>"}, per_device_train_batch_size=5)
    run.train()
    said = [{"role": "assistant", "content": "c d"}]
    assert sorted(seen, key=lambda one: one[0]) == [(i, [ASKED], said) for i in range(5)]


def test_rows_that_cannot_be_prompts(tmp_path):
    with pytest.raises(FormatError, match="source 'train_dataset', row 1: "):
        ppo(tmp_path, [{"prompt": [ASKED]}, {"prompt": []}])
    with pytest.raises(FormatError, match="source 'eval_dataset', row 0: .*has no prompt"):
        ppo(tmp_path, eval_dataset=[{"text": "a document"}])


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_for_an_answer(tmp_path):
    rows = [{"prompt": "ask" + " a" * n} for n in (3, 27, 28, 29)]  # 32 positions, answers of 4
    message = (
        "the prompt of row 2 has 29 tokens, which with max_completion_length=4 is over the model's 32 positions: 'ask"
    )
    with pytest.raises(ConfigError, match=message):
        ppo(tmp_path, rows, shuffle_dataset=False).train()
    ppo(tmp_path, rows[:2] * 2).train()


def test_several_evaluation_sets_are_told_apart(tmp_path):
    sets = {"few": [{"prompt": "ask c", "worth": 1.0}], "many": [{"prompt": "ask d", "worth": 5.0}]}
    worth = {"reward": lambda worth, **_: worth}
    rows = [{"prompt": prompt, "worth": 0.0} for prompt in SCRIPT]
    run = scripted(tmp_path, rows, per_device_eval_batch_size=1, eval_dataset=sets, **worth)
    figures = run.evaluate()
    assert figures["eval_few_reward"] == 1.0 and figures["eval_many_reward"] == 5.0 and "eval_reward" not in figures
    assert run.evaluate(run.eval_dataset["many"])["eval_reward"] == 5.0


def test_policies_that_would_not_be_trained(tmp_path):
    with pytest.raises(ConfigError, match="no parameter of the policy requires a gradient"):
        scripted(tmp_path, model=small_model().requires_grad_(False))


def test_a_reward_model_by_name_gets_its_tokenizer_by_name(monkeypatch):
    model = judge()
    model.config._name_or_path = "org/judge"
    asked = []
    monkeypatch.setattr(reward_functions.AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or LETTERS)
    assert reward_functions.check_reward_model(model, None) is LETTERS and asked == ["org/judge"]
