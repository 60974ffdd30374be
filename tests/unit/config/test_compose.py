"""How composed configurations call a run that nobody named."""

import pytest
from helpers.builders import OF_LAYERS, SCHEME_WORDS

from moe_pretrain.config.load import load


def test_words_for_one_scheme_have_folders_of_their_own():
    names = [load([f"router={word}"]).run.name for word in SCHEME_WORDS]
    assert names == [f"tiny-{word}" for word in SCHEME_WORDS]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "tiny-top_k"),
        (["router=by_layer", OF_LAYERS], "tiny-by_layer"),
        (["router=top_p", "router.weights=renormalised"], "tiny-top_p"),
        (["router=top_p", "router=top_p_renormalised", "model=small"], "small-top_p_renormalised"),
        (["router=top_p_renormalised", "run.name=mine"], "mine"),
        (["router=top_p_renormalised", "run.name=${router.name}-${seed}", "seed=3"], "top_p-3"),
    ],
)
def test_default_name(words: list[str], name: str):
    assert load(words).run.name == name


def test_the_factorised_control_is_top_k_with_another_gate():
    control, plain = load(["router=top_k_factorised"]), load(["router=top_k"])
    assert control.router == plain.router
    assert (control.model.moe.gate_rank, plain.model.moe.gate_rank) == (
        load(["router=autonomy"]).router.gate_rank,
        None,
    )
    assert load(["router=top_k_factorised", "model.moe.gate_rank=16"]).model.moe.gate_rank == 16
