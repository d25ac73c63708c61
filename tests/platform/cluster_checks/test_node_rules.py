"""A node or link that is wrong or slow is named, with what to do; those that are right pass."""

import dataclasses
from typing import Any

import pytest

from domainshuttle.cluster.devices import device_named
from domainshuttle.platform.cluster_checks.findings import Finding, PreflightError, Verdict, require_none_failed
from domainshuttle.platform.cluster_checks.group import judged_links, judged_steps, largest_batch
from domainshuttle.platform.cluster_checks.group_worker import Link, Steps, _groups, _rounds
from domainshuttle.platform.cluster_checks.node_facts import GpuFacts, NodeFacts, package_digest
from domainshuttle.platform.cluster_checks.node_rules import judged
from domainshuttle.platform.config.loading import load_cluster, load_config

VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "domainshuttle": "0.1.0 abc"}


def node(number: int, **changes: Any) -> NodeFacts:
    gpus = tuple(
        GpuFacts(
            index, "NVIDIA H100 80GB HBM3", f"GPU-{number}{index}", 0, False, False, (), 16, 16, 7e14, "same", 5e10
        )
        for index in range(2)
    )
    values: dict[str, Any] = {
        "host": f"n{number}", "node": f"{number}" * 8, "address": f"10.0.0.{number}", "time": 100.0,
        "versions": {**VERSIONS, "cuda": "13.0", "nccl": "2.29"}, "cpus": 8, "cpu_flops": 5e10, "memory": 1 << 36,
        "shared_memory": 1 << 36, "disks": {"/shared": 10**12}, "links": {"mlx5_0:1": "ACTIVE"},
        "hosts": {"mlflow": ""}, "held_gpus": 2, "gpus": gpus, "cuda": True,
    }  # fmt: skip
    return NodeFacts(**{**values, **changes})


def with_gpu(number: int, index: int, **changes: Any) -> NodeFacts:
    one = node(number)
    gpus = list(one.gpus)
    gpus[index] = dataclasses.replace(gpus[index], **changes)
    return dataclasses.replace(one, gpus=tuple(gpus))


def findings(third: NodeFacts) -> list[Finding]:
    return judged([node(1), node(2), third], VERSIONS, (99.0, 101.0), 2)


def test_nodes_that_are_well_pass_every_check() -> None:
    found = findings(node(3))
    assert {one.verdict for one in found} == {Verdict.PASS}
    assert {"GPU rate", "GPU results", "versions", "clocks", "network cards", "names"} <= {one.check for one in found}


def test_gpus_are_of_the_kind_that_the_description_names() -> None:
    nodes = [node(1), with_gpu(2, 1, name="NVIDIA A100-SXM4-80GB")]
    for name, wrong in (("H100", 1), ("A100", 3), ("H100 NVL", 4)):
        found = judged(nodes, VERSIONS, (99.0, 101.0), 2, device_named(name))
        kinds = [one for one in found if one.check == "GPUs" and one.verdict is Verdict.FAIL]
        assert len(kinds) == wrong and all(f"no {name}," in one.what for one in kinds)


FAULTS: dict[str, tuple[NodeFacts, str, str]] = {
    "another Ray": (node(3, versions={**VERSIONS, "ray": "2.59.0"}), "versions", "2.59.0"),
    "another tree": (node(3, versions={**VERSIONS, "domainshuttle": "0.1.0 abd"}), "versions", "abd"),
    "another NCCL": (node(3, versions={**VERSIONS, "cuda": "13.0", "nccl": "2.28"}), "versions", "2.28"),
    "a clock": (node(3, time=70.0), "clocks", "29.0 s off"),
    "a lost GPU": (node(3, gpus=node(3).gpus[:1]), "GPUs", "1 of 2"),
    "no CUDA": (node(3, gpus=(), cuda=False), "GPUs", "torch finds none"),
    "memory errors": (with_gpu(3, 1, uncorrected_errors=2), "GPU health", "GPU-31"),
    "a row": (with_gpu(3, 1, remap_failed=True), "GPU health", "could not be replaced"),
    "heat": (with_gpu(3, 1, slowed=("too hot",)), "GPU health", "too hot"),
    "PCIe": (with_gpu(3, 1, pcie_width=8), "GPU health", "x8 of x16"),
    "a slow GPU": (with_gpu(3, 1, flops=6.6e14), "GPU rate", "94%"),
    "wrong results": (with_gpu(3, 1, product_digest="other"), "GPU results", "computes wrongly"),
    "little shared memory": (node(3, shared_memory=64 << 20), "/dev/shm", "64 MiB"),
    "a disk": (node(3, disks={"/shared": "Read-only file system"}), "disks", "Read-only"),
    "a card": (node(3, links={"mlx5_0:1": "DOWN"}), "network cards", "mlx5_0:1 is DOWN, on 2 other nodes"),
    "a name": (node(3, hosts={"mlflow": "Name or service not known"}), "names", "mlflow is not found"),
}


