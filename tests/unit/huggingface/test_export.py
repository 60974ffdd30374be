"""Exported folders: every scheme, as transformers' own class or as one file of remote code, and what is refused."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers.schemes import CASES, MERGED
from helpers.trained import tiny_run
from safetensors import safe_open
from torch import Tensor

from moe_pretrain import cli
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.huggingface import check, layout
from moe_pretrain.huggingface.check import compare_logits, our_logits
from moe_pretrain.huggingface.folder import HuggingFaceFolder
from moe_pretrain.huggingface.remote_code.assemble import FILE, assemble, schemes
from moe_pretrain.moe.routers import SHIPPED

ALL = [(kind, words) for kind, cases in CASES.items() for words in cases]
ALL += [("MoePretrainForCausalLM", words) for words in MERGED]


def name_of(words: tuple[str, ...]) -> str:
    return "-".join(word.removeprefix("router=").replace("router.", "").replace("model.", "") for word in words)[:120]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


def open_run(folder: Path):
    return open_trained(folder, lambda file: file, pytest.fail)


def exported(home: Path, name: str, words: tuple[str, ...], *options: str) -> Path:
    """The exported folder of a run of ``words``; made once."""
    target = home / f"{name}.exported"
    if not target.exists():
        assert cli.main(["export", str(tiny_run(home, name, *words)), str(target), "--debug", *options]) == 0
    return target


def ids_of(home: Path, length: int = 30) -> Tensor:
    tokenizer = load_tokenizer_file(home / "tokenizer.json")
    text = "The statement executes, and the expression that it names is evaluated. " * 3
    return torch.tensor(tokenizer.encode_batch([text])[0][: 2 * length]).view(2, length)


def test_every_scheme_is_exported_or_has_a_case():
    covered = {next(word for word in words if word.startswith("router="))[7:] for _, words in ALL}
    # Further choices of the group are a scheme with other values.
    assert set(schemes()) <= covered
    assert set(SHIPPED) - {"dense"} >= set(schemes())


@pytest.mark.parametrize("kind,words", ALL, ids=[name_of(words) for _, words in ALL])
def test_logits_are_those_of_the_framework(
    kind: str, words: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture
):
    name = f"run{ALL.index((kind, words))}"
    folder = exported(home, name, words)
    said = capsys.readouterr().out
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == [kind] and (folder / FILE).exists() == (kind == "MoePretrainForCausalLM")
    card = (folder / "README.md").read_text()
    assert "largest difference of a logit" in said and said.split("check: ")[1].splitlines()[0] in card
    assert ("rounds its router to bfloat16" in card) == (
        kind[:5] in ("Mixtr", "Olmoe", "Qwen2", "Qwen3") and "dense" not in words[0]
    )
    run = open_run(home / name)
    ids = ids_of(home)
    theirs = check.exported_logits(folder, ids)
    ours = our_logits(run.model(), ids)
    found = compare_logits(ours, theirs)
    assert found.apart == 0 and found.largest < 2e-5 * found.scale
    if kind == "MoePretrainForCausalLM":
        rounded = check._class_of(folder).from_pretrained(folder, dtype=torch.bfloat16).eval()
        apart = (rounded(input_ids=ids).logits - ours).abs().amax(dim=-1) / ours.std()
        assert apart.median() < 0.1, "but for tokens that rounding sends to other experts"


READ_BACK = [case for case in ALL if case[0][:7] in ("Mixtral", "OlmoeFo", "Qwen3Mo", "Qwen3Fo")]


@pytest.mark.parametrize("kind,words", READ_BACK, ids=[kind for kind, _ in READ_BACK])
def test_what_was_exported_is_read_back(kind: str, words: tuple[str, ...], home: Path):
    name = f"run{ALL.index((kind, words))}"
    folder = HuggingFaceFolder(exported(home, name, words))
    run = open_run(home / name)
    weights = dict(run.model().named_parameters())
    assert folder.shapes == {name: list(weight.shape) for name, weight in weights.items()}
    for tensor, weight in weights.items():
        assert torch.equal(folder.read(tensor, "weight", 0, weight.numel()), weight.detach().flatten()), tensor
    model = run.config.model
    folder.check(model, "checkpoint.warm_start")
    assert set(folder.model_words()) >= {f"model.qk_norm={model.qk_norm}", f"model.num_heads={model.num_heads}"}
    assert (f"model.head_size={model.head_size}" in folder.model_words()) == (model.head_size is not None)
    other = "none" if model.qk_norm == "head" else "head"
    with pytest.raises(ConfigError, match=f"model.qk_norm={other} must be {model.qk_norm}, as field="):
        folder.check(replace(model, qk_norm=other), "field")
    size = model.attention_head_size
    with pytest.raises(
        ConfigError, match=rf"^model.head_size={size + 2} must be {size}, as field=.*: model.head_size$"
    ):
        folder.check(replace(model, head_size=size + 2), "field")
    router = run.config.router
    assert folder.other_routing(router) == []
    if router.name == "top_k":
        weights = "raw" if router.weights == "renormalised" else "renormalised"
        other = replace(router, weights=weights, top_k=3)
        assert folder.other_routing(other) == [
            "router.top_k=3 (was 2)",
            f"router.weights={weights} (was {router.weights})",
        ]
    assert transformers.AutoConfig.from_pretrained(home / f"{name}.exported").pad_token_id is None


def test_packed_documents_do_not_see_each_other(home: Path):
    """Where positions begin anew, without mask or cache, as in transformers' own classes, of which one is here."""
    cases = {words[0]: (kind, words) for kind, words in reversed(ALL)}
    ids, lengths = ids_of(home, 20)[:1], [7, 1, 12]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    for scheme in ("router=top_k", "router=attention_importance", "router=moe_plus_plus", "router=lory"):
        kind, words = cases[scheme]
        folder = exported(home, f"run{ALL.index((kind, words))}", words)
        with torch.no_grad():
            if kind == "MoePretrainForCausalLM":
                model = check._class_of(folder).from_pretrained(folder).eval()
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            if scheme == "router=lory":
                with pytest.raises(ValueError, match="one document in each"):
                    model(input_ids=ids, position_ids=places)
                continue
            packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
            alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_cache_that_does_not_grow_is_refused(home: Path):
    folder = exported(home, "half", ("router=top_p",), "--dtype=bfloat16")
    model = check._class_of(folder).from_pretrained(folder, dtype="auto").eval()
    cache = transformers.StaticCache(model.config, max_cache_len=12)
    with pytest.raises(ValueError, match="needs a cache that grows"):
        model(input_ids=ids_of(home)[:, :4], past_key_values=cache)


