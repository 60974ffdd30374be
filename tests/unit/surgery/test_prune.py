"""Pruning against the references written from the papers alone, on a model's own layers and checkpoints."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from helpers.builders import random_batches
from helpers.trained import tiny_run
from reference.papers import merging, pruning
from torch import Tensor

from moe_pretrain import cli
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import TrainedRun, open_trained
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.surgery.expert_statistics import LayerStatistics, measure
from moe_pretrain.surgery.prune import (
    PrunedRun,
    choose_groups,
    pruned_checkpoint,
    pruned_config,
)
from moe_pretrain.surgery.pruning_methods import (
    METHODS,
    agglomerate,
    align_units,
    keep_highest,
    router_norm_change,
    spectral_groups,
)
from moe_pretrain.surgery.run_folder import write_run

EXPERTS, KEPT, TOP_K = 6, 4, 2
SHAPE = ("model.moe.num_experts=6", "model.hidden_size=24", "model.num_heads=4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prune")


def opened(folder: Path) -> TrainedRun:
    return open_trained(folder, lambda file: file, pytest.fail)


class Measured:
    """A run, its model and what was measured of it, with the inputs of every layer."""

    def __init__(self, home: Path, *words: str):
        name = words[0].replace("router=", "measured-")
        self.run = opened(tiny_run(home, name, *SHAPE, *words))
        self.model: DecoderLM = self.run.model()
        self.batches = [batch for step in random_batches(self.run.config, 1) for batch in step[:2]]
        self.inputs: dict[int, list[Tensor]] = {}
        handles = [layer.register_forward_hook(self._note) for layer in self.model.moe_layers()]
        self.found = measure(self.model, self.batches, 0)
        for handle in handles:
            handle.remove()

    def _note(self, layer: MoELayer, inputs, output) -> None:
        hidden, context, _ = inputs
        self.inputs.setdefault(layer.router.layer, []).append(hidden[context.token_mask])

    @property
    def layers(self) -> list[tuple[MoELayer, LayerStatistics, Tensor]]:
        layers = self.model.moe_layers()
        return [
            (layer, found, torch.cat(self.inputs[layer.router.layer]).double())
            for layer, found in zip(layers, self.found, strict=True)
        ]

    def pruned(self, method: str, folder: Path, kept: int = KEPT, earlier: Tensor | None = None) -> TrainedRun:
        config = pruned_config(self.run.config, kept)
        groups = {
            layer.router.layer: choose_groups(method, layer, found, kept, 0, earlier) for layer, found, _ in self.layers
        }
        self.groups = groups
        pruned = PrunedRun(config, groups)
        values = yaml.safe_load((self.run.folder / "config.yaml").read_text())
        values["model"]["moe"]["num_experts"] = kept
        checkpoint = pruned_checkpoint(self.run, pruned, self.run.state)
        write_run(folder, self.run.folder, checkpoint, yaml.safe_dump(values))
        return opened(folder)


@pytest.fixture(scope="module")
def top_k(home: Path) -> Measured:
    return Measured(home, "router=top_k")


def bank(layer: MoELayer) -> pruning.Bank:
    gate, up = layer.experts.in_weight.detach().double().chunk(2, dim=1)
    return gate, up, layer.experts.out_weight.detach().double()


def logits(layer: MoELayer, x: Tensor) -> Tensor:
    return x @ layer.router.weight.detach().double().T


def test_statistics_are_the_references(top_k: Measured):
    for layer, found, x in top_k.layers:
        z = logits(layer, x)
        expected = pruning.expert_statistics(x, z, TOP_K, bank(layer))
        actual, soft = pruning.heavy_hitters(z, TOP_K)
        assert found.tokens == len(x) > 40
        assert torch.equal(found.frequency, expected.frequency) and torch.equal(found.frequency, actual)
        torch.testing.assert_close(found.reap, expected.reap, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.soft, soft, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logit_correlation(), merging.logit_similarity(z), rtol=1e-4, atol=1e-5)
        sampled = merging.cka_matrix(x[:512], bank(layer))
        torch.testing.assert_close(found.output_similarity(layer), sampled, rtol=1e-4, atol=1e-5)


def test_the_one_that_is_louder_counts_for_more(top_k: Measured):
    """REAP is linear in an expert's last matrix; an expert without tokens has 0 and goes first."""
    layer, found, _ = top_k.layers[0]
    weight = layer.experts.out_weight
    with torch.no_grad():
        weight[2] *= 3
    # What comes in from the second layer on is another text: only the first one is linear.
    (louder, *_) = measure(top_k.model, top_k.batches, 0)
    with torch.no_grad():
        weight[2] /= 3
    factor = torch.ones(EXPERTS, dtype=torch.float64)
    factor[2] = 3
    torch.testing.assert_close(louder.reap, found.reap * factor, rtol=1e-5, atol=1e-8)
    alone = LayerStatistics(EXPERTS)
    alone.frequency[:3], alone.gated_norm[:3] = 2, torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    assert alone.reap.tolist() == [0.5, 2.0, 1.0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_the_references(seed: int):
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (9,)).double()
    assert [group.members for group in keep_highest(scores, 5)] == [[e] for e in pruning.keep_highest(scores, 5)]
    before, after = torch.randn(7, 5), torch.randn(7, 5)
    torch.testing.assert_close(
        router_norm_change(before, after).float(), pruning.router_norm_change(before, after), rtol=1e-5, atol=1e-6
    )
    x = torch.randn(8, 20).double()
    similarity = merging.logit_similarity(x.T)
    for groups in (1, 3, 8):
        assert agglomerate(similarity, groups) == merging.agglomerate(similarity, groups)
    # Groups that are plain: three directions, and noise.
    centre = torch.randn(3, 40).double()
    members = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    near = merging.logit_similarity((centre[members] + 0.1 * torch.randn(7, 40)).T)
    expected = [[0, 3], [1, 4, 6], [2, 5]]
    assert spectral_groups(near, 3) == merging.spectral_groups(near, 3) == expected
    assert spectral_groups(near, 7) == [[e] for e in range(7)] and spectral_groups(near, 1) == [list(range(7))]
    theta = torch.randn(2, 6, 5).double(), torch.randn(2, 6, 5).double(), torch.randn(2, 5, 6).double()
    units = [torch.cat([theta[0][e], theta[1][e], theta[2][e].T], dim=1) for e in range(2)]
    assert align_units(*units).tolist() == merging.align(theta, 0, 1)


