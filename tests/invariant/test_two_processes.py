"""Two processes give the numbers, the gradient, the steps and the stop of one."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from tests.support import dpo_worlds, reward_worlds
from tests.support.language_models import TOKENIZER, answer_five, by_autograd, chats, llama, mixtral, trainer
from tests.support.monitored_runs import BAD, events
from tests.support.ppo_acts import layout_figures, ppo_layouts, ppo_steps
from tests.support.two_processes import start, steps_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The outcomes of all acts, see `tests/support/two_processes.py`."""
    return start(tmp_path_factory.mktemp("two_processes"))


def test_evaluation(two_processes, tmp_path):
    expected = trainer(tmp_path, per_device_eval_batch_size=1).evaluate()
    for outcome in two_processes.of("evaluate"):
        assert len(outcome) == 4
        for metrics in outcome.values():
            assert metrics["eval_num_tokens"] == expected["eval_num_tokens"]
            for key in ("eval_loss", "eval_even_loss", "eval_odd_loss", "eval_stop_probability"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-6)


def test_answers(two_processes):
    figures, said = answer_five()
    assert len({*said}) == 5 and figures["answers_cut"] == 1.0
    for found, texts in two_processes.of("answers"):
        assert found == figures and [tuple(pair) for pair in texts] == said  # in the order of the prompts


def test_gradient(two_processes):
    expected = by_autograd()
    scale = max(float(g.abs().max()) for g in expected.values())
    for rank in (0, 1):
        found = torch.load(two_processes.folder / "gradient" / f"gradient_{rank}.pt")
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value, atol=1e-5 * scale), name


def test_mixture_of_experts_and_a_stream(two_processes):
    """The balance of experts is a mean over ranks, the loss of tokens one sum over both; a stream is read row by row."""
    collators = {
        "padded": DataCollatorForAssistantOnlyLM(TOKENIZER),
        "stream": DataCollatorWithEosPacking(TOKENIZER, max_length=400),
    }
    first, second = two_processes.of("experts")
    for name, collator in collators.items():
        model, nats, tokens, balance = mixtral(), 0.0, 0, []
        # Where batches are dealt to ranks in turn, or rows of a stream in parts of four, rank 0 has the first four rows.
        for part in (chats(8)[:4], chats(8)[4:]):
            batch = collator(part)
            with torch.no_grad():
                output = model(**batch, use_cache=False)
            count = int((batch["labels"][:, 1:] != -100).sum())
            nats += float(output.loss - 0.3 * output.aux_loss) * count
            tokens += count
            balance.append(float(output.aux_loss))
        mean = sum(balance) / 2
        for log in (first[name], second[name]):
            assert log["num_supervised_tokens"] == tokens
            assert log["aux_loss"] == pytest.approx(mean, rel=1e-6)
            assert log["loss"] == pytest.approx(nats / tokens + 0.3 * mean, rel=1e-6)


def test_fsdp2_trains_saves_and_resumes_like_ddp(two_processes, tmp_path):
    outcome = two_processes.of("sharded")[0]
    assert (
        "head and loss in one" not in two_processes.stderr
    )  # the warning of a model whose logits are computed after all
    for tied in ("untied", "tied"):
        whole, resumed = outcome[f"arguments {tied}"]["losses"]
        evaluated = outcome[f"arguments {tied}"]["evaluations"][0]
        assert whole == resumed and len(whole) == 4 and whole[3] < whole[0]
        found = outcome[f"on_shards {tied}"]
        assert found["before"] == pytest.approx(outcome[f"arguments {tied}"]["before"], rel=1e-6)
        assert found["before"] == pytest.approx(
            trainer(tmp_path, model=llama(tie_word_embeddings=tied == "tied")).evaluate()["eval_loss"], rel=1e-6
        )
        for losses in found["losses"]:
            assert losses == pytest.approx(whole, rel=1e-5)
        assert found["evaluations"] == pytest.approx([evaluated] * 2, rel=1e-6)
        model = AutoModelForCausalLM.from_pretrained(two_processes.folder / "sharded" / f"on_shards {tied}" / "final")
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (tied == "tied")
        assert trainer(tmp_path, model=model).evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.parametrize("act", ["not_finite", "not_finite_sharded"])