@pytest.mark.parametrize(("third", "check", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_node_and_what_to_do(third: NodeFacts, check: str, expected: str) -> None:
    wrong = [one for one in findings(third) if one.verdict is not Verdict.PASS]
    assert {one.check for one in wrong} == {check} and all(one.verdict is Verdict.FAIL for one in wrong)
    assert all("n3 (10.0.0.3" in one.where and one.remedy for one in wrong)
    assert expected in wrong[0].line()
    with pytest.raises(PreflightError, match="n3"):
        require_none_failed(wrong)


def test_what_is_not_known_warns() -> None:
    found = [one for one in findings(node(3, nvml="nvidia-ml-py is not installed")) if one.verdict is not Verdict.PASS]
    assert [(one.verdict, one.check) for one in found] == [(Verdict.WARN, "GPU health")]


def links(slow: dict[frozenset[str], float]) -> list[Link]:
    names = "abcd"
    found = [Link("all-reduce", (one,), 8, 1 << 30, slow.get(frozenset(one), 4.6e11)) for one in names]
    for one in names:
        for other in names[names.index(one) + 1 :]:
            pair = frozenset((one, other))
            found.append(Link("all-reduce", (one, other), 16, 1 << 30, slow.get(pair, 3.7e11)))
    return [*found, Link("all-reduce", tuple(names), 32, 1 << 30, 3.7e11)]


def test_links_are_named_by_what_is_slow() -> None:
    def wrong(slow: dict[frozenset[str], float], bad: list[tuple[str, ...]] | None = None) -> list[Finding]:
        judgement = judged_links(
            links(slow), bad or [], load_cluster("h100-64"), lambda name: f"node {name}", gpus=True
        )
        return [one for one in judgement if one.verdict is not Verdict.PASS]

    assert wrong({}) == []
    inside = wrong({frozenset("c"): 2e11})
    assert any(one.where == "node c" and one.verdict is Verdict.FAIL and "NVLink" in one.remedy for one in inside)
    card = wrong({frozenset(("b", other)): 1e11 for other in "acd"})
    assert [(one.where, one.verdict) for one in card] == [("node b", Verdict.FAIL)]
    cable = wrong({frozenset("ad"): 1e11})
    assert [(one.where, one.verdict) for one in cable] == [("node a and node d", Verdict.WARN)]
    assert wrong({}, [("d",)])[0].what == "a sum over its GPUs came out wrong"


def test_each_node_meets_another_in_each_round_and_all_others_in_time() -> None:
    """Against all pairs, for which a tournament of n has n - 1 rounds."""
    for names in ("ab", "abc", "abcde"):
        rounds = [*_rounds(names)]
        assert all(len({one for pair in pairs for one in pair}) == 2 * len(pairs) for pairs in rounds)
        met = [pair for pairs in rounds for pair in pairs]
        assert len(set(met)) == len(met)
        if len(names) < 5:
            assert len(met) == len(names) * (len(names) - 1) // 2
    assert len([*_rounds("abcdefghijklmnop")]) == 4


def test_groups_are_the_same_for_all_ranks_and_cover_them() -> None:
    found = dict(_groups(["b", "a", "b", "c"]))
    assert found[("a",)] == (1,) and found[("b",)] == (0, 2)
    assert found[("a", "b")] == (1, 0, 2)
    assert found[("a", "b", "c")] == (0, 1, 2, 3)


def test_the_largest_batch_is_that_with_most_tokens() -> None:
    """Of the paper's recipe: clips of 81 frames at the size whose area is largest."""
    config = load_config("wan2.1-t2v-14b", ["data=/d", "output=/o"])
    stage, bucket = largest_batch(config)
    tokens = {one: one.latent_shape[1] * one.height * one.width for one in config.corpora["ditto"].parsed_buckets}
    assert stage.name == "stage2" and bucket.frames == 81
    references = stage.references * bucket.height * bucket.width
    assert all(size + stage.references * one.height * one.width <= tokens[bucket] + references
               for one, size in tokens.items())  # fmt: skip
    full = judged_steps(Steps(23.0, 78 << 30, 80 << 30, 3, "its GPU"), stage, bucket, "node n1")
    assert full.verdict is Verdict.WARN and "activations" in full.remedy
    assert judged_steps(Steps(23.0, 50 << 30, 80 << 30, 3, "its GPU"), stage, bucket, "").verdict is Verdict.PASS


def test_the_digest_is_of_these_sources() -> None:
    assert package_digest() == package_digest() and len(package_digest()) == 12
