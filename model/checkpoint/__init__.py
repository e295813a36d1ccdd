"""Checkpoints: made from a seed, converted, and loaded, in the families that DeepSeek-V4 is released in."""

from .files import CheckpointError as CheckpointError
from .inventory import FAMILIES as FAMILIES, Family as Family, inventory as inventory
from .load import load as load
from .read import Checkpoint as Checkpoint
from .write import convert as convert, make_checkpoint as make_checkpoint
