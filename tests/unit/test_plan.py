"""What `dalle plan` works out, against the paper's own figures and against what training takes."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dalle import forecast, plan
from dalle.cluster import Choice, Cluster, size_in_bytes
from dalle.engine import Engine
from dalle.errors import ConfigError
from dalle.forecast import Memory, compression, cost, memory, paper_memory, traffic
from dalle.low_rank import compressed, paper_rank
from dalle.optim import AdamW, Average
from dalle.plan import _changes, cheaper, make_plan, propose
from dalle.plan_report import facts, words
from stage2_prior.config import PRESETS, PriorConfig
from stage2_prior.flops import flops
from stage2_prior.footprint import Footprint, _try, footprint, parameters
from stage2_prior.loss import losses
from stage2_prior.model import Prior
from tests.tiny import PRIOR_SHAPE

PAPER = PriorConfig()
V100S = Cluster(gpus=1024, per_machine=8, memory=16e9, within=130e9, between=12.5e9, rate=50e12)
ONE = Cluster(gpus=1, per_machine=8, memory=16e9, within=1e9, between=1e9, rate=1e12)
NOTHING = Footprint(0, 0)  # where activations do not matter, they are not worked out


@pytest.mark.parametrize(
    ("width", "rank", "rate", "size"),
    [(1920, 512, 0.83, 2.8e9), (2688, 640, 0.85, 5.6e9), (3968, 896, 0.86, 12.0e9)],
)
def test_the_papers_table_of_compression_rates(width, rank, rate, size):
    assert paper_rank(width) == rank
    assert compression(rank, width, shards=8) == pytest.approx(rate, abs=0.005)
    d, r, m = width, rank, 8  # P and Q of a GPU's shares of the six matrices (Table 2)
    q_k_v_out, up = 4 * (d * r / m + r / m * d / m), d * r / m + r / m * 4 * d / m
    down = 4 * d / m * r / m + r / m * d
    sent = (q_k_v_out + up + down) / (12 * d * d / m)
    assert compression(rank, width, shards=8) == pytest.approx(1 - sent)
    matrices, _ = parameters(replace(PAPER, width=width, heads=width // 64))
    assert matrices == pytest.approx(size, rel=0.02)


def test_the_papers_memory_of_a_gpu():
    """3 GB of weights, 3 + 3 of moments and 3 of error sums (App. E), and it fits into 16 GB."""
    held = paper_memory(PAPER, batch=1, shards=8)
    assert held.weights == pytest.approx(3e9, rel=0.05)
    assert held.moments == pytest.approx(6e9, rel=0.05)
    assert held.errors == pytest.approx(3e9, rel=0.05)
    assert 14e9 < held.total < 16e9


def test_the_papers_run():
    training = PRESETS["paper"][1]
    assert (training.zero, training.compression_rank, training.compression_start) == (3, 896, 0)
    run = cost(PAPER, training, Choice(3, "16bit", True, 1, rank=896), V100S)
    assert run.flops_6nd == pytest.approx(4.1e22, rel=0.01)
    assert run.flops > run.flops_6nd * 8 / 6  # activations are computed twice
    # 12.09 billion numbers in matrices, 1,280 tokens for each GPU, and a little for attention and heads.
    assert run.compute_seconds == pytest.approx(8 * 12.09e9 * 1280 / V100S.rate, rel=0.02)
    assert run.days == pytest.approx(430_000 * (2.51 + 0.904) / 86_400, rel=0.005)


@pytest.mark.parametrize("channels", [0, 5])
def test_parameters_and_flops_are_those_of_the_model(channels):
    config = PriorConfig(**PRIOR_SHAPE, code_channels=channels)
    model = Prior(config)
    matrices, rest = parameters(config)
    assert matrices == sum(model.get_parameter(name).numel() for name in model.matrices())
    assert matrices + rest == sum(p.numel() for p in model.parameters())
    per_token = 6 * matrices
    assert flops(config, False) > per_token * config.length
    assert flops(config, True) > 8 * matrices * config.length


def measured(config: PriorConfig, batch: int, recompute: bool, attention: str) -> float:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = Prior(config)
        model.recompute = recompute
        model.attend_by(attention)
        optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=0.1)
        engine = Engine(model, optimizer, Average(model.parameters(), 0.9, 1), clip=1.0, precision="fp32")
        tokens = torch.zeros(batch, config.text_length - 1, dtype=torch.long)
        codes = torch.zeros(batch, config.cells, dtype=torch.long)
        for step in (1, 2):
            text, image = losses(model, tokens, codes)
            engine.backward(text + image, 1)
            engine.update(1e-3, step)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("attention", ["dense", "block"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_of_a_training_step_is_as_predicted(recompute, attention):
    config = PriorConfig(
        text_length=12, text_vocab=40, image_vocab=50, grid=8, depth=4, width=48, heads=3, kernel=5
    )  # fmt: skip
    held = footprint(config, 4, recompute, attention=attention)
    predicted = memory(config, Choice(0, "fp32", recompute, 4), ONE, held=held).total
    assert predicted == pytest.approx(measured(config, 4, recompute, attention), rel=0.1)


def test_deep_models_are_extended_from_shallow_ones():
    config = PriorConfig(**(PRIOR_SHAPE | {"depth": 12}))
    direct = _try(config, 3, False, "fp32", "auto", False)
    assert footprint(config, 3, False).whole == pytest.approx(direct.whole, rel=0.02)
    assert footprint(config, 3, False).partitioned == pytest.approx(direct.partitioned, rel=0.02)


def test_each_stage_partitions_what_it_says():
    n = sum(parameters(PAPER))
    held = [memory(PAPER, Choice(z, "fp32", True, 1), V100S, held=NOTHING) for z in range(4)]
    assert [m.gradients / n for m in held] == pytest.approx([4, 4, 4 / 1024, 4 / 1024])
    assert [m.moments / n for m in held] == pytest.approx([8, 8 / 1024, 8 / 1024, 8 / 1024])
    assert [m.weights / n for m in held] == pytest.approx([4, 4 + 4 / 1024, 4 + 4 / 1024, 8 / 1024])
    # Compressed between machines, a machine of eight holds everything once.
    assert memory(PAPER, Choice(3, "fp32", True, 1, rank=896), V100S, held=NOTHING).moments == n
    halved = memory(PAPER, Choice(3, "16bit", True, 1, rank=896), V100S, held=NOTHING)
    assert halved.moments == pytest.approx(n / 2, rel=0.02)
    assert memory(PAPER, Choice(3, "fp32", True, 1, offload=True), V100S, held=NOTHING).moments == 0


def test_the_average_is_partitioned_with_the_moments_and_lies_in_main_memory_with_them():
    n = sum(parameters(PAPER))
    held = [memory(PAPER, Choice(z, "fp32", True, 1), V100S, held=NOTHING).average / n for z in range(4)]
    assert held == pytest.approx([4, 4 / 1024, 4 / 1024, 4 / 1024])
    off = memory(PAPER, Choice(2, "fp32", True, 1, offload=True), V100S, held=NOTHING)
    assert (off.average, off.weights) == (0, 4 * n)  # with the partition's fp32 copy of the weights


def test_muons_matrices_have_one_moment():
    matrices, rest = parameters(PAPER)
    held = memory(PAPER, Choice(0, "fp32", True, 1, muon=True), ONE, held=NOTHING)
    assert held.moments == 4 * matrices + 8 * rest


def test_a_gpu_alone_has_no_buffers_and_others_no_more_than_their_stage_needs():
    """Large models only: ZeRO's two buffers for gradients have one size for every model."""
    held = [memory(PAPER, Choice(z, "fp32", True, 1), V100S, held=NOTHING).buffers for z in range(4)]
    assert held == [4 * PAPER.width * PAPER.text_vocab, 4 * 3 * 50e6, 4 * 3 * 50e6, 4 * 5 * 50e6]
    assert memory(PAPER, Choice(3, "fp32", True, 1), ONE, held=NOTHING).buffers == 0
    small = PriorConfig(**PRIOR_SHAPE)
    n = sum(parameters(small))
    held = [memory(small, Choice(z, "fp32", True, 1), V100S, held=NOTHING).buffers for z in range(4)]
    assert held == [2**22, 4 * (2 * 50e6 + n), 4 * (2 * 50e6 + n), 4 * 2 * n]