def test_a_bad_row_on_one_rank_stops_both(two_processes, act):
    outcomes = two_processes.of(act)
    assert all("stopped before the weights changed" in outcome["stopped"] for outcome in outcomes)
    assert outcomes[0]["step"] == outcomes[1]["step"] and all(outcome["same"] for outcome in outcomes)
    assert sum("row 5" in outcome["stopped"] and "Zap" in outcome["stopped"] for outcome in outcomes) == 1
    reports = sorted((two_processes.folder / act).glob("non_finite_step_*_rank_*.json"))
    assert len(reports) == 2
    assert len(chats()) == 23


@pytest.mark.slow
def test_evaluation_and_training_logs_of_pairs(two_processes, tmp_path):
    """The last batch of one rank repeats rows."""
    first, second = two_processes.of("dpo")
    models = two_processes.folder / "dpo"
    rows = Dataset.from_list(dpo_worlds.PAIRS[:7])
    reference = {"ref_model": dpo_worlds.load(models / "other")}
    expected = dpo_worlds.ours(
        dpo_worlds.load(models / "model"), tmp_path / "one", tests=rows, trainer=reference
    ).evaluate()
    assert expected["eval_num_pairs"] == 7
    counted = [key for key in expected if not any(word in key for word in ("runtime", "_second", "preparation"))]
    assert len(counted) == 24
    for outcome in (first, second):
        for source in ("rows", "stream", "packed", "unnumbered"):
            for key in counted:
                assert outcome[source][key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), (source, key)
    # Two ranks of two rows see the eight rows that one process of four sees, in the same steps.
    run = dpo_worlds.ours(str(models / "model"), tmp_path / "run", max_steps=2, per_device_train_batch_size=4)
    run.train()
    for log, both in zip([log for log in run.state.log_history if "loss" in log], first["logs"], strict=True):
        for side in ("chosen", "rejected"):
            assert both[f"logps_change/{side}"] == pytest.approx(log[f"logps_change/{side}"], rel=1e-4, abs=1e-7)
    assert first["logs"][1]["logps_change/chosen"] == second["logs"][1]["logps_change/chosen"] != 0


@pytest.mark.slow
def test_a_reward_model_of_packed_and_of_padded_pairs(two_processes, tmp_path):
    """Two ranks of four rows log what one process of eight does, with each prompt computed once or twice."""
    run = reward_worlds.trainer(tmp_path)
    run.train()
    expected = run.state.log_history
    assert [log["eval_num_pairs"] for log in expected if "eval_num_pairs" in log] == [7, 7]
    assert abs(expected[-2]["eval_loss"] - expected[1]["eval_loss"]) > 1e-4  # it learns
    for outcome in two_processes.of("rewards"):
        for found in outcome.values():
            assert len(outcome) == 2 and len(found) == len(expected)
            for log, both in zip(expected, found, strict=True):
                for key, value in log.items():
                    if not any(word in key for word in ("time", "per_second", "flos")):
                        assert both[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_ppo_steps(two_processes, tmp_path):
    expected_logs = ppo_steps(tmp_path)
    expected = torch.load(tmp_path / "ppo_0.pt")
    for rank, logs in enumerate(two_processes.of("ppo_steps")):
        found = torch.load(two_processes.folder / "ppo_steps" / f"ppo_{rank}.pt")
        for name, weights in expected.items():
            for key, value in weights.items():
                assert torch.allclose(found[name][key], value, atol=1e-6), (rank, name, key)
            assert len(logs[name]) == len(expected_logs[name]) == 5
            for log, one in zip(logs[name], expected_logs[name], strict=True):
                assert log.keys() == one.keys()
                assert log == pytest.approx(one, rel=1e-4, abs=1e-5), (rank, name)
    for logs in expected_logs.values():
        figures = [log for log in logs if "kl_coef" in log]
        assert figures[0]["rewards/missing"] == 1 and figures[1]["kl_coef"] != figures[0]["kl_coef"]


@pytest.mark.slow
def test_ppo_in_every_layout(two_processes, tmp_path):
    """The same answers, token for token, and the same figures of each step and evaluation."""
    first, second = two_processes.of("ppo_layouts")
    for name, runs in ppo_layouts(tmp_path).items():
        for layout, run in first[name].items():
            assert layout_figures(second[name][layout]) == layout_figures(run)
            halves = {part: zip(run[part], second[name][layout][part], strict=True) for part in ("steps", "evaluated")}
            both = {part: [one + other for one, other in pairs] for part, pairs in halves.items()}
            runs[f"two processes of {layout}"] = {**run, **both}
        whole = runs.pop("8 x 1")
        expected, answers = layout_figures(whole), [answer for step in whole["steps"] for _, answer in step]
        assert len(runs) == 3 and len(whole["steps"]) >= 6 and len({*map(tuple, answers)}) > 15
        number = 11 * (2 if name == "minibatches" else 1)  # without the rows that fill up a last batch
        for layout, run in runs.items():
            for step, one in zip(run["steps"], whole["steps"], strict=True):
                assert sorted(step) == sorted(one), (name, layout)
            evaluated, expected_ones = ([row for batch in one["evaluated"] for row in batch] for one in (run, whole))
            assert evaluated[:number] == expected_ones[:number], (name, layout)
            figures = layout_figures(run)
            assert figures.keys() == expected.keys() and len(figures) > 150
            for key, value in figures.items():  # a policy loss is 0 up to rounding at first
                assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-7), (name, layout, key)


