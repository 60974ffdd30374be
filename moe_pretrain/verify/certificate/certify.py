"""Is a routing scheme what it says? One scheme, shipped or a user's own, property by property.

``certify`` builds a tiny model around the configured router in one process and prints one row per property. How a
property is tested stands in the docstring of its function: ``route_properties`` (what a decision is and whether it
looks ahead), ``dependence_properties`` (what else it may not know), ``range_properties`` (steps, layers, rows and
numbers of experts that the tiny model does not have), ``conduct_properties`` (noise, and what a router does beside
deciding), ``learning_properties`` (gradients, recomputation, saved state), ``balance_properties`` (scale of balance
losses), ``state_properties`` (where state goes), ``loss_properties`` (what losses are means of),
``evening_properties`` (where losses take the load), ``symmetry_properties`` (that an expert's number means nothing),
``configured_properties`` (what the configuration says of weights and coefficients), ``derivative_properties``
(gradients beside finite differences) and ``start_properties`` (how loud it starts).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from moe_pretrain.config.schema import Config
from moe_pretrain.system.files import write_json
from moe_pretrain.verify.certificate.conduct_properties import CONDUCT
from moe_pretrain.verify.certificate.configured_properties import CONFIGURED
from moe_pretrain.verify.certificate.dependence_properties import DEPENDENCE
from moe_pretrain.verify.certificate.derivative_properties import DERIVATIVES
from moe_pretrain.verify.certificate.evening_properties import EVENING
from moe_pretrain.verify.certificate.learning_properties import LEARNING
from moe_pretrain.verify.certificate.loss_properties import LOSSES
from moe_pretrain.verify.certificate.range_properties import RANGE
from moe_pretrain.verify.certificate.route_properties import ROUTES
from moe_pretrain.verify.certificate.start_properties import START
from moe_pretrain.verify.certificate.state_properties import STATE
from moe_pretrain.verify.certificate.subject import Broken, DeclaredNonCausal, NotApplicable, Subject
from moe_pretrain.verify.certificate.symmetry_properties import SYMMETRY

PROPERTIES: dict[str, Callable[[Subject], str]] = (
    ROUTES
    | DEPENDENCE
    | RANGE
    | CONDUCT
    | SYMMETRY
    | CONFIGURED
    | LEARNING
    | STATE
    | LOSSES
    | EVENING
    | DERIVATIVES
    | START
)
"""Name of the row -> the question behind it, in the order of the certificate."""
OF_ONE_ROUTER = {
    *("router gradient with top_k=1", "balance loss at uniform", "balance loss at collapse", "finite at ties"),
    *("experts get their best tokens", "noise"),
    *RANGE,
    *SYMMETRY,
    *CONFIGURED,
    *STATE,
    *LOSSES,
    *EVENING,
    *DERIVATIVES,
    *START,
}
"""Rows that look at one router by itself."""
PropertyVerdict = Literal["PASS", "FAIL", "not applicable", "declared non-causal"]


@dataclass(frozen=True)
class PropertyResult:
    """One line of the certificate.

    Attributes:
        property: What was asked.
        verdict: The answer; only ``FAIL`` withholds the certificate.
        detail: What was found, or why the question does not apply.
    """

    property: str
    verdict: PropertyVerdict
    detail: str

    def __str__(self) -> str:
        verdict = self.verdict if self.verdict in ("PASS", "FAIL") else f"{self.verdict}:"
        width = 34 if ": " not in self.property else 60  # with the layers that it is of
        return f"{self.property:<{width}} {verdict:<4} {self.detail}"


def examine(config: Config) -> Iterator[PropertyResult]:
    """Every property of ``config``'s router that one process can see.

    Schemes that go by layer are asked one by one, each as that of all layers; then the model with all of them, about
    everything but what is asked of one router by itself.
    """
    parts = config.router.parts()
    for place, scheme in parts.items():
        subject = Subject(config if len(parts) == 1 else replace(config, router=scheme))
        of_part = "" if len(parts) == 1 else f"{place.rpartition('.')[2]}={scheme.name}: "
        for name in PROPERTIES:
            row = ask(name, subject)
            yield replace(row, property=f"{of_part}{name}")
    if len(parts) > 1:
        subject = Subject(config)
        for name in PROPERTIES:
            if name not in OF_ONE_ROUTER:
                yield ask(name, subject)


def ask(name: str, subject: Subject) -> PropertyResult:
    """One property of the subject's router."""
    try:
        if not subject.model().moe_layers():
            return PropertyResult(name, "not applicable", f"router={subject.config.router.name} routes nothing")
        return PropertyResult(name, "PASS", PROPERTIES[name](subject))
    except NotApplicable as reason:
        return PropertyResult(name, "not applicable", str(reason))
    except DeclaredNonCausal as found:
        return PropertyResult(name, "declared non-causal", str(found))
    except Broken as found:
        return PropertyResult(name, "FAIL", str(found))
    except Exception as error:  # a broken scheme may raise anything, and the other rows are still worth having
        return PropertyResult(name, "FAIL", f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def certify(
    config: Config,
    verify_on_ranks: Callable[[], int] | None,
    say: Callable[[str], None],
    write: Path | None = None,
    code: str = "",
) -> int:
    """Print the certificate of ``config``'s router.

    Args:
        config: Any configuration; its model is shrunk.
        verify_on_ranks: Runs ``verify`` on ``config`` in worker processes and returns its exit code; None when
            ``config`` asks for one process.
        say: Prints a line.
        write: Where to keep it as JSON, if anywhere.
        code: Which code was tried, for that file.

    Returns:
        Exit code: 0 if no row is ``FAIL``.
    """
    source = config.router_file or "shipped"
    model = Subject(config).config.model
    parts = "" if model.moe.combine.name == "sum" else f" combine={model.moe.combine.name}"
    say(
        f"router={config.router.description} ({source}){parts} in {len(model.moe_layers)} layers of "
        f"{model.moe.kinds.total} experts, cpu, float32"
    )
    rows = []
    for row in examine(config):
        rows.append(row)
        say(f"  {row}")
    name = "gradient parity on ranks"
    if verify_on_ranks is None:
        row = PropertyResult(
            name,
            "not applicable",
            "one process; parallel.processes=2 parallel.expert_parallel_size=2 adds it (the default where two fit)",
        )
    else:
        size, ranks = config.parallel.expert_parallel_size, config.parallel.processes
        same = verify_on_ranks() == 0
        row = PropertyResult(
            name, "PASS" if same else "FAIL", f"verify on {ranks} ranks, expert parallel {size}: see above"
        )
    rows.append(row)
    say(f"  {row}")
    if write is not None:
        write_json(write, {"code": code, "rows": [asdict(row) for row in rows]})
        say(f"written: {write}")
    failed = sum(row.verdict == "FAIL" for row in rows)
    say("certified" if not failed else f"not certified: {failed} of {len(rows)} properties fail")
    return int(failed > 0)
