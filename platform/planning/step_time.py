"""Time of a training step on a device, from its FLOPs, bytes and messages, known without torch (docs/planning.md).

The shares of a device's peaks that attention, products and elementwise work reach are those that explain both rows that
were measured on an H100 (benchmarks/README.md); on other devices they are assumed to be the same.
"""

from dataclasses import dataclass

from domainshuttle.cluster.devices import Device
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.model.spec import ModelSpec
from domainshuttle.platform.config.schema import StageSection
from domainshuttle.platform.planning.memory import Policy, States

_ATTENTION_FORWARD, _ATTENTION_BACKWARD, _PRODUCTS = 0.60, 0.52, 0.71
"""Of the peak in bf16: on an H100 595 and 516 TFLOP/s of attention (cuDNN, by FlashAttention-3's paper), 700 of
products."""
_RUN_AGAIN = 1.25
"""FLOPs of attention's backward kernel against what the mathematics needs: it computes the scores again."""
_ELEMENTWISE = 0.84
"""Of the memory's bandwidth: 2.8 TB/s of 3.35."""
_FORWARD_BYTES, _BACKWARD_BYTES = 229, 417
"""That elementwise operations of a block move for each token and channel; counted on meta tensors."""
_UPDATE_BYTES = 72
"""That norm, clipping, AdamW and the reduction's copies move for each trained parameter of a rank."""
_LINK = 0.75
"""Of a link's rate in one direction that a gather within a node reaches."""
_EXCHANGED = 4
"""Tensors of a block's attention that ranks exchange where they share a sample: queries, keys, values, the output."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a rank's micro-batch, by what takes them; `update` is once a step."""

    attention: float
    products: float
    elementwise: float
    update: float
    messages: float
    """Gathers and reductions, hidden or not."""
    exposed: float
    """Of these, what nothing hides."""
    exchanges: float = 0.0
    """Of tokens between the ranks that share a sample, which nothing hides."""

    @property
    def computing(self) -> float:
        return self.attention + self.products + self.elementwise

    @property
    def micro_batch(self) -> float:
        """Seconds of a micro-batch."""
        return max(self.computing + self.exposed, self.messages) + self.exchanges


@dataclass(frozen=True)
class Sample:
    """Of what a micro-batch is made, as far as it costs time and memory."""

    latent: tuple[int, int, int]
    references: int
    paired: int | None
    """References of the second set; None: no second forward."""
    text: int

    def tokens(self, spec: ModelSpec) -> int:
        """Of the larger of its two passes."""
        most = max(self.references, self.paired or 0)
        return spec.tokens(self.latent) + most * spec.reference_tokens(self.latent)

    def reference_share(self, spec: ModelSpec) -> float:
        """Of these tokens, those of references."""
        return 1 - spec.tokens(self.latent) / self.tokens(spec)


def bus_bandwidth(cluster: ClusterSpec, ranks: int) -> float:
    """Bytes/s of bus bandwidth of a gather over so many ranks: within a node its links', else also the network's."""
    inside = _LINK * cluster.device.link_bandwidth / 2
    return inside if ranks <= cluster.trainers.devices else min(inside, cluster.links.bus_bandwidth)


def gathers(stage: StageSection) -> int:
    """Passes of a micro-batch that gather all weights: forward, with that of the pair loss block by block, and
    backward; one more where the pair loss has a model of its own."""
    return 3 if stage.loss.cross_pair_weight and stage.loss.cross_pair_target == "snapshot" else 2


def step_time(
    spec: ModelSpec,
    stage: StageSection,
    states: States,
    policy: Policy,
    sample: Sample,
    batch: int,
    device: Device,
    ranks: int = 1,
    bus: float = 0.0,
    sharing: int = 1,
    exchange_bus: float = 0.0,
) -> StepTime:
    """Of a micro-batch of `batch` samples on one of `ranks` devices that gather at `bus` bytes/s, and of which each
    `sharing` share a sample's tokens, exchanged at `exchange_bus` bytes/s."""
    flops = spec.step_flops(
        sample.latent, batch=batch, references=sample.references, paired_references=sample.paired,
        text_tokens=sample.text, trained=stage.patterns, recompute=True,
    )  # fmt: skip
    layers = spec.num_layers
    tokens = spec.tokens(sample.latent) + sample.references * spec.reference_tokens(sample.latent)
    of_block = spec.product_flops(tokens, batch)
    share = policy.recomputed / layers
    again_attention = policy.recomputed * of_block["attention"] + share * (
        flops.attention_forward - layers * of_block["attention"]
    )
    again_products = share * (flops.recompute - flops.attention_forward)
    for product, count in policy.kept.items():
        if product == "attention":
            again_attention -= count * of_block[product]
        else:
            again_products -= count * of_block[product]
    peak = device.flops
    attention = (flops.attention_forward + flops.attention_frozen + again_attention) / (_ATTENTION_FORWARD * peak)
    attention += _RUN_AGAIN * flops.attention_backward / (_ATTENTION_BACKWARD * peak)
    products = flops.model - flops.attention_forward - flops.attention_backward - flops.attention_frozen
    rows = batch * tokens
    paired = (
        0
        if sample.paired is None
        else batch * (spec.tokens(sample.latent) + sample.paired * spec.reference_tokens(sample.latent))
    )
    moved = layers * spec.dim * (_FORWARD_BYTES * (rows * (1 + share) + paired) + _BACKWARD_BYTES * rows)
    memory = _ELEMENTWISE * device.memory_bandwidth
    messages = exposed = 0.0
    if ranks > 1:
        apart = (ranks - 1) / ranks / bus
        gathered = gathers(stage) * states.pass_bytes * apart
        reduced = 4 * states.trained * apart  # in float32
        ahead = min(1.0, states.prefetched_elements / states.gathered_elements)
        messages, exposed = gathered + reduced, gathered * (1 - ahead)
    exchanges = 0.0
    if sharing > 1:
        # queries, keys, values and what comes out, in bf16: forward, again, backward, and those of the second set
        passes = (2 + share) * rows + paired
        exchanges = _EXCHANGED * 2 * layers * spec.dim * passes * (sharing - 1) / sharing**2 / exchange_bus
    return StepTime(
        attention=attention / sharing,
        products=(products + again_products) / (_PRODUCTS * peak) / sharing,
        elementwise=moved / memory / sharing,
        update=_UPDATE_BYTES * states.trained / ranks / memory,
        messages=messages,
        exposed=exposed,
        exchanges=exchanges,
    )
