"""The names under which the pipelines reach `ambergrade.pictures`; they go when the pipelines do."""

from ambergrade.pictures import decode_bytes as decode_bytes
from ambergrade.pictures import open_picture as open_picture