def test_a_model_in_bfloat16_keeps_its_router_and_equals_the_rounded_one(home: Path):
    words = ("router=top_p",)
    folder = exported(home, "half", words, "--dtype=bfloat16")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
    assert dtypes.pop("blocks.0.feed_forward.router.weight") == torch.float32
    assert {dtype for name, dtype in dtypes.items() if ".router." not in name} == {torch.bfloat16}
    model = check._class_of(folder).from_pretrained(folder, dtype="auto")
    assert model.blocks[0].feed_forward.router.weight.dtype == torch.float32
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model(input_ids=ids_of(home)).logits.isfinite().all()


PLAIN = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_pretrain":
            raise ImportError("this environment has no " + name)
sys.meta_path.insert(0, Blocker())
import torch, transformers
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
out = {}
for folder, ids in json.loads(sys.stdin.read()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    greedy = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    alone = [model.generate(row[None], attention_mask=torch.ones_like(row[None]), **greedy)[0].tolist() for row in ids]
    uncached = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), use_cache=False, **greedy)[0].tolist()
    # The second row is four tokens shorter, and padded on the left.
    padded = ids.clone(); padded[1, :4] = tokenizer.pad_token_id
    mask = torch.ones_like(padded); mask[1, :4] = 0
    batch = model.generate(padded, attention_mask=mask, **greedy)[1, 4:].tolist()
    short = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **greedy)[0].tolist()
    text = "def f(x):\\n  return x  # naïve"
    out[folder] = dict(alone=alone, uncached=uncached, batch=batch, short=short, text=tokenizer(text).input_ids,
        back=tokenizer.decode(tokenizer(text).input_ids) == text)