def test_checkpoints_of_two_processes(two_processes):
    """Whole on both or on none: half a random state of rank 1, and no space there while rank 0 has written."""
    folder = two_processes.folder / "checkpoints"
    for outcome in two_processes.of("checkpoints"):
        assert outcome["best"] == str(folder / "whole" / "checkpoint-6")
        assert outcome["resumed"] == outcome["losses"] and len({*outcome["losses"]}) == 6
        manifest = json.loads(outcome["manifest"])
        assert manifest["processes"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
        assert outcome["full"].startswith(f"no space left to write checkpoint-4 in {folder / 'full'} ([Errno 28]")
        assert outcome["left"] == ["checkpoint-2"]
    assert "checkpoint-4; passed over: checkpoint-6 (rng_state_1.pth has 1000 bytes" in two_processes.stderr


def test_rows_after_a_resume(two_processes, tmp_path):
    """With eight rows a step two processes and one go on with the same rows, however they are split."""
    outcomes = two_processes.of("resumed_rows")

    def steps(name: str) -> list[list]:
        return [sorted(both[0] + both[1]) for both in zip(*(outcome[name] for outcome in outcomes), strict=True)]

    whole, checkpoint = steps("whole"), two_processes.folder / "resumed_rows" / "checkpoint-4"
    assert len(whole) == 6 and whole[4] != whole[5] and steps("resumed") == whole[4:]
    one = trainer(tmp_path, max_steps=6, per_device_train_batch_size=8)
    assert [sorted(step) for step in steps_of(one, str(checkpoint))][:1] == whole[4:5]
    for outcome in outcomes:
        assert "4 x 1 x 2 = 8 rows a step, this run with 8 x 1 x 2 = 16 rows a step" in outcome["refused"]


def test_sigterm_to_one_ends_both_with_a_checkpoint(two_processes):
    for outcome in two_processes.of("terminated"):
        assert outcome == {"code": 75, "step": 3, "left": ["checkpoint-3"]}


def test_checkpoints_in_shards(two_processes):
    for outcome in two_processes.of("sharded_checkpoints"):
        assert {f"{part}_0/__{rank}_0.distcp" for part in ("optimizer", "pytorch_model_fsdp") for rank in (0, 1)} < {
            *outcome["listed"]
        }
        assert outcome["resumed"] == outcome["losses"] and len({*outcome["losses"]}) == 4
    assert "checkpoint-2; passed over: checkpoint-4 (optimizer_0/__1_0.distcp has" in two_processes.stderr


def test_a_monitor_leaves_out_the_same_step(two_processes):
    first, second = two_processes.of("skip")[0]["weights"]
    assert first == second
    assert f"step {BAD}: left out" in two_processes.stderr
    folder = two_processes.folder / "skip"
    assert {f"step_{BAD}_rank_0", f"step_{BAD}_rank_1"} == set(events(folder))
    blocked = json.loads((folder / "diagnostics" / "blocklist.json").read_text())
    assert blocked == {"web": [2 * (BAD - 1), 2 * BAD - 1]}  # of both ranks, in the one file that a mixture reads