def test_gpus_of_a_machine_exchange_gradients_and_what_is_partitioned():
    """A mean in full is two passes of a ring, weights are gathered in one; stage 3 does so twice."""
    ring = 4 * sum(parameters(PAPER)) * 7 / 8
    sent = [traffic(PAPER, Choice(stage, "fp32", True, 1), V100S) for stage in range(4)]
    assert [each.within / ring for each in sent] == pytest.approx([2, 3, 3, 3])
    assert [each.within_seconds for each in sent] == [each.within / V100S.within for each in sent]
    between = [each.between / each.plain_between for each in sent]
    assert between == [1, 1.5, 1.5, 1.5]  # weights come from all machines, too


def test_an_update_takes_what_is_longer_within_a_machine_and_then_the_time_between():
    training, choice = PRESETS["paper"][1], Choice(3, "16bit", True, 1, rank=896)
    for within in (1e9, 1e12):
        cluster = replace(V100S, within=within)
        run, sent = cost(PAPER, training, choice, cluster), traffic(PAPER, choice, cluster)
        assert (run.compute_seconds > sent.within_seconds) == (within == 1e12)
        longer = max(run.compute_seconds, sent.within_seconds)
        assert run.step_seconds == pytest.approx(longer + sent.between_seconds)


# Numbers of P and Q of a layer of the paper's model, rank 896, over the eight processes of a machine. ZeRO 3
# cuts each parameter by rows into eight runs: six of that of q, k and v lie in one of the three, two in two.
SHARED_OUT = (
    6 * 336 * (1488 + 3968) + 2 * (224 * (992 + 3968) + 112 * (496 + 3968))  # q, k and v
    + 8 * 112 * (496 + 3968)  # after attention
    + 8 * 112 * (1984 + 3968) + 8 * 112 * (496 + 15872)  # MLP
)  # fmt: skip
WHOLE = 4 * 896 * (3968 + 3968) + 2 * 896 * (15872 + 3968)  # ZeRO 1 and 2 hardly cut a matrix