def test_clusters_are_never_empty():
    for seed in range(20):
        torch.manual_seed(seed)
        similarity = torch.rand(8, 8).double().mul(2).sub(1)
        similarity = (similarity + similarity.T) / 2
        groups = spectral_groups(similarity, 5)
        assert len(groups) == 5 and sorted(sum(groups, [])) == list(range(8)) and all(groups)
    assert len(spectral_groups(torch.ones(6, 6).double(), 4)) == 4, "all alike"


@pytest.mark.parametrize("method", ["reap", "seer", "frequency", "router_norm"])
def test_a_pruned_layer_is_the_reference_without_the_others(method: str, top_k: Measured, home: Path):
    earlier = None
    if method == "router_norm":
        earlier = torch.randn(EXPERTS, 24) * 0.2
    run = top_k.pruned(method, home / method, earlier=earlier)
    small = run.model()
    for (layer, found, x), other in zip(top_k.layers, small.moe_layers(), strict=True):
        score = {"reap": found.reap, "seer": found.soft, "frequency": found.frequency}.get(method)
        if earlier is not None:
            score = pruning.router_norm_change(earlier, layer.router.weight.detach())
        kept = pruning.keep_highest(score, KEPT)
        assert [group.members for group in top_k.groups[layer.router.layer]] == [[e] for e in kept]
        assert torch.equal(other.experts.in_weight, layer.experts.in_weight[kept])
        expected = pruning.pruned_mixture(x, logits(layer, x), TOP_K, kept, bank(layer), "renormalise")
        batch = top_k.batches[0]
        context = routing_context(batch, 0, 0)
        with torch.no_grad():
            found_output = other(x[: len(context.token_mask)].float(), context, False).hidden
        torch.testing.assert_close(found_output.double(), expected[: len(found_output)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["uncurl", "grouping"])
def test_merged_experts_are_the_references(method: str, top_k: Measured, home: Path):
    small = top_k.pruned(method, home / method).model()
    for (layer, found, x), other in zip(top_k.layers, small.moe_layers(), strict=True):
        groups = [group.members for group in top_k.groups[layer.router.layer]]
        assert sorted(sum(groups, [])) == list(range(EXPERTS)) and len(groups) == KEPT
        if method == "grouping":
            assert groups == merging.agglomerate(merging.cka_matrix(x[:512], bank(layer)), KEPT)
        (gate, up, down), rows, _ = merging.merge_groups(
            bank(layer),
            layer.router.weight.detach().double(),
            groups,
            counts=found.frequency if method == "uncurl" else None,
            aligned=method == "uncurl",
        )
        torch.testing.assert_close(other.experts.in_weight.double(), torch.cat([gate, up], dim=1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.experts.out_weight.double(), down, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.router.weight.double(), rows, rtol=1e-5, atol=1e-6)


def test_experts_that_are_alike_up_to_the_order_of_their_units_merge_without_loss(top_k: Measured, home: Path):
    from helpers.trained import save_model

    run = opened(tiny_run(home, "alike", *SHAPE, "router=top_k"))
    model = run.model()
    with torch.no_grad():
        for layer in model.moe_layers():
            order = torch.randperm(20)
            gate, up = layer.experts.in_weight[0].chunk(2)
            layer.experts.in_weight[1] = torch.cat([gate[order], up[order]])
            layer.experts.out_weight[1] = layer.experts.out_weight[0][:, order]
            layer.router.weight[1] = layer.router.weight[0] + 1e-3 * torch.randn(24)
    save_model(run.folder, model, run.config, 3)
    measured = Measured.__new__(Measured)
    measured.run, measured.model, measured.inputs = opened(run.folder), model, {0: [], 1: []}
    measured.batches = top_k.batches
    measured.found = measure(model, measured.batches, 0)
    measured.inputs = {0: [torch.zeros(1, 24)], 1: [torch.zeros(1, 24)]}
    small = measured.pruned("uncurl", home / "alike-merged", kept=5).model()
    for layer, other in zip(model.moe_layers(), small.moe_layers(), strict=True):
        members = [group.members for group in measured.groups[layer.router.layer]]
        assert [0, 1] in members
        merged = other.experts.out_weight[members.index([0, 1])]
        anchor = max((0, 1), key=lambda e: float(measured.found[layer.router.layer].frequency[e]))
        torch.testing.assert_close(merged, layer.experts.out_weight[anchor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ("router=loss_free",),
        ("router=expert_choice",),
        ("router=expert_threshold",),
        ("router=relu",),
        ("router=top_p",),
        ("router=k_means",),
        ("router=random",),
        ("router=autonomy", "router.gate_rank=6"),
        ("router=sinkhorn", "model.moe.latent_size=10"),
        ("router=attentive", "router.key_size=6", "router.num_candidates=3"),
    ],
    ids=lambda words: words[0][7:],
)
def test_every_scheme_keeps_its_state_of_the_experts_that_stay(words: tuple[str, ...], home: Path):
    measured = Measured(home, *words)
    run = measured.pruned("reap", home / f"{words[0]}-reap")
    model = run.model()
    for layer, other in zip(measured.model.moe_layers(), model.moe_layers(), strict=True):
        kept = [group.members[0] for group in measured.groups[layer.router.layer]]
        now = dict(other.router.state_dict())
        for name, value in layer.router.state_dict().items():
            # Keys of attentive gating are as many as experts here: only what counts experts is cut.
            expected = value if name.startswith("gate.") or value.shape[:1] != (EXPERTS,) else value[kept]
            assert torch.equal(now[name], expected), name
    everything = {kind for _, kind in run.reader().arrays()}
    assert {"weight", "exp_avg", "exp_avg_sq"} <= everything
    assert run.reader().read("blocks.0.feed_forward.experts.in_weight", "exp_avg", 0, 4).tolist() == [2.5] * 4
    whole = measured.pruned("reap", home / f"{words[0]}-whole", kept=EXPERTS).model()
    for (name, left), (_, right) in zip(measured.model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "words", [("router=dynmoe",), ("router=attentive_dense",), ("router=autonomy_top_p", "router.gate_rank=6")]
)
def test_the_growth_of_a_row_says_nothing_where_logits_are_not_of_rows(words: tuple[str, ...], home: Path):
    """Of keys that are normalised, or where there are none: one line, not the module's own words of several."""
    layer, found, _ = Measured(home, *words).layers[0]
    with pytest.raises(ConfigError, match=r"^--method=router_norm needs .*, which \w+Router lacks$"):
        choose_groups("router_norm", layer, found, KEPT, 0, torch.zeros(EXPERTS, 24))


@pytest.mark.parametrize("method", ["random", "frequency", "reap"])
def test_slots_in_use_stay_first(method: str, home: Path):
    """Where all that are left are not in use, every token would go to what lies in the first one."""
    measured = Measured(home, "router=dynmoe", "router.initial_experts=2")
    for layer, found, _ in measured.layers:
        found.frequency.zero_()
        found.gated_norm.zero_()
        layer.router.in_use.copy_(torch.tensor([0, 0, 1, 0, 0, 1]))
        for seed in range(5):
            kept = choose_groups(method, layer, found, 3, seed)
            assert {2, 5} < {group.members[0] for group in kept}


def test_padding_counts_nowhere(top_k: Measured):
    batch = top_k.batches[0]
    padded = type(batch)(**{**vars(batch), "document_ids": torch.full_like(batch.document_ids, -1)})
    for found in measure(top_k.model, [padded], 0):
        assert found.tokens == 0 and not found.frequency.any() and not found.reap.any() and not found.soft.any()


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """A run whose corpus is there."""
    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:30])
    (home / "corpus.jsonl").write_text(rows)
    words = ("data=files", f"data.paths=[{home}/corpus.jsonl]", "data.validation_fraction=0.2")
    return tiny_run(home, "trained", *SHAPE, "router=loss_free", *words, "evaluation.max_rows=8")


