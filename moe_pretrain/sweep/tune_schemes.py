"""Schemes of a tuning: from the command's overrides and options to searches that are checked; nothing is started."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.engine.optimizers.base import present_groups
from moe_pretrain.model.parameter_groups import GROUP_NAMES, meta_model
from moe_pretrain.run_folder.record import flatten
from moe_pretrain.sweep.job_record import SweepJob
from moe_pretrain.sweep.multirun import Command, sort_overrides
from moe_pretrain.sweep.planned_jobs import Sweep, identity, load_job
from moe_pretrain.sweep.rate_search import FEWEST_RATES, MOST_TRIALS, Search, Setting

RATE = "optimizer.learning_rate"
"""The field that is searched for every scheme."""
SEED = "seed"
_FACTORS = (1.05, 100.0)


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a tuning.

    Attributes:
        trials: Trials of each scheme.
        tuning_seed: Their seed; no final run may have it.
        factor: Step of the grid of rates that a search begins on.
        also: Overrides that list values of further fields, ``router.load_balance_weight=0.003,0.03``, to be tried for
            the schemes that have the field (for a group's rate: weights in the group) and do not set it themselves.
        schemes: Further schemes, each the overrides that make it one.
    """

    trials: int = 5
    tuning_seed: int = 0
    factor: float = 2.0
    also: tuple[str, ...] = ()
    schemes: tuple[tuple[str, ...], ...] = ()

    def check(self) -> None:
        """Raise a ``ConfigError`` of one line if a value is out of its range."""
        if not FEWEST_RATES <= self.trials <= MOST_TRIALS:
            raise ConfigError(f"--trials={self.trials} must be from {FEWEST_RATES} to {MOST_TRIALS}")
        if not _FACTORS[0] <= self.factor <= _FACTORS[1]:
            raise ConfigError(f"--factor={self.factor:g} must be from {_FACTORS[0]:g} to {_FACTORS[1]:g}")
        if self.tuning_seed < 0:
            raise ConfigError(f"--tuning-seed={self.tuning_seed} must not be negative")


