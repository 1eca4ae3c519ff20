"""Hosts: declarative specs of Hugging Face models. Importing this package registers them all."""

from resformer.hosts import decoders as decoders
from resformer.hosts import encoders as encoders
from resformer.hosts import seq2seq as seq2seq
from resformer.hosts import side_by_side as side_by_side
from resformer.hosts.family import Family as Family
from resformer.hosts.family import Projection as Projection
from resformer.hosts.family import Site as Site
from resformer.hosts.family import Stack as Stack
from resformer.hosts.family import families as families
from resformer.hosts.family import parallel as parallel
from resformer.hosts.family import register_family as register_family
