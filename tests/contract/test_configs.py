"""Every shipped YAML composes and builds; every field is read by something; mistakes are one line."""

import copy
import dataclasses
import functools
import importlib
import itertools
import math
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from helpers import composition
from helpers.builders import OF_LAYERS
from helpers.config_reads import Reads, modules_below
from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_pretrain.cli import main
from moe_pretrain.commands import COMMANDS, plan, tune
from moe_pretrain.commands.options import Parser
from moe_pretrain.config import compose as compose_module
from moe_pretrain.config.compose import compose_values, config_folder
from moe_pretrain.config.load import load
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.config.validate import validate
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.size import ModelSize, model_size
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.run_folder.record import flatten
from moe_pretrain.sweep.multirun import parse
from moe_pretrain.sweep.tune_schemes import TuneSettings, schemes_and_seeds
from moe_pretrain.verify.oracle_optimizers import UPDATES, update_of

ROOT = Path(__file__).parents[2]
GROUPS = {
    path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in config_folder().iterdir() if path.is_dir()
}
EXPERIMENTS = GROUPS["experiment"]
SIZES = [name for name in GROUPS["model"] if name != "base"]
# Values that a group asks of its user.
REQUIRED = {
    "router=by_layer": [OF_LAYERS],
    "data=files": ["data.paths=[a.txt]"],
    "data=hub": ["data.name=owner/dataset"],
    "data=mixture": ["+data@data.sources.one=builtin", "+data.weights.one=1"],
    "data=tokens": ["data.paths=[a.npy]", "tokenizer=pretrained", "tokenizer.path=some/tokenizer"],
    "tokenizer=pretrained": ["tokenizer.path=some/tokenizer"],
    **{f"experiment={name}": ["tokenizer.path=some/tokenizer"] for name in EXPERIMENTS},
    "experiment=deepseek_v4_routing": [],
    **{f"experiment=tiny_shakespeare{kind}": ["data.paths=[a.txt]"] for kind in ("", "_moe")},
}
CHOICES = [f"{group}={name}" for group, names in GROUPS.items() for name in names if name != "base"]


@pytest.mark.parametrize(
    "words",
    [
        ["model.hidden_size=48", "router=autonomy", "router.gate_rank=7", "model.hidden_size=32", "seed=5"],
        ["experiment=aoe_732m_moe", "tokenizer.path=some/tokenizer", "++model.moe.every_k_layers=2"],
        ["router=by_layer", OF_LAYERS, "data.new=1"],
        ["router=relu", "router.top_k=2"],
        ["+data@data.sources.one=builtin", "data=mixture", "+data.weights.one=1"],
        ["router=moe_plus_plus", "model.num_layers=1,2"],
        ["router=hash", "model.name=${router.name}", "~router.top_k"],
    ],
    ids=" ".join,
)
def test_tests_compose_as_hydra_does(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Values, or the complaint: groups that ``helpers/composition.py`` keeps and fields that it sets itself."""

    def composed() -> object:
        try:
            return compose_values(words)
        except ConfigError as error:
            return str(error)

    ours = [composed(), composed()]
    monkeypatch.setattr(compose_module, "compose", composition.hydra_compose)
    assert ours == [composed()] * 2


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str):
    load([choice, *REQUIRED.get(choice, [])])


@pytest.mark.parametrize("size,router", itertools.product(SIZES, GROUPS["router"]))
@pytest.mark.fast("tiny-", "700m-top_k", "4b-expert_choice", "2b-autonomy")
def test_counted_parameters_equal_the_built_module(size: str, router: str):
    config = load([f"model={size}", f"router={router}", *REQUIRED.get(f"router={router}", [])])
    with torch.device("meta"):
        model = DecoderLM(config.model, config.router, ExpertShard())
    counted = model_size(config.model, config.router)
    assert counted.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for layer in model.moe_layers() for p in layer.experts.parameters())
    assert counted.experts == experts


def millions(value: float) -> float:
    return round(value / 1e6, 1)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("aoe_")])
def test_variants_of_an_experiment_have_the_plain_models_size(name: str):
    """Autonomy-of-Experts compares at equal parameters; what a control adds is the paper's own, about 1 %."""
    sizes = []
    for experiment in (name, "aoe_4b_moe" if "4b" in name else "aoe_732m_moe"):
        config = load([f"experiment={experiment}", *REQUIRED[f"experiment={experiment}"]])
        sizes.append(model_size(config.model, config.router).total_parameters)
        assert config.run.name == experiment
    assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.013)