def test_the_command_writes_a_run_for_each_method_and_a_table(trained: Path, capsys: pytest.CaptureFixture):
    (trained / "overrides.txt").write_text("router=loss_free\nmodel.moe.num_experts=6\n")
    methods = [method for method in METHODS if method != "router_norm"]
    words = ["prune", str(trained), "--experts=4", f"--method={','.join(methods)}", "--rows=8", "--debug"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines[-len(methods) :]}
    assert list(table) == methods
    for method, columns in table.items():
        folder = trained.parent / f"trained-{method}-4"
        assert columns[1:4] == ["6", "->", "4"] and columns[6] == str(folder)
        assert 3 < float(columns[4]) < 30 and columns[4] == table["reap"][4] and columns[5] != columns[4]
        run = opened(folder)
        assert run.config.model.moe.num_experts == 4 and run.state.step == 2
        assert run.state.identity.config["model"]["moe"]["num_experts"] == 4, "so that train goes on from it"
        assert (folder / "overrides.txt").read_text() == "router=loss_free\nmodel.moe.num_experts=4\n"
    before = trained / "checkpoints" / "step_00000002"
    assert cli.main(["prune", str(trained), "--experts=5", "--method=router_norm", f"--before={before}"]) == 0
    assert "no norm has changed" in capsys.readouterr().out
    kept = opened(trained.parent / "trained-router_norm-5").model().blocks[0].feed_forward.router.weight
    assert torch.equal(kept, opened(trained).model().blocks[0].feed_forward.router.weight[:5])


