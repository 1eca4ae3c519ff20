"""The claims, one a file. Importing this package registers them, in the order of the table."""

from resformer.theory.claims import shattering as shattering  # isort: skip
from resformer.theory.claims import white_noise as white_noise  # isort: skip
from resformer.theory.claims import explosion as explosion  # isort: skip
from resformer.theory.claims import decomposition as decomposition  # isort: skip
from resformer.theory.claims import shortcut_product as shortcut_product  # isort: skip
from resformer.theory.claims import half_gate as half_gate  # isort: skip
from resformer.theory.claims import last_layer as last_layer  # isort: skip
