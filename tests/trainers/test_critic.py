"""The critic: values of the states that tokens were chosen from, where its weights come from, and its optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, get_linear_schedule_with_warmup

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.critic import Critic, CriticOptimizer, decoder_of
from hf_objectives.trainers.ppo_config import PPOConfig

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = [[5, 6, 7], [8], [3, 9]]
ANSWERS = [[4, 1], [2, 2, 6, 1], [7, 3, 3]]


def llama(kind=LlamaForCausalLM, seed: int = 0, **options):
    torch.manual_seed(seed)
    return kind(LlamaConfig(vocab_size=12, **{**SIZES, **options})).eval()


def with_head(critic: Critic) -> Critic:
    torch.manual_seed(3)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.constant_(critic.head.bias, 0.25)
    return critic


def adapted(policy):
    torch.manual_seed(1)
    model = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.eval()


def batch():
    """Prompts padded to the left, answers to the right, as TRL does."""
    left, right = max(map(len, PROMPTS)), max(map(len, ANSWERS))
    rows = list(zip(PROMPTS, ANSWERS, strict=True))
    ids = [[0] * (left - len(p)) + p + a + [0] * (right - len(a)) for p, a in rows]
    mask = [[0] * (left - len(p)) + [1] * (len(p) + len(a)) + [0] * (right - len(a)) for p, a in rows]
    return torch.tensor(ids), torch.tensor(mask), right


def values_alone(backbone, head) -> list[list[float]]:
    """Each conversation by itself, without padding: the state before a token is that of the token before it."""
    values = []
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            states = backbone(torch.tensor([prompt + answer])).last_hidden_state[0]
            values.append(
                [float(states[len(prompt) - 1 + t] @ head.weight[0] + head.bias[0]) for t in range(len(answer))]
            )
    return values


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_values_are_those_of_the_states_before_each_token(kind, lora):
    policy = adapted(llama()) if lora else llama()
    critic = with_head(Critic.of(policy, kind))
    ids, mask, width = batch()
    with torch.no_grad():
        if kind == "separate":
            values = critic.read(ids, mask, width)
        else:
            with critic.watching(policy, width) as seen:
                policy(ids, attention_mask=mask)
                policy(ids[:1], attention_mask=mask[:1])
            assert [len(one) for one in seen] == [3, 1]
            values = seen[0]
            policy(ids)
            assert len(seen) == 2  # no longer watched
    assert values.shape == (3, width) and values.dtype == torch.float32
    backbone = decoder_of(policy)  # with adapters inside, where there are some
    for found, expected in zip(values.tolist(), values_alone(backbone, critic.head), strict=True):
        assert found[: len(expected)] == pytest.approx(expected, abs=1e-5)


def test_a_first_value_is_zero_and_none_is_none():
    policy = llama()
    ids, mask, width = batch()
    critic = Critic.of(policy, "separate")
    assert critic.read(ids, mask, width).abs().max() == 0
    assert Critic.of(policy, "none") is None


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_separate_critic_shares_nothing_with_the_policy(lora):
    policy = adapted(llama()) if lora else llama()
    before = copy.deepcopy(policy.state_dict())
    critic = with_head(Critic.of(policy, "separate"))
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not any("lora" in name for name, _ in critic.named_parameters())
    ids, mask, width = batch()
    critic.read(ids, mask, width).sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_the_head_of_a_shared_critic_may_learn_alone():
    policy = llama()
    critic = with_head(Critic.of(policy, "shared"))
    ids, mask, width = batch()
    with torch.no_grad(), critic.watching(policy, width, alone=True) as seen:
        policy(ids, attention_mask=mask)
    seen[0].sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert all(parameter.grad is None for parameter in policy.parameters())
    with torch.no_grad(), critic.watching(policy, width) as seen:
        policy(ids, attention_mask=mask)
    assert not seen[0].requires_grad


def test_a_shared_critics_gradient_reaches_the_policy():
    policy = llama()
    critic = with_head(Critic.of(policy, "shared"))
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    ids, mask, width = batch()
    with critic.watching(policy, width) as seen:
        policy(ids, attention_mask=mask)
    seen[0].sum().backward()
    assert all(parameter.grad is not None for parameter in policy.model.parameters())


def test_autocast_leaves_values_in_full_precision():
    policy = llama()
    critic = with_head(Critic.of(policy, "separate"))
    torch.nn.init.constant_(critic.head.bias, 1000.0)  # bfloat16 knows 1000 and 1004
    ids, mask, width = batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = critic.read(ids, mask, width)
    assert values.dtype == torch.float32
    expected = [value for one in values_alone(critic.backbone, critic.head) for value in one]
    assert values[batch()[1][:, -width:].bool()].tolist() == pytest.approx(expected, abs=0.2)


def test_a_critic_from_a_reward_model():
    policy, rewards = llama(), llama(LlamaForSequenceClassification, seed=5, num_labels=1, hidden_size=8)
    torch.nn.init.normal_(rewards.score.weight)
    rewards.requires_grad_(False)
    critic = Critic.of(policy, "separate", rewards)
    ids, mask, width = batch()
    values = critic.read(ids, mask, width)
    with torch.no_grad():
        # Its value before the token after a text is the reward of the text.
        text = torch.tensor([PROMPTS[0] + ANSWERS[0][:1]])
        rewards.config.pad_token_id = 0
        assert float(values[0, 1]) == pytest.approx(float(rewards(text).logits[0, 0]), abs=1e-5)
        for parameter in critic.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
        # It may be what gives the rewards: it stays as it is.
        again = llama(LlamaForSequenceClassification, seed=5, num_labels=1, hidden_size=8)
        assert torch.equal(rewards.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not any(parameter.requires_grad for parameter in rewards.parameters())


def test_critics_that_cannot_be():
    with pytest.raises(ConfigError, match="critic_model is given and critic is 'shared'; expected 'separate'"):
        Critic.of(llama(), "shared", llama())
    with pytest.raises(
        ConfigError, match="critic_model has 12 token embeddings, the policy 13; expected one vocabulary"
    ):
        policy = llama()
        policy.resize_token_embeddings(13)
        Critic.of(policy, "separate", llama())


# -- the optimizer ---------------------------------------------------------------------------------------------------


def optimizer(critic, folder, steps=6, **options) -> CriticOptimizer:
    settings = {"learning_rate": 1e-3, "critic_learning_rate": 0.05, "max_grad_norm": 0.5, "warmup_steps": 2}
    args = PPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **{**settings, **options})
    decayed = [name for name, parameter in critic.named_parameters() if parameter.dim() > 1]
    return CriticOptimizer(critic, args, llama(), steps, decayed=decayed)


def step(critic, run) -> None:
    ids, mask, width = batch()
    target = torch.arange(float(width))
    ((critic.read(ids, mask, width) - target).square() * mask[:, -width:]).sum().backward()
    run.step()


def test_it_is_adamw_with_its_own_rate_the_schedule_and_the_clip(tmp_path):
    critic = with_head(Critic.of(llama(), "separate"))
    twin = copy.deepcopy(critic)
    ours = optimizer(critic, tmp_path)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.0, eps=1e-5)
    schedule = get_linear_schedule_with_warmup(plain, 2, 6)

    class Plain:
        def step(self):
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            plain.step()
            schedule.step()
            plain.zero_grad()

    rates = []
    for _ in range(4):
        rates.append(ours.scheduler.get_last_lr()[0])
        step(critic, ours)
        step(twin, Plain())
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in critic.parameters())
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.0375])
    for a, b in zip(critic.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    other = optimizer(critic, tmp_path, critic_learning_rate=None, warmup_steps=0)
    assert {*other.scheduler.get_last_lr()} == {1e-3}


def test_norms_and_biases_do_not_decay(tmp_path):
    """AdamW without a gradient's share: with gradients of 0 a weight that decays is multiplied by 1 - lr * decay."""
    critic = with_head(Critic.of(llama(), "separate"))
    before = copy.deepcopy(critic.state_dict())
    run = optimizer(critic, tmp_path, weight_decay=0.5, critic_learning_rate=0.1, warmup_steps=0)
    for parameter in critic.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.step()
    for name, value in critic.state_dict().items():
        kept = "norm" in name or name.endswith("bias")
        assert torch.allclose(value, before[name] * (1.0 if kept else 0.95)), name
    assert "backbone.norm.weight" in before and "backbone.layers.1.input_layernorm.weight" in before


