"""What checks annotations while tests run."""

from beartype import BeartypeConf, beartype

# PEP 484: an int may stand where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
