"""``moe.routers.base`` and ``moe.routers.config`` under the earlier name, which files of users' own schemes import."""

from moe_pretrain.moe.routers.base import *  # noqa: F403
from moe_pretrain.moe.routers.config import *  # noqa: F403
