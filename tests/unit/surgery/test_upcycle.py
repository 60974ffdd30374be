"""A dense model as a mixture: the loss at the start, for ours and for a Llama folder, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.trained import tiny_run, tokenizer_in
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moe_pretrain import cli
from moe_pretrain.config.trained import TrainedRun, open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.huggingface.check import our_logits, sample_ids

WIDTH = 40  # of the dense twin: two experts of 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycle")
    tiny_run(folder, "dense", "router=dense", "model.num_key_value_heads=1")
    return folder


@pytest.fixture(scope="module")
def llama(home: Path) -> Path:
    """A folder that transformers has written."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, rope_theta=500.0, rms_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    folder = home / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer_in(home), folder / "tokenizer.json")
    return folder


def opened(folder: Path) -> TrainedRun:
    return open_trained(folder, lambda file: file, pytest.fail)


def losses(out: str) -> tuple[float, float]:
    (line,) = [line for line in out.splitlines() if line.startswith("loss on")]
    words = line.replace(",", "").split()
    return float(words[words.index("dense") + 1]), float(words[words.index("mixture") + 1])


EXACT = [
    ("router=top_k",),
    ("router=top_k", "model.moe.num_shared_experts=1", "model.moe.shared_expert_hidden_size=12"),
    ("router=top_k", "model.moe.expert_hidden_size=20", "model.moe.num_experts=8"),
    ("router=top_k", "model.moe.expert_hidden_size=10", "model.moe.num_experts=8", "router.top_k=4"),
    ("router=top_k", "model.moe.num_leading_dense_layers=1"),
    ("router=loss_free", "router.weight_scale=2.5"),
    ("router=quantile",),
    ("router=hash",),
    ("router=k_means",),
    ("router=uniform",),
    ("router=random",),
    ("router=top_p_renormalised",),
    ("router=attentive", "router.key_size=8"),
    ("router=lory", "model.moe.expert_hidden_size=40", "router.segment_tokens=4"),
    ("router=smear", "model.moe.expert_hidden_size=40", "model.moe.num_shared_experts=1"),
]
NEAR = {"top_p": 0.2, "relu": 0.2, "expert_choice": 0.2, "sinkhorn": 0.2, "expert_threshold": 0.2}


@pytest.mark.parametrize("words", EXACT, ids=lambda words: "-".join(words)[:80])
def test_the_first_loss_is_the_dense_one(words: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture):
    target = home / ("up-" + "-".join(words).replace("=", "_").replace("router.", ""))[:60]
    shutil.rmtree(target, ignore_errors=True)
    assert cli.main(["upcycle", str(home / "dense"), str(target), *words, "--debug"]) == 0
    before, after = losses(capsys.readouterr().out)
    assert before == pytest.approx(after, abs=2e-5)
    dense, mixture = opened(home / "dense").model(), opened(target).model()
    ids = sample_ids(load_tokenizer_file(home / "tokenizer.json"), 40)
    torch.testing.assert_close(our_logits(mixture, ids), our_logits(dense, ids), atol=2e-4, rtol=1e-3)
    layers = mixture.moe_layers()
    assert layers and all(layer.experts.out_weight.abs().sum() > 0 for layer in layers)