def test_sizes_equal_the_papers_figures():
    """Total with one embedding, active with two: how the Autonomy-of-Experts paper must have counted."""

    def size(name: str, *more: str) -> ModelSize:
        config = load([f"model={name}", *more])
        return model_size(config.model, config.router)

    def routers(of: ModelSize) -> int:
        return of.routers + of.norms  # the papers' figures leave these out

    aoe = size("700m")
    assert millions(aoe.total_parameters - aoe.head - routers(aoe)) == 732.4
    assert millions(aoe.active_parameters - routers(aoe)) == 247.3
    large = size("4b")
    assert round((large.total_parameters - large.head - routers(large)) / 1e6) == 3973
    assert round((large.active_parameters - routers(large)) / 1e6) == 1183
    for top_k, active in ((1, 373.8), (2, 581.4)):
        dynamic = size("3b5", f"router.top_k={top_k}", "router.weights=raw")
        assert round((dynamic.total_parameters) / 1e6) in (3488, 3489)
        assert millions(dynamic.active_parameters - routers(dynamic)) == active
    assert 28e6 < size("small").total_parameters < 34e6


@pytest.mark.parametrize("size", SIZES)
def test_dense_twin_has_the_same_active_size(size: str):
    sparse, dense = (load([f"model={size}", f"router={router}"]) for router in ("top_k", "dense"))
    sparse_size, dense_size = (model_size(config.model, config.router) for config in (sparse, dense))
    assert dense_size.active_parameters == sparse_size.active_parameters - sparse_size.routers
    assert dense.batch == sparse.batch and dense.optimizer == sparse.optimizer


PYDANTIC_READS = {"name", "source"}
"""Fields that choose a variant of a group: their readers are the unions' discriminators."""


def fields_below(root: type) -> set[tuple[type, str]]:
    """Each field of a configuration and its parts, with the class that it is a field of."""
    found: set[tuple[type, str]] = set()
    todo, seen = [root], {root}
    while todo:
        part = todo.pop()
        for field in dataclasses.fields(part):
            found.add((part, field.name))
            new = set(dataclass_types(field.type)) - seen
            seen |= new
            todo.extend(new)
    return found


def unread_fields(root: type, modules: list[ModuleType]) -> list[str]:
    fields = [(part, name) for part, name in fields_below(root) if name not in PYDANTIC_READS]
    reads = Reads(modules, {name for _, name in fields})
    return sorted(f"{part.__name__}.{name}" for part, name in fields if not reads.is_read(part, name))


def test_every_field_is_read():
    """A field that no code reads is a knob without effect (defect C18); by types, for a third share their names."""
    assert unread_fields(Config, modules_below(ROOT / "moe_pretrain", "moe_pretrain")) == []


KNOBS = """
from dataclasses import dataclass, replace

@dataclass(frozen=True)
class Part:
    every_steps: int
    weight: float
    unused: int
    def __post_init__(self) -> None:
        if self.unused < 0:
            raise ValueError

@dataclass(frozen=True)
class Other:
    every_steps: int
    weight: float
    unused: int

@dataclass(frozen=True)
class Knobs:
    part: Part
    others: dict[str, Other]

class Trainer:
    def __init__(self, knobs: Knobs):
        self._knobs, self._part = knobs, knobs.part
    def step(self) -> float:
        return self._part.weight + sum(other.every_steps for other in self._knobs.others.values())
    def rest(self) -> None:
        for name, other in self._knobs.others.items():
            print(name, replace(other).unused)
"""