def test_what_cannot_be_pruned_is_one_line(trained: Path, home: Path, capsys: pytest.CaptureFixture):
    def refusal(run: Path, *words: str) -> str:
        assert cli.main(["prune", str(run), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "router.top_k=2 must be at most model.moe.num_experts=1" in refusal(trained, "--experts=1")
    assert "must be from 1 to 6" in refusal(trained, "--experts=7")
    assert "--method=best must be of uncurl, seer" in refusal(trained, "--experts=4", "--method=best")
    assert "needs --before" in refusal(trained, "--experts=4", "--method=router_norm")
    assert "--before has no meaning" in refusal(trained, "--experts=4", f"--before={trained}")
    assert "--rows=0" in refusal(trained, "--experts=4", "--rows=0")
    dense = tiny_run(home, "dense", "router=dense")
    assert "has no experts to prune" in refusal(dense, "--experts=2")
    merging = tiny_run(home, "smear", "router=smear")
    assert "it merges experts" in refusal(merging, "--experts=2")
    hashed = tiny_run(home, "hash", "router=hash")
    assert "router=hash cannot be pruned: a table says which experts" in refusal(hashed, "--experts=2")
    grouped = tiny_run(home, "grouped", "router=top_k", "router.num_groups=2", "router.groups_per_token=1", *SHAPE)
    assert "router.num_groups=2 cannot be pruned: groups are of neighbouring" in refusal(grouped, "--experts=4")
    # One has a column for each expert too, the other maps that are wider the more experts there are.
    for words in (("router.projection=linear",), ("router.projection=two_layer", "router.gating_residual=false")):
        carrying = tiny_run(home, words[0][-6:], "router=moe_plus_plus", "experts=swiglu", *words, *SHAPE)
        assert "is not a row for each expert" in refusal(carrying, "--experts=4"), words
    slots = tiny_run(home, "dynmoe", "router=dynmoe", "router.initial_experts=4", *SHAPE)
    assert "cannot merge blocks.0.feed_forward.router.in_use" in refusal(slots, "--experts=5", "--method=grouping")
    autonomy = tiny_run(home, "autonomy", "router=autonomy", "router.gate_rank=6")
    assert "needs experts with full gates" in refusal(autonomy, "--experts=2", "--method=uncurl")
    (home / "trained-random-3").mkdir()
    (home / "trained-random-3" / "file").touch()
    assert "must be empty or not exist" in refusal(trained, "--experts=3", "--method=random")
    other = tiny_run(home, "other", "router=loss_free")
    assert "must be of the same model" in refusal(trained, "--experts=4", "--method=router_norm", f"--before={other}")