@dataclass
class Scheme:
    """A scheme with what is known of its trials.

    Attributes:
        words: Its overrides.
        search: What is tried for it.
        losses: Loss of each trial that has one, infinite where it diverged, in the order they were decided on.
        trials: Every trial that was decided on, as jobs.
        failed: A trial of it has failed or did not end: what is to be tried next is not known.
        finals: Its final runs.
    """

    words: tuple[str, ...]
    search: Search
    losses: dict[Setting, float] = field(default_factory=dict)
    trials: dict[Setting, SweepJob] = field(default_factory=dict)
    failed: bool = False
    finals: list[SweepJob] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its overrides."""
        return " ".join(self.words) or "the configuration's own scheme"

    @property
    def is_searched(self) -> bool:
        """Whether all its trials are made."""
        return len(self.losses) == self.search.trials

    @property
    def chosen(self) -> Setting | None:
        """The best of its trials; None before all are made, or if all diverged."""
        return self.search.choose(self.losses) if self.is_searched else None


def schemes_and_seeds(
    words: Sequence[str], settings: TuneSettings, parser: OverridesParser
) -> tuple[Command, list[tuple[str, ...]], list[int]]:
    """Overrides that all jobs share with an example of one, the overrides of each scheme, and the final seeds.

    Raises:
        ConfigError: There are no final seeds, one of them is the tuning seed, or what is searched is listed.
    """
    parsed = {word: parser.parse_overrides([word])[0] for word in words}
    of_seed = [word for word, one in parsed.items() if one.get_key_element() == SEED]
    if not of_seed:
        raise ConfigError("seed must list the final seeds, seed=1,2,3: those of the runs that are compared")
    seeds = []
    for (word,) in BasicSweeper.split_arguments(parser.parse_overrides(of_seed[-1:]), None)[0]:
        value = word.partition("=")[2]
        if not value.isdecimal():
            raise ConfigError(f"seed={value} must be a whole number that is not negative")
        if int(value) in seeds:
            raise ConfigError(f"seed={value} is listed twice: name each final seed once")
        seeds.append(int(value))
    if settings.tuning_seed in seeds:
        raise ConfigError(
            f"seed={settings.tuning_seed} is the tuning seed, by which the rate is chosen: give other final seeds, or "
            "another --tuning-seed"
        )
    command = sort_overrides([word for word in words if word not in of_seed], parser)
    for word in command.hydra:
        if word.startswith(("hydra/sweeper", "hydra.sweeper")):
            raise ConfigError(f"{word} has no effect: tune searches by its own rule; leave it out")
    searched = [RATE, *(word.partition("=")[0] for word in settings.also)]
    for key in command.keys:
        if key.lstrip("+") in searched:
            raise ConfigError(f"{key}: its values are searched; give the one to begin from, or leave it out")
    listed = parser.parse_overrides(command.swept)
    schemes = [tuple(each) for each in BasicSweeper.split_arguments(listed, None)[0]] if command.swept else []
    shared, own = command.fixed, [word for word in command.fixed if word.lstrip("+").startswith("router")]
    if not schemes and (own or not settings.schemes):  # one alone, which others may join later
        schemes, shared = [tuple(own)], [word for word in shared if word not in own]
    schemes += settings.schemes
    for scheme in settings.schemes:
        for word in scheme:
            one = parser.parse_overrides([word])[0]
            if one.is_sweep_override() or one.get_key_element().lstrip("+") in (SEED, "sweep.name", "run.name"):
                raise ConfigError(f"--scheme: {word} must give one value of what makes the scheme")
    example = [*schemes[0], f"{SEED}={seeds[0]}"]
    return Command(command.hydra, shared, [], command.keys, example), schemes, seeds


def checked(
    sweep: Sweep,
    settings: TuneSettings,
    found: Sequence[tuple[str, ...]],
    seeds: Sequence[int],
    parser: OverridesParser,
) -> list[Scheme]:
    """The schemes with their searches, every one of which could start.

    Raises:
        ConfigError: A scheme or a value is wrong, or a scheme is there twice.
    """
    also = [_listed(word, parser) for word in settings.also]
    schemes: list[Scheme] = []
    names: dict[str, str] = {}
    having: set[str] = set()
    for words in found:
        config = load_job(
            [*sweep.fixed, *words, f"{SEED}={settings.tuning_seed}"],
            " ".join(words) or "of the configuration's own scheme",
        )
        start, values = _start(config), flatten(to_values(config))
        # What a scheme sets itself makes it what it is.
        set_by_itself = {word.partition("=")[0].lstrip("+") for word in words}
        fields = values.keys() - _without_effect(config) if also else set()
        further = tuple((key, options) for key, options in also if key in fields and key not in set_by_itself)
        having |= {key for key, _ in also if key in fields}
        further = tuple((key, tuple(v for v in options if not _is_equal(v, values[key]))) for key, options in further)
        words = tuple(word for word in words if word.partition("=")[0].lstrip("+") != RATE)
        scheme = Scheme(words, Search(RATE, start, settings.factor, settings.trials, further))
        if scheme.search.rate_trials < FEWEST_RATES:
            least = settings.trials + FEWEST_RATES - scheme.search.rate_trials
            raise ConfigError(
                f"--trials={settings.trials} leaves {scheme.search.rate_trials} for the rate of {scheme.name} beside "
                f"those of --also: at least --trials={least}"
            )
        ours = identity({key: value for key, value in values.items() if key not in (RATE, SEED)})
        if ours in names:
            raise ConfigError(f"{scheme.name} and {names[ours]} are the same scheme: name each once")
        names[ours] = scheme.name
        schemes.append(scheme)
    for key, options in also:
        if key not in having:
            raise ConfigError(f"--also {key}={','.join(options)}: no scheme has such a field")
    for scheme in schemes:  # before anything runs, every kind of job that is known now
        base = scheme.search.at(scheme.search.start)
        for setting in [base, *((*base, (key, value)) for key, options in scheme.search.also for value in options)]:
            sweep.check(
                [*scheme.words, *(f"{key}={value}" for key, value in setting), f"{SEED}={settings.tuning_seed}"]
            )
    for seed in seeds:
        sweep.check(
            [
                *schemes[0].words,
                *(f"{key}={value}" for key, value in schemes[0].search.at(schemes[0].search.start)),
                f"{SEED}={seed}",
            ]
        )
    return schemes


def _without_effect(config: Config) -> set[str]:
    """Fields that every scheme has, and of this one nothing heeds: rates of groups without weights."""
    present = present_groups(meta_model(config.model, config.router))
    return {f"optimizer.groups.{name}.lr_scale" for name in GROUP_NAMES if name not in present}


def _start(config: Config) -> float:
    rate = config.optimizer.learning_rate
    if not rate > 0:
        raise ConfigError(f"{RATE}={rate:g} must be positive for a search to begin from it")
    return rate


def _listed(word: str, parser: OverridesParser) -> tuple[str, tuple[str, ...]]:
    """Field and values of an override of ``--also``."""
    if "=" not in word:
        raise ConfigError(f"--also {word!r} must be FIELD=VALUE,VALUE")
    one = parser.parse_overrides([word])[0]
    key = one.get_key_element()
    if key in (RATE, SEED) or key.startswith(("run.", "sweep.")):
        raise ConfigError(f"--also {key}: it must be a field of the schemes beside the rate and the seed")
    jobs = BasicSweeper.split_arguments([one], None)[0]
    return key, tuple(dict.fromkeys(each.partition("=")[2] for (each,) in jobs))


def _is_equal(word: str, value: object) -> bool:
    try:
        return float(word) == float(value)  # type: ignore[arg-type]  # what is no number is not equal
    except (TypeError, ValueError):
        return word == str(value)