print(json.dumps(out))
"""


@torch.no_grad()
def greedy(model, ids: Tensor, count: int) -> list[int]:
    """Without a cache, by the framework."""
    for _ in range(count):
        ids = torch.cat([ids, our_logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("part", ["every fourth", "others"])
@pytest.mark.fast("every fourth")
def test_plain_transformers_generates_the_same_tokens(part: str, home: Path, tmp_path: Path):
    """In a process that cannot import this package: with and without cache, alone and padded on the left."""
    # Of transformers' own classes, whose generation is not ours, one case each.
    chosen = [case for i, case in enumerate(ALL) if case[0] == "MoePretrainForCausalLM" or case[0] != ALL[i - 1][0]]
    chosen = [case for place, case in enumerate(chosen) if (place % 4 == 0) == (part == "every fourth")]
    folders = {f"run{ALL.index(case)}": exported(home, f"run{ALL.index(case)}", case[1]) for case in chosen}
    ids = ids_of(home, 20)  # by the tokenizer that a first run has made
    asked = json.dumps([[str(folder), ids.tolist()] for folder in folders.values()])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], input=asked, text=True, capture_output=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = load_tokenizer_file(home / "tokenizer.json").encode_batch(["def f(x):\n  return x  # naïve"])[0]
    for (name, folder), (_, words) in zip(folders.items(), chosen, strict=True):
        result, model = found[str(folder)], open_run(home / name).model()
        assert result["alone"] == [greedy(model, row[None], 5) for row in ids], words
        assert result["uncached"] == result["alone"][0], words
        assert result["batch"] == result["short"], words
        assert result["text"] == tokens and result["back"], words


def test_shards_hold_each_tensor_once_and_are_as_small_as_asked(home: Path):
    whole, cut = exported(home, "run0", ALL[0][1]), home / "cut"
    assert cli.main(["export", str(home / "run0"), str(cut), "--shard-gb=0.00002", "--no-check"]) == 0
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5 and sorted(path.name for path in cut.glob("*.safetensors")) == files
    total = 0
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        for name in file.keys():
            with safe_open(cut / index["weight_map"][name], framework="pt") as part:
                assert torch.equal(part.get_tensor(name), file.get_tensor(name))
            total += file.get_tensor(name).nbytes
        assert index["weight_map"].keys() == set(file.keys())
    for name in files:
        with safe_open(cut / name, framework="pt") as part:
            sizes = [part.get_tensor(key).nbytes for key in part.keys()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == total
    assert "not made" in (cut / "README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(cut)
    ids = ids_of(home)
    torch.testing.assert_close(model(input_ids=ids).logits, our_logits(open_run(home / "run0").model(), ids))


def test_a_wrong_weight_is_found_and_nothing_is_left(home: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Gate and up of the experts change places."""
    experts = layout.experts
    monkeypatch.setattr(
        *(layout, "experts"),
        lambda config, layer, prefix, names: experts(config, layer, prefix, (names[1], names[0], names[2])),
    )
    exported(home, "run0", ALL[0][1])
    target = home / "wrong"
    before = sorted(home.iterdir())
    assert cli.main(["export", str(home / "run0"), str(target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the exported model is not that of the run: largest difference" in line and line.endswith(
        "nothing was written"
    )
    assert sorted(home.iterdir()) == before


OWN = """
from dataclasses import dataclass
from typing import Literal
from moe_pretrain.moe.routers.top_k import TopKRouterConfig, TopKRouter

@dataclass(frozen=True, kw_only=True)
class MineConfig(TopKRouterConfig):
    name: Literal["mine"] = "mine"
    top_k: int = 2
    score: str = "softmax"
    weights: str = "raw"
    weight_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    projection_size: int | None = None
    jitter: float = 0.0
    load_balance_weight: float = 0.0
    load_balance_level: str = "sequence"
    router_z_weight: float = 0.0
    def build(self, hidden_size, num_experts, layer):
        return TopKRouter(self, hidden_size, num_experts, layer)
"""


def test_what_cannot_be_exported_is_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def refusal(*words: str) -> str:
        assert cli.main(["export", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    run, full = exported(home, "run0", ALL[0][1]).with_suffix(""), tmp_path / "full"
    capsys.readouterr()
    full.mkdir()
    (full / "file").touch()
    assert "must be empty or not exist" in refusal(str(run), str(full))
    assert [path.name for path in full.iterdir()] == ["file"]
    ahead = tiny_run(
        home, "ahead", "router=attention_importance", "router.importance=received", "router.allow_non_causal=true"
    )
    assert "depend on later tokens, which do not exist yet" in refusal(str(ahead), str(tmp_path / "x"))
    orthogonal = tiny_run(home, "orthogonal", "router=random", "combine=orthogonal")
    assert "combine=orthogonal with router=random cannot be exported" in refusal(str(orthogonal), str(tmp_path / "x"))
    (tmp_path / "mine.py").write_text(OWN)
    own = tiny_run(home, "own", "router_file=" + str(tmp_path / "mine.py"))
    file = f"router_file={tmp_path / 'mine.py'}"
    assert "if you trust it, give" in refusal(str(own), str(tmp_path / "x"))
    assert "router=mine cannot be exported: it has no inference form" in refusal(str(own), str(tmp_path / "x"), file)
    other = tmp_path / "tokenizer.json"
    other.write_text((home / "tokenizer.json").read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    text = json.loads((home / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-1]
    other.write_text(json.dumps(text))
    assert "does not belong to this run" in refusal(str(run), str(tmp_path / "x"), f"--tokenizer={other}")
    assert "is not a run folder" in refusal(str(full), str(tmp_path / "x"))
    assert "must be positive" in refusal(str(run), str(tmp_path / "x"), "--shard-gb=0")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_by_its_own_folder_and_a_damaged_one(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ("router=top_k",)
    run = tiny_run(home, "two", *words, step=1, seed=1)
    tiny_run(home, "two", *words, step=2, seed=2)
    first = run / "checkpoints" / "step_00000001"
    for place, target in ((run, "newest"), (first, "first")):
        assert cli.main(["export", str(place), str(tmp_path / target)]) == 0
    assert "step 1 of two" in capsys.readouterr().out
    weights = [
        safe_open(tmp_path / name / "model.safetensors", "pt").get_tensor("model.norm.weight")
        for name in ("newest", "first")
    ]
    assert torch.equal(weights[0], open_run(run).model().norm.weight) and not torch.equal(*weights)
    (run / "checkpoints" / "step_00000002" / "rank_00000.safetensors").write_bytes(b"x")
    assert cli.main(["export", str(run), str(tmp_path / "after")]) == 0
    assert "damaged" in capsys.readouterr().out
    assert torch.equal(
        safe_open(tmp_path / "after" / "model.safetensors", "pt").get_tensor("model.norm.weight"), weights[1]
    )
    assert cli.main(["export", str(run / "checkpoints" / "step_00000002"), str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


NETWORKS = {"lory": [], "smear": [], **{name: ["factorised"] for name in schemes() if "autonomy" in name}}
PIECES = [
    *((scheme, NETWORKS.get(scheme, ["swiglu"]), "sum") for scheme in schemes()),
    *(
        ("top_k", experts, "orthogonal")
        for experts in (["unequal"], ["matrix_product"], ["swiglu", "zero_computation"])
    ),
]


@pytest.mark.parametrize("scheme,experts,combine", PIECES)
def test_the_modelling_file_imports_nothing_of_ours_and_holds_nothing_unused(
    scheme: str, experts: list[str], combine: str
):
    source = assemble([scheme], experts, combine)
    compile(source, FILE, "exec")
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    unused = [node.name for node in defined if len(re.findall(rf"\b{node.name}\b", source)) == 1]
    assert unused == ["MoePretrainForCausalLM"]
    assert "moe_pretrain." not in source and "jaxtyping" not in source
    assert max(map(len, source.splitlines())) <= 120
