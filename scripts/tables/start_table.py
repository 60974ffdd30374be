"""Start loudness of every scheme, one line each: its MoE layers' output and its experts' gradients at step 0.

    python scripts/tables/start_table.py [--schemes top_k hash] model=tiny

Words are overrides of every configuration. Output and gradient are root mean squares relative to `top_k`'s, on random
tokens (`moe_pretrain/verify/start_loudness.py`).
"""

import argparse

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.load import load
from moe_pretrain.verify.start_loudness import StartLoudness, start_loudness

_NO_SCHEMES = ("dense", "by_layer")
"""Choices of the group ``router`` that route nothing, or by other choices."""


def main() -> None:
    names = sorted(path.stem for path in (config_folder() / "router").glob("*.yaml") if path.stem not in _NO_SCHEMES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for moe-pretrain train")
    parser.add_argument("--schemes", nargs="+", default=names, choices=names, metavar="SCHEME", help="top_k is added")
    options = parser.parse_args()
    found = {name: measure(name, options.overrides) for name in dict.fromkeys(["top_k", *options.schemes])}
    reference = found["top_k"]
    print(f"top_k: output {reference.output:.3g}, gradient of the experts {reference.expert_gradient:.3g}\n")
    print("| scheme | output | experts' gradient | sum of weights | experts per token |")
    print("|---|---|---|---|---|")
    for name, each in found.items():
        ratios = each.output / reference.output, each.expert_gradient / reference.expert_gradient
        print(
            f"| `{name}` | {ratios[0]:.2f} | {ratios[1]:.2f} | {each.weight_sum:.2f} | {each.experts_per_token:.2f} |"
        )


def measure(name: str, words: list[str]) -> StartLoudness:
    config = load([f"router={name}", *words])
    return start_loudness(config.model, config.router, seed=0)


if __name__ == "__main__":
    main()