@pytest.mark.parametrize(("stage", "factors"), [(0, 8 * WHOLE), (1, WHOLE), (2, WHOLE), (3, SHARED_OUT)])
def test_what_compression_sends_between_machines_follows_from_how_matrices_are_cut(stage, factors):
    low = traffic(PAPER, Choice(stage, "fp32", True, 1, rank=896), V100S)
    assert low.kept == pytest.approx(factors / (12 * 3968**2))
    rest = 64 * 13 * 3968 + 2 * (16_384 + 8192 + 256 + 32 + 2) * 3968 + 16_384 + 8192
    sent = 2 * 64 * factors + 4 * rest * (8 if stage == 0 else 1)
    assert low.between == pytest.approx(2 * 127 / 128 * sent)
    assert low.between_seconds == low.between / V100S.between
    plain = traffic(PAPER, Choice(stage, "fp32", True, 1), V100S)
    assert plain.kept == 1
    assert plain.between >= low.plain_between == plain.plain_between


def test_a_plan_tells_the_share_that_is_sent_beside_the_papers():
    plan = make_plan("paper", replace(V100S, memory=1e12), zero=3, settings=("depth=1",))
    assert facts(plan)["compression"] == pytest.approx(0.798, abs=0.0005)
    assert facts(plan)["compression_of_the_paper"] == pytest.approx(0.859, abs=0.0005)
    assert any("20% of the numbers of matrices (14% as the paper cuts them)" in line for line in words(plan))


def test_the_format_of_what_is_compressed_counts():
    packed, plain = (
        make_plan(
            "paper", replace(V100S, memory=1e12), zero=3, settings=("depth=1", f"compression_format={f}")
        )
        for f in ("16bit", "fp32")
    )
    factors = 4 * forecast.low_rank(packed.model, 896, 8).factors / 8  # fp32 in either
    sums = packed.stages[3].errors - factors
    assert plain.stages[3].errors - factors == pytest.approx(2 * sums)
    assert sums > 0
    assert plain.sent.between > packed.sent.between
    assert plain.sent.kept == packed.sent.kept


