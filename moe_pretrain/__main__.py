"""``python -m moe_pretrain COMMAND`` is the same as ``moe-pretrain COMMAND``."""

import sys

from moe_pretrain.cli import main

sys.exit(main())
