"""Keeps the names of an earlier layout until every test has moved to `ambergrade.door`."""

from ambergrade.door.compose import compose as compose
from ambergrade.door.compose import plain as plain
from ambergrade.places import CONF as CONF
from ambergrade.typed import settings as settings

REPOSITORY = CONF.parent