def test_heads_of_a_size_of_their_own_stay(home: Path):
    source, target = (
        tiny_run(home, "heads", "router=dense", "model.head_size=10", "model.qk_norm=head"),
        home / "up-heads",
    )
    assert cli.main(["upcycle", str(source), str(target), "router=top_k", "--debug"]) == 0
    ids = sample_ids(load_tokenizer_file(home / "tokenizer.json"), 40)
    dense, mixture = (our_logits(opened(folder).model(), ids) for folder in (source, target))
    torch.testing.assert_close(mixture, dense, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("scheme", NEAR)
def test_with_raw_weights_it_is_near(scheme: str, home: Path, capsys: pytest.CaptureFixture):
    """Weights of a token sum to more or less than their mean."""
    assert cli.main(["upcycle", str(home / "dense"), str(home / f"near-{scheme}"), f"router={scheme}", "--debug"]) == 0
    before, after = losses(capsys.readouterr().out)
    assert 0 < abs(before - after) < NEAR[scheme]


@pytest.mark.parametrize("rank", [15, 8])
@pytest.mark.parametrize("scheme", ["autonomy", "attentive_low_rank", "top_k"])
def test_a_factorised_gate_is_the_truncated_svd(scheme: str, rank: int, home: Path, capsys: pytest.CaptureFixture):
    target = home / f"low-{scheme}-{rank}"
    gate = f"model.moe.gate_rank={rank}" if scheme == "top_k" else f"router.gate_rank={rank}"
    words = [f"router={scheme}", gate, *(["router.key_size=8"] if scheme == "attentive_low_rank" else [])]
    assert cli.main(["upcycle", str(home / "dense"), str(target), *words, "--debug"]) == 0
    said = capsys.readouterr().out
    dense, mixture = opened(home / "dense").model(), opened(target).model()
    for layer, block in zip(mixture.moe_layers(), dense.blocks, strict=True):
        experts = layer.experts
        down = experts.down_weight if scheme == "top_k" else layer.router.down_weight
        whole = block.feed_forward.in_weight.chunk(2)[0].double()
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        for expert in range(4):
            torch.testing.assert_close(
                experts.up_weight[expert].double() @ down[expert].double(), best, atol=1e-5, rtol=1e-4
            )
        lost = 1 - float(values[:rank].square().sum() / values.square().sum())
        assert f"layer {layer.router.layer}: the truncated gate leaves out {lost:.1%}" in said
        if scheme == "autonomy":
            hidden = torch.randn(200, 16)
            norms = torch.einsum("erh,th->ter", down, hidden).norm(dim=2)
            shares = torch.bincount(norms.argmax(dim=1), minlength=4) / 200
            assert shares.max() < 0.9, "norms rank experts by the token"
    # The function is that of the truncated dense model.
    with torch.no_grad():
        for block in dense.blocks:
            gate, up = block.feed_forward.in_weight.chunk(2)
            left, values, right = torch.linalg.svd(gate, full_matrices=False)
            block.feed_forward.in_weight.copy_(torch.cat([left[:, :rank] * values[:rank] @ right[:rank], up]))
    ids = sample_ids(load_tokenizer_file(home / "tokenizer.json"), 40)
    torch.testing.assert_close(our_logits(mixture, ids), our_logits(dense, ids), atol=1e-3, rtol=1e-3)


def test_a_llama_folder_is_upcycled(llama: Path, home: Path, capsys: pytest.CaptureFixture):
    target = home / "from-llama"
    assert cli.main(["upcycle", str(llama), str(target), "router=top_k", "model.moe.num_experts=4", "--debug"]) == 0
    before, after = losses(capsys.readouterr().out)
    assert before == pytest.approx(after, abs=2e-5)
    run = opened(target)
    ids = sample_ids(load_tokenizer_file(home / "tokenizer.json"), 40)
    theirs = LlamaForCausalLM.from_pretrained(llama)(input_ids=ids).logits
    torch.testing.assert_close(our_logits(run.model(), ids), theirs, atol=2e-4, rtol=1e-3)
    assert run.state.step == 0 and run.config.model.rope_base == 500.0 and run.config.model.num_key_value_heads == 2


def test_noise_and_units_drawn_anew(home: Path):
    """Experts differ as much as asked, and the seed decides how."""
    models = {}
    for name, words in {"noise": ["--noise=0.1"], "half": ["--reinitialise=0.5"], "again": ["--noise=0.1"]}.items():
        target = home / f"vary-{name}"
        assert cli.main(["upcycle", str(home / "dense"), str(target), "router=top_k", "--seed=4", *words]) == 0
        models[name] = opened(target).model().moe_layers()[0].experts
    dense = opened(home / "dense").model().blocks[0].feed_forward
    assert torch.equal(models["noise"].in_weight, models["again"].in_weight)
    apart = (models["noise"].in_weight - dense.in_weight).std() / dense.in_weight.std()
    assert float(apart) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(models["noise"].in_weight[0], models["noise"].in_weight[1])
    for expert in range(4):
        kept = (models["half"].in_weight[expert] == dense.in_weight).all(dim=1)
        gate, up = kept.chunk(2)
        assert torch.equal(gate, up) and int(gate.sum()) == WIDTH // 2
        assert torch.equal((models["half"].out_weight[expert] == dense.out_weight).all(dim=0), gate)


def test_merged_experts_differ_as_much_as_asked(home: Path):
    words = ["router=lory", "model.moe.expert_hidden_size=40", "router.segment_tokens=4"]
    assert cli.main(["upcycle", str(home / "dense"), str(home / "vary-lory"), *words, "--reinitialise=0.5"]) == 0
    experts = opened(home / "vary-lory").model().moe_layers()[0].experts
    dense = opened(home / "dense").model().blocks[0].feed_forward
    whole = torch.stack(dense.in_weight.chunk(2), dim=1)
    kept = []
    for expert in range(4):
        same = (experts.in_weight[:, :, expert] == whole).flatten(1).all(dim=1)
        assert int(same.sum()) == WIDTH // 2
        assert torch.equal((experts.out_weight[:, expert] == dense.out_weight.T).all(dim=1), same)
        kept.append(same)
    assert not torch.equal(kept[0], kept[1])


def test_what_cannot_be_upcycled_is_one_line(home: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def refusal(*words: str) -> str:
        assert cli.main(["upcycle", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    dense, target = str(home / "dense"), str(tmp_path / "x")
    assert "must be the dense network's 40, or divide it" in refusal(
        dense, target, "router=top_k", "model.moe.expert_hidden_size=30"
    )
    assert "only a linear router with a multiple of 2" in refusal(
        dense, target, "router=hash", "model.moe.expert_hidden_size=20"
    )
    assert "must be a multiple of 2" in refusal(
        dense, target, "router=top_k", "model.moe.expert_hidden_size=20", "model.moe.num_experts=5"
    )
    assert "model.ffn_hidden_size=30 must be 40" in refusal(
        dense, target, "router=top_k", "model.moe.num_leading_dense_layers=1", "model.ffn_hidden_size=30"
    )
    assert "has no experts: choose a scheme" in refusal(dense, target, "router=dense")
    assert "expert_hidden_size=20 must be the dense network's 40 with router=smear, which merges" in refusal(
        dense, target, "router=smear", "model.moe.expert_hidden_size=20"
    )
    for word, then in (
        ("num_heads=4", 2),
        ("rope_base=500.0", 10000.0),
        ("norm_epsilon=0.1", 1e-6),
        ("head_size=4", "null"),
    ):
        line = refusal(dense, target, "router=top_k", f"model.{word}")
        assert f"model.{word} must be {then}, as SOURCE={dense} has it" in line
    other = tiny_run(home, "gpt_oss", "router=dense", "model.moe.activation=gpt_oss")
    assert "which must be plain swiglu for upcycle" in refusal(str(other), target, "router=top_k")
    assert "--noise=-1.0" in refusal(dense, target, "router=top_k", "--noise=-1")
    assert "--reinitialise=2.0" in refusal(dense, target, "router=top_k", "--reinitialise=2")
    assert "must be empty or not exist" in refusal(dense, str(home), "router=top_k")
    mixture = tiny_run(home, "mixture", "router=top_k")
    assert "must be dense in every layer" in refusal(str(mixture), target, "router=top_k")

    def changed(name: str, **values: object) -> str:
        folder = tmp_path / name
        shutil.copytree(llama, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return str(folder)

    assert "model_type=deepseek_v3 compresses keys and values" in refusal(
        changed("deepseek", model_type="deepseek_v3"), target, "router=top_k"
    )
    assert "config.json has no num_experts" in refusal(changed("moe", model_type="qwen3_moe"), target, "router=top_k")
    bounded = refusal(dense, target, "router=top_k", "model.moe.activation_limit=7")
    assert "must be plain swiglu for upcycle" in bounded
    assert "model.moe.latent_size=8 must be null for upcycle" in refusal(
        dense, target, "router=top_k", "model.moe.latent_size=8"
    )
    assert "model_type=gpt2 is another architecture" in refusal(
        changed("gpt2", model_type="gpt2"), target, "router=top_k"
    )
    line = refusal(changed("narrow", intermediate_size=8), target, "router=top_k")
    assert "in_weight of the shape [56, 16], the model that it describes [16, 16]" in line
    nameless = Path(changed("nameless"))
    config = json.loads((nameless / "config.json").read_text())
    del config["rms_norm_eps"]
    (nameless / "config.json").write_text(json.dumps(config))
    line = refusal(str(nameless), target, "router=top_k")
    assert "config.json is no configuration of transformers: KeyError('rms_norm_eps')" in line
    line = refusal(changed("old rope", rope_scaling="linear"), target, "router=top_k")
    assert "config.json is no configuration of transformers: ValueError('rope_scaling is no mapping')" in line
    assert "has hidden_act=gelu" in refusal(changed("gelu", hidden_act="gelu"), target, "router=top_k")
    assert "model.rope_base=10000.0 must be 500.0" in refusal(
        str(llama), target, "router=top_k", "model.rope_base=10000.0"
    )
    lacking = Path(changed("lacking"))
    tensors = load_file(lacking / "model.safetensors")
    whole = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refusal(str(lacking), target, "router=top_k")
    save_file({**whole, "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, lacking / "model.safetensors")
    assert "q_proj.bias, which has no place in this model" in refusal(str(lacking), target, "router=top_k")
    (lacking / "tokenizer.json").unlink()
    save_file(whole, lacking / "model.safetensors")
    assert "tokenizer.path=" in refusal(str(lacking), target, "router=top_k")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))