def test_a_field_that_shares_its_name_with_one_that_is_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "knobs_of_a_test.py").write_text(KNOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("knobs_of_a_test")
    assert unread_fields(module.Knobs, [module]) == ["Other.weight", "Part.every_steps", "Part.unused"]


def dataclass_types(annotation: object) -> list[type]:
    if dataclasses.is_dataclass(annotation):  # or one of its variants
        return [annotation, *annotation.__subclasses__()]  # type: ignore[list-item, union-attr]
    inner = [getattr(annotation, "__origin__", None), *getattr(annotation, "__args__", ())]
    return [found for part in inner if part is not None and part is not annotation for found in dataclass_types(part)]


MISTAKES = [
    (["modle=tiny"], "modle"),
    (["model=tiniest"], "tiny"),
    (["optimizer.lerning_rate=1"], "learning_rate"),
    (["optimizer.learning_rate=abc"], "optimizer.learning_rate='abc'"),
    (["optimizer.learning_rate=-1"], "must be positive"),
    (["+router.p=0.4"], "router.p"),
    (["router=dense", "router.top_k=2"], "top_k"),
    (["router.top_k=9"], "at most model.moe.num_experts=8"),
    (["router.top_k=1"], "router.weights"),
    (["router=by_layer"], "router.layers is missing: it must be given"),
    *(
        (["router=by_layer", f"router.layers={layers}"], fragment)
        for layers, fragment in {
            "{0-1:hash,1-3:top_k}": "router.layers: 0-1 and 1-3 both name layer 1",
            "{0-1:hash,3:top_k}": "router.layers must name layer 2 too, or rest",
            "{0-4:hash}": "0-4 must be within 0-3, model.num_layers=4",
            "{0-3:hash,rest:top_k}": "rest must name a layer with experts, which are 0, 1, 2, 3",
            "{first:hash,rest:top_k}": "'first' must be a layer (3), layers from and to (0-1), or rest",
            "{3-2:hash,rest:top_k}": "'3-2' must be",
            "{0:hsh,rest:top_k}": "router.layers.0=hsh is not a choice; did you mean hash?",
            "{0:../router/hash,rest:top_k}": "router.layers.0=../router/hash must be a choice of router",
            "{0:by_layer,rest:top_k}": "router.layers.0=by_layer must be a choice of router with one scheme",
            "{0:{top_k:1},rest:top_k}": "{router:top_k,top_k:4}",
            "hash": "router.layers=hash must name layers",
            "{0:{router:hash,top_k:9},rest:top_k}": "router.layers.0.top_k=9 must be at most model.moe.num_experts=8",
            "{0:{router:hash,topk:3},rest:top_k}": "router.layers.0.topk=3 is not a field of HashConfig; did you mean",
            "{0:{router:hash,top_k:x},rest:top_k}": "router.layers.0.top_k='x'",
            "{0:{router:top_k,top_k:1},rest:top_k}": "router.layers.0.weights=renormalised must",
            "{0:dense,rest:top_k}": "router.layers.0=dense must be another scheme: dense has no experts",
            "{0:lory,rest:top_k}": "lory spreads experts over ranks by their width",
            "{0:hash,rest:thor}": "router.layers.rest=thor must be another scheme: thor runs the whole model twice",
            "{0:hash,rest:relu}": "router.layers.rest=relu must be another scheme: relu moves one coefficient",
            "{0:hash,rest:autonomy}": "router.layers.rest=autonomy: experts have gate_rank=32, with",
            "{0:autonomy,1:hash,rest:top_k}": "router.layers.1=hash: experts have gate_rank=null, with",
            "{0:hash,rest:moe_plus_plus}": "comes with model.moe.experts.name=zero_computation, which all layers share",
            "{0:hash,rest:top_k_factorised}": "comes with model.moe.gate_rank=32, which all layers share",
        }.items()
    ),
    (["router=by_layer", OF_LAYERS, "model.moe.num_leading_dense_layers=1"], "0 must name a layer with experts"),
    (["router=by_layer", OF_LAYERS, "router.layers.rest.top_k=4"], "no layers have such a key; give all"),
    (["experiment=deepseek_v4_routing", "router.layers.rest.top_k=4"], "write +router.layers.rest.top_k=4"),
    (["router=by_layer", OF_LAYERS, "budget.match=active_params", "budget.solve=top_k"], "which has no router.top_k"),
    (["model.num_heads=5"], "nearest: 125, 130"),
    (["model.num_key_value_heads=3"], "must divide"),
    (["model.head_size=7"], "model.head_size=7 must be even"),
    (["model.qk_norm=layer"], "model.qk_norm='layer'"),
    (["model.moe.shared_expert_gate=true"], "must be false with model.moe.num_shared_experts=0"),
    (["model.moe.num_shared_experts=1", "model.moe.shared_expert_gate=true", "router=dense"], "with router=dense"),
    (["model.moe.activation_limit=0"], "model.moe.activation_limit=0"),
    (["model.moe.latent_size=128"], "model.moe.latent_size=128 must be below model.hidden_size=128"),
    (["model.moe.latent_norm=true"], "must be false with model.moe.latent_size=null"),
    (["router=dense", "model.moe.latent_size=8"], "must be null with router=dense, which has no routed experts"),
    (["router=smear", "model.moe.latent_size=8"], "must be null with router=smear"),
    (["router=autonomy", "model.moe.latent_size=8"], "must be null with router=autonomy, which ranks experts"),
    (["router=attentive", "model.moe.latent_size=8"], "must be null with router=attentive"),
    (["router=moe_plus_plus", "model.moe.latent_size=8"], "must be null with experts=zero_computation"),
    (["model.moe.gate_rank=8", "model.moe.latent_size=8"], "must be null with model.moe.gate_rank=8"),
    (["router.expert_router_coupling_weight=1", "experts=unequal"], "must be 0 with experts=unequal"),
    (["router.expert_router_coupling_weight=1", "model.moe.gate_rank=8"], "must be 0 with model.moe.gate_rank=8"),
    (["router.expert_router_coupling_weight=1", "router.projection_size=8"], "must be 0 with router.projection_size=8"),
    (["router.expert_router_coupling_alpha=0.5"], "alpha=0.5 must be 1 with router.expert_router_coupling_weight=0"),
    (["router=autonomy", "router.expert_router_coupling_weight=1"], "expert_router_coupling_weight"),
    (["router.logit_cap=-1"], "router.logit_cap=-1"),
    (["model.num_layers=2.5"], "model.num_layers=2.5"),
    (["engine.zero_stage=3"], "must be 0, 1 or 2"),
    (["engine.max_skipped_steps=-1"], "engine.max_skipped_steps=-1 must not be negative"),
    (["checkpoint.keep_last=0"], "checkpoint.keep_last=0 must be at least 1"),
    (["checkpoint.keep_every_steps=0"], "checkpoint.keep_every_steps=0 must be at least 1"),
    (["checkpoint.keep_best=-1"], "checkpoint.keep_best=-1 must not be negative"),
    (["checkpoint.resume=maybe"], "checkpoint.resume"),
    (["budget.tokens"], "budget.tokens has no value: an override is FIELD=VALUE or GROUP=CHOICE"),
    (["seed=1", "tiny"], "tiny has no value: an override is FIELD=VALUE or GROUP=CHOICE"),
    (["parallel.heartbeat_seconds=0"], "parallel.heartbeat_seconds=0 must be at least 1"),
    (["metrics.router_health_steps=0"], "metrics.router_health_steps"),
    (["metrics.collapse_ratio=0.9"], "metrics.collapse_ratio"),
    (["metrics.collapse_ratio=nan"], "metrics.collapse_ratio"),
    (["fault.point=save.rename"], "nearest: save.renamed"),
    (["fault.point=train.loss"], "fault.action=kill must be one of not_finite at train.loss"),
    (
        ["fault.point=train.step", "fault.action=EIO"],
        "fault.action=EIO must be one of kill, stop, hang, hold at train.step",
    ),
    (["fault.rank=-2"], "fault.rank=-2 must be at least -1"),
    (["engine.dtype=bfloat16", "engine.zero_stage=0"], "zero_stage=0"),
    (["data=files"], "data.paths"),
    (["schedule.floor=2"], "schedule.floor=2 must be at most 1"),
    (["optimizer.beta2=1"], "optimizer.beta2=1 must be below 1"),
    (["optimizer.name=sgd"], "optimizer.name=sgd must be one of 'adamw'"),
    (["streaming.window_shards=0"], "streaming.window_shards=0 must be at least 1"),
    (["streaming.retry_seconds=-1"], "streaming.retry_seconds=-1 must not be negative"),
    (["data.validation_fraction=1"], "data.validation_fraction=1 must be below 1"),
    (["combine=ortho"], "combine=ortho is not a choice; did you mean orthogonal?"),
    (["combine=orthogonal", "model.moe.combine.form=gs"], "model.moe.combine.form='gs'"),
    (
        ["combine=orthogonal", "router.top_k=1", "router.weights=raw"],
        "combine=orthogonal must be sum with router=top_k",
    ),
    (["combine=orthogonal", "router=dense"], "router=dense, which has no experts"),
    (["model.moe.gate_rank=0"], "model.moe.gate_rank=0 must be at least 1"),
    (["batch.micro_batch_size=0"], "batch.micro_batch_size=0 must be at least 1"),
    (["batch.micro_batch_size=big"], "batch.micro_batch_size='big': input should be a valid integer, unable to parse"),
    (["batch.micro_batch_size=big"], "as an integer or input should be 'auto'"),
    (["spike.window_steps=1"], "spike.window_steps=1 must be at least 2"),
    (["optimizer.learning_rate='nan'"], "optimizer.learning_rate=nan must be finite"),
    (["data=mixture", *REQUIRED["data=mixture"], "data.sources.one.validation_fraction=0"], "sources.one.validation_"),
    (["data=hub", "data.name=owner/dataset", "data.max_tokens=0"], "data.max_tokens=0 must be at least 1"),
    (["seed=-1"], "seed=-1"),
    (["run.name=a/b"], "run.name"),
    (["tokenizer.vocab_size=9000"], "model.vocab_size=4096"),
    (["router.load_balance_level=layer"], "load_balance_level"),
    (["metrics.wandb=on"], "metrics.wandb"),
    (["no equals sign"], "no equals sign"),
    (["router=top_k,top_p"], "router=top_k,top_p lists several values: --multirun"),
    (["sweep.parallel=0"], "sweep.parallel=0 must be at least 1"),
    (["sweep.name=a/b"], "sweep.name='a/b' must be a folder name"),
    (["sweep.retry=always"], "sweep.retry"),
    (["batch.total_tokens=9"], "batch.total_tokens is called budget.tokens"),
    (["budget.flops=1e15"], "budget.tokens=2457600 must be null with budget.flops=1e+15"),
    (["budget.tokens=null"], "budget.tokens=null must be a number of tokens, or budget.flops one of FLOPs"),
    (["budget.tokens=0"], "budget.tokens=0 must be at least 1"),
    (["budget.tokens=null", "budget.flops=inf"], "budget.flops=inf must be finite"),
    (["budget.seconds=0"], "budget.seconds=0 must be positive"),
    (["router@nowhere=top_k"], "router@nowhere"),
    (["data=files", "data.paths=[a.txt]", "data.pths=1"], "did you mean paths?"),
    (["data=files", "data.paths=[a.txt]", "model=tinny"], "model=tinny is not a choice; did you mean tiny?"),
    (["experiment=aoe_732m_25"], "experiment=aoe_732m_25 is not a choice; did you mean aoe_732m_256?"),
    (["experiment=aoe_4b"], "tokenizer.path is missing: it must be given"),
    (["data=files"], "data.paths is missing: it must be given"),
    (["data=mixture", "+data@data.sources.a=builtin", "data.weights.a=1"], "write +data.weights.a=1"),
    (["data=files", "data.paths=a.jsonl"], "data.paths=a.jsonl must be a list: 'data.paths=[a.jsonl]'"),
    (["hydra.run.dir=/d/runs"], "hydra.run.dir=/d/runs has no effect: a run's folder is run.output_dir/run.name"),
    (["seed=true"], "seed=true must be a number"),
    (["run.output_dir=/d/lr=1e-3"], """quote the text: 'run.output_dir="/d/lr=1e-3"'"""),
    (["run.output_dir=gr\u00f6\u00dfe"], """quote the text: 'run.output_dir="gr\u00f6\u00dfe"'"""),
    (["data=files", "data.paths=[a.txt,\u00fc.txt]"], """'data.paths=["a.txt","\u00fc.txt"]'"""),
    (["router=sinkhorn", "router.iterations=0"], "router.iterations=0 must be"),
    (["router=sinkhorn", "router.top_k=9"], "router.top_k=9 must be"),
    (["router=sinkhorn", "router.score=tanh"], "router.score='tanh': input should be"),
    (["router=expert_choice", "router.capacity_factor=9"], "router.capacity_factor=9.0 must be"),
    (["router=expert_choice", "router.threshold_decay=1"], "router.threshold_decay=1 must be"),
    (["router=top_p", "router.threshold=0"], "router.threshold=0 must be"),
    (["router=top_p", "router.max_experts=9"], "router.max_experts=9 must be"),
    (["router=attention_importance", "router.importance=row_min"], "router.importance='row_min': input should be"),
    (["router=attention_importance", "router.max_experts=9"], "router.max_experts=9 must be"),
]


@pytest.mark.parametrize("overrides,fragment", MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line(overrides: list[str], fragment: str):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 350, message
    assert fragment in message


VALUES = compose_values([])
NUMBERS = [path for path, value in flatten(VALUES).items() if isinstance(value, int | float) and value not in (0, 1)]


@pytest.mark.parametrize("path", NUMBERS)
def test_no_number_may_be_a_truth_value_or_infinite(path: str):
    *parents, name = path.split(".")
    is_float = isinstance(flatten(VALUES)[path], float)
    for value in (True, math.nan, math.inf, -math.inf) if is_float else (True,):
        values = copy.deepcopy(VALUES)
        functools.reduce(dict.__getitem__, parents, values)[name] = value
        with pytest.raises(ConfigError) as caught:
            validate(values)
        # As 1, a number may first contradict another field.
        assert value is True or str(caught.value) == f"{path}={value} must be finite"


def test_the_yardsticks_have_the_same_active_size():
    """Beside the routers: the mixture is compared with the dense network."""
    words = ["data.paths=[a.txt]"]
    dense, mixture = (load([f"experiment=tiny_shakespeare{kind}", *words]) for kind in ("", "_moe"))
    sizes = [model_size(config.model, config.router) for config in (dense, mixture)]
    assert mixture.data == dense.data and mixture.budget == dense.budget and mixture.optimizer == dense.optimizer
    routers = mixture.model.num_layers * mixture.model.moe.num_experts * mixture.model.hidden_size
    assert sizes[1].active_parameters - sizes[0].active_parameters == routers
    assert sizes[1].total_parameters > 2 * sizes[0].total_parameters


READMES = sorted(path for path in ROOT.rglob("README.md") if not {".venv", "outputs", "build"} & set(path.parts))


def readme_commands() -> list[str]:
    blocks = [block for path in READMES for block in re.findall(r"```(?:bash|sh|)\n(.*?)```", path.read_text(), re.S)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = r"moe-pretrain (train|tune|prepare|plan|verify|certify) .*="
    found = {line.split(" # ")[0].strip() for line in lines if re.match(commands, line)}
    return sorted(line for line in found if "--config-dir" not in line)  # its files are in the README


def test_readmes_link_to_what_exists():
    for path in READMES:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.relative_to(ROOT)} links to {link}"


def test_every_optimizer_has_a_formula_for_the_oracle():
    assert {name for name in GROUPS["optimizer"] if name != "base"} == UPDATES.keys()
    with pytest.raises(ConfigError, match=r"optimizer\.name=lion must be one of adamw, muon here"):
        update_of("lion")


def test_the_first_readme_has_every_command():
    rows = re.findall(
        r"^\| (`.*?`(?:, `.*?`)*) \|", (ROOT / "README.md").read_text().split("## Routing")[0], re.MULTILINE
    )
    assert {name for row in rows for name in re.findall(r"`(.*?)`", row)} | {"completion"} == COMMANDS.keys()
    assert "`moe-pretrain completion bash`" in (ROOT / "README.md").read_text()


def test_files_of_ones_own_as_the_readme_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = (ROOT / "configs" / "README.md").read_text()
    for file, content in re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", text, re.DOTALL):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(content)
    (command,) = re.findall(r"^moe-pretrain (train --config-dir .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--cfg", "job"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["data"]["paths"], found["data"]["validation_fraction"]) == (["notes/*.jsonl"], 0.02)
    assert (found["model"]["name"], found["model"]["num_layers"], found["model"]["hidden_size"]) == ("mine", 6, 128)


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_compose(command: str):
    """``router_file=`` names a file that the reader writes; the example itself is run by the certificate's tests."""
    overrides = [word for word in shlex.split(command)[2:] if not word.startswith("router_file=")]
    if command.startswith("moe-pretrain tune"):
        parser = Parser("tune", "")
        tune.arguments(parser)
        options = parser.parse(overrides)
        schemes = tuple(tuple(each.split(" ")) for each in options.scheme)
        settings = TuneSettings(options.trials, options.tuning_seed, options.factor, tuple(options.also), schemes)
        shared, found, _ = schemes_and_seeds(options.overrides, settings, OverridesParser.create())
        for scheme in found:
            load([*shared.fixed, *scheme])
        return
    if command.startswith("moe-pretrain plan"):
        parser = Parser("plan", "")
        plan.arguments(parser)
        overrides = parser.parse(overrides).overrides
    if "--multirun" in overrides:
        sweep = parse([word for word in overrides if word != "--multirun"], OverridesParser.create())
        overrides = [*sweep.fixed, *sweep.example]
    load(overrides)
