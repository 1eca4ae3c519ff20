"""The claims, one a file. Importing this package registers them, in the order of the table."""

from resformer.theory.claims import shattering as shattering  # isort: skip
from resformer.theory.claims import white_noise as white_noise  # isort: skip
from resformer.theory.claims import explosion as explosion  # isort: skip
from resformer.theory.claims import decomposition as decomposition  # isort: skip
from resformer.theory.claims import shortcut_product as shortcut_product  # isort: skip
from resformer.theory.claims import half_gate as half_gate  # isort: skip
from resformer.theory.claims import last_layer as last_layer  # isort: skip
from resformer.theory.claims import degradation as degradation  # isort: skip
from resformer.theory.claims import shortcuts as shortcuts  # isort: skip
from resformer.theory.claims import ensemble as ensemble  # isort: skip
from resformer.theory.claims import reordering as reordering  # isort: skip
from resformer.theory.claims import update_growth as update_growth  # isort: skip
from resformer.theory.claims import vanishing as vanishing  # isort: skip
from resformer.theory.claims import variance_growth as variance_growth  # isort: skip
from resformer.theory.claims import token_collapse as token_collapse  # isort: skip
from resformer.theory.claims import rank as rank  # isort: skip
from resformer.theory.claims import identity_fit as identity_fit  # isort: skip
from resformer.theory.claims import growing as growing  # isort: skip
