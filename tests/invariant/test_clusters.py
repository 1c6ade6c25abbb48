"""Loss, gradient norm and evaluation do not depend on ranks, hosts, shards, micro-batches, launchers, workers and resumes."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.support.cluster_runs import ROOT
from tests.support.clusters import FILES, Clusters, briefly, divided, from_files, resumed, two_hosts

BRIEF = (("pretraining", "mixture"), ("reward", "padding-free"), ("dpo", "padded"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_two_hosts_give_the_numbers_of_one_process(tmp_path):
    outcomes = [*briefly(Clusters(tmp_path, BRIEF, steps=4))]
    assert len(outcomes) == 6
    assert not [str(outcome) for outcome in outcomes if not outcome.equal]


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    return Clusters(tmp_path_factory.mktemp("clusters"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("part", "count"), [(divided, 90), (two_hosts, 10), (from_files, 20), (resumed, 35)])
def test_all_clusters_give_the_numbers_of_one_process(clusters, part, count):
    outcomes = [*part(clusters)]
    assert len(outcomes) == count
    assert not [str(outcome) for outcome in outcomes if not outcome.equal]


def test_files_for_accelerate():
    """All are read by accelerate. Those that a CPU can run are launched above; the head of the other says why it is not."""
    for path in (ROOT / "recipes" / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes >= 1
        assert (path.stem in FILES) != ("Not launched by a test" in path.read_text()), path.name