@pytest.mark.parametrize(("stage", "factor_bytes"), [(0, 4), (2, 2), (3, 4)])
def test_what_compression_holds_is_counted(stage, factor_bytes):
    """Error sums and Q₀ in their format, P and Q of all matrices in fp32 until the update is made."""
    config, rank, shards = PriorConfig(**PRIOR_SHAPE), 4, 2
    model, held = Prior(config), 0
    for name, stacked in model.matrices().items():
        parameter = model.get_parameter(name)
        numel = parameter.numel() // (shards if stage == 3 else 1)
        for offset in range(0, parameter.numel(), numel):
            for m in compressed(name, tuple(parameter.shape), offset, numel, rank, stacked):
                q = m.projection(seed=0)
                p = m.of(torch.zeros(m.numel)) @ q
                held += factor_bytes * (m.numel + q.numel()) + 4 * (p.numel() + q.numel())
    cluster = replace(V100S, gpus=2 * shards, per_machine=shards)
    choice = Choice(stage, "fp32", False, 1, rank=rank, factor_bytes=factor_bytes)
    counted = memory(config, choice, cluster, held=NOTHING).errors * (shards if stage else 1)
    assert counted == pytest.approx(held, rel=0.02)  # whole matrices, but for odd rows of a share


def test_weights_in_fp16_are_planned_whole_on_each_gpu():
    half = ("depth=1", "weights=fp16", "moments=16bit", "precision=fp16")
    two = replace(ONE, gpus=2)
    made = make_plan("paper", two, settings=half)
    assert (made.choice.stage, list(made.stages)) == (0, [0])
    with pytest.raises(
        ConfigError, match="weights=fp16 needs the whole model on each GPU: --zero 0 in place"
    ):
        make_plan("paper", two, zero=2, settings=half)


def test_weights_in_fp16_are_offered_no_zero():
    """At half of what is missing; only a smaller pass or model can help."""
    settings = ("depth=4", "width=512", "heads=8", "weights=fp16", "moments=16bit", "precision=fp16")
    needed = make_plan("small", replace(V100S, gpus=8), settings=settings).stages[0].total
    made = make_plan("small", replace(V100S, gpus=8, memory=needed * 0.7), settings=settings)
    assert made.cheaper
    assert not any(word in change for change, _ in made.cheaper for word in ("--zero", "offload"))


def test_a_smaller_model_is_offered_with_the_rank_it_was_counted_with():
    choice = Choice(3, "16bit", True, 1, rank=896)
    needed = memory(PAPER, choice, V100S).total
    cluster = replace(V100S, memory=needed / 4)
    offered = [(change, needed) for change, needed in cheaper(PAPER, choice, cluster) if "width" in change]
    assert offered
    for change, counted in offered:
        asked = dict(word.split("=") for word in change.split() if "=" in word)
        model = replace(PAPER, width=int(asked["width"]), heads=int(asked["heads"]))
        typed = replace(choice, rank=int(asked.get("compression_rank", choice.rank)))
        assert memory(model, typed, cluster, held=NOTHING).errors == counted.errors


def test_what_is_offered_instead_fits():
    model = replace(PRESETS["small"][0], grid=8)
    cluster = replace(ONE, memory=1.2e9)
    choice = Choice(0, "fp32", False, 8)
    assert memory(model, choice, cluster, "fp32").total > cluster.memory
    offered = cheaper(model, choice, cluster, "fp32")
    assert len(offered) == 3
    assert all(needed.total <= cluster.memory for _, needed in offered)
    assert len({change for change, _ in offered}) == 3


@pytest.mark.parametrize("share", [0.5, -2.0])
def test_every_offer_changes_something_and_fits(share):
    """Of GPUs that hold the choice with factors in 16 bits, but not in 32, and of smaller ones."""
    model, cluster = replace(PRESETS["small"][0], grid=8), replace(V100S, gpus=16)
    choice = Choice(1, "fp32", False, 4, rank=512, factor_bytes=4)
    plain, packed = (memory(model, replace(choice, factor_bytes=n), cluster, "fp32").total for n in (4, 2))
    cluster = replace(cluster, memory=packed + share * (plain - packed))
    offered = cheaper(model, choice, cluster, "fp32")
    assert offered
    for change, needed in offered:
        assert change
        assert f"width={model.width} " not in change
        assert f"depth={model.depth}" not in change.split()
        assert needed.total <= cluster.memory


