"""``moe.routers.base`` under its earlier name, which files of users' own schemes import."""

from moe_pretrain.moe.routers.base import *  # noqa: F403