def test_a_step_without_gradients_moves_the_schedule_alone(tmp_path):
    critic = with_head(Critic.of(llama(), "separate"))
    run = optimizer(critic, tmp_path, weight_decay=0.5)
    for _ in range(3):
        step(critic, run)
    before, rate = (
        copy.deepcopy([critic.state_dict(), run.optimizer.state_dict()["state"]]),
        run.scheduler.get_last_lr(),
    )
    run.step()
    assert all(torch.equal(value, before[0][name]) for name, value in critic.state_dict().items())
    for place, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][place][name]) for name, value in state.items())
    assert rate == pytest.approx([0.0375] * 2) and run.scheduler.get_last_lr() == pytest.approx([0.025] * 2)


def test_the_weight_of_the_loss_matters_through_clip_and_epsilon_alone(tmp_path):
    """A separate critic under Adam: m / sqrt(v) of gradients times c is that of the gradients."""

    def after(weight: float, **options) -> torch.Tensor:
        critic = with_head(Critic.of(llama(), "separate"))
        run = optimizer(critic, tmp_path, warmup_steps=0, **options)
        ids, mask, width = batch()
        for target in (0.0, 30.0, -1.0):
            loss = ((critic.read(ids, mask, width) - target).square() * mask[:, -width:]).sum()
            (weight * loss).backward()
            run.step()
        return torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])

    free = {"max_grad_norm": 0.0, "adam_epsilon": 1e-12, "critic_learning_rate": 0.01}
    assert torch.allclose(after(0.1, **free), after(1.0, **free), atol=1e-4)
    for name, value in {"max_grad_norm": 1.0, "adam_epsilon": 1.0}.items():
        given = {**free, name: value}
        assert not torch.allclose(after(1e-4, **given), after(1.0, **given), atol=1e-3), name


def test_it_goes_on_from_a_file_to_the_last_bit(tmp_path):
    critic = with_head(Critic.of(llama(), "separate"))
    run = optimizer(critic, tmp_path)
    step(critic, run)
    step(critic, run)
    run.save(tmp_path)
    resumed = Critic.of(llama(seed=9), "separate")
    again = optimizer(resumed, tmp_path)
    again.load(tmp_path)
    for one, of in ((critic, run), (resumed, again)):
        step(one, of)
        step(one, of)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), resumed.parameters(), strict=True))


def test_files_of_another_run(tmp_path):
    critic = Critic.of(llama(), "separate")
    with pytest.raises(ConfigError, match=r"has no critic\.pt; it is no checkpoint of a PPO run with a critic"):
        optimizer(critic, tmp_path).load(tmp_path)
    optimizer(critic, tmp_path).save(tmp_path)
    shared = Critic.of(llama(), "shared")
    with pytest.raises(ConfigError, match="is of another kind: 0 weights are missing, 20 too many"):
        optimizer(shared, tmp_path).load(tmp_path)