def test_what_costs_least_is_offered_first(monkeypatch):
    monkeypatch.setattr(plan, "memory", lambda *_: Memory(*[0.0] * 7))  # all of it fits
    offered = cheaper(PAPER, Choice(1, "fp32", False, 4), replace(V100S, gpus=8))
    assert [change for change, _ in offered] == ["--set moments=16bit", "--set micro_batch=2", "--zero 2"]


@pytest.mark.parametrize("taken", [{"muon": True}, {"rank": 512}])
def test_offloading_is_not_offered_with_what_it_cannot_be_joined_to(taken):
    changes = list(_changes(Choice(1, "fp32", False, 4, **taken), replace(V100S, gpus=16)))
    assert changes
    assert not any(change.offload and (change.rank or change.muon) for change in changes)


def test_compression_is_planned_where_training_would_compress():
    made = make_plan("small", replace(V100S, gpus=16, memory=1e12))
    assert made.choice.rank == made.training.compression_rank == 0
    asked = make_plan("small", replace(V100S, gpus=16, memory=1e12), rank=32)
    assert asked.choice.rank == 32


def test_a_plan_for_machines_is_whole():
    told = facts(make_plan("tiny", ONE))
    assert told["fits"]
    assert told["memory"].keys() == {"zero_0"}
    assert told["cheaper"] == []
    assert told["parameters"]["all"] == sum(parameters(make_plan("tiny", ONE).model))


def test_a_proposal_keeps_to_the_hours_and_the_data():
    fast = replace(ONE, rate=1e14)
    many = propose(fast, pictures=10**8, hours=24.0)
    few = propose(fast, pictures=1000, hours=24.0)
    assert many.hours <= 24
    assert many.preset == "small"
    assert few.preset == "tiny"
    assert few.epochs <= 30
    for proposal in (many, few):
        model = make_plan(proposal.preset, ONE).model
        seen = proposal.steps * proposal.batch_size * (model.text_length + model.cells)
        assert proposal.tokens_per_parameter == pytest.approx(seen / parameters(model)[0])


def test_what_neither_data_nor_hours_could_train_is_not_worked_out(monkeypatch):
    tried = []

    def noted(name, *args, **more):
        tried.append(name)
        return make_plan(name, *args, **more)

    monkeypatch.setattr(plan, "make_plan", noted)
    propose(replace(ONE, rate=1e14), pictures=1000, hours=24.0)
    propose(replace(ONE, rate=1e9), pictures=10**8, hours=1.0)
    assert tried == ["tiny", "tiny"]


def test_the_activations_of_what_overfills_a_gpu_without_them_are_not_worked_out(monkeypatch):
    monkeypatch.setattr(forecast, "footprint", lambda *args, **more: pytest.fail("they were"))
    model, choice = PRESETS["tiny"][0], Choice(0, "fp32", False, 16)
    assert cheaper(model, choice, replace(V100S, memory=1e6)) == []


@pytest.mark.parametrize(("text", "size"), [("16GB", 16e9), ("40 GiB", 40 * 2**30), ("500MB", 5e8)])
def test_sizes_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


def test_a_plan_takes_the_settings_as_training_does():
    cluster = replace(ONE, gpus=8, per_machine=4)
    settings = ("micro_batch=4", "offload=cpu", "compression_rank=0", "width=24", "heads=3", "depth=2")
    choice = make_plan("small", cluster, settings=settings).choice
    assert (choice.micro_batch, choice.offload, choice.rank) == (4, True, 0)


def test_what_cannot_be_planned_is_told():
    for text in ("much", "80", "80B"):
        with pytest.raises(ConfigError, match=rf"--memory '{text}' is no size"):
            size_in_bytes(text)
    with pytest.raises(ConfigError, match=r"use --set batch_size=1000"):
        make_plan("paper", replace(V100S, gpus=1000))
    with pytest.raises(ConfigError, match="must be a multiple of --gpus-per-machine 8"):
        replace(V100S, gpus=12)
    with pytest.raises(ConfigError, match="there are 0 pictures"):
        propose(ONE, 0, 1.0)
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        make_plan("papers", ONE)
