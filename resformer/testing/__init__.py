"""What every scheme and every family keeps, as checks that anyone can run on one of their own."""

from resformer.testing.contract import check_scheme as check_scheme
from resformer.testing.contract import checks as checks
from resformer.testing.families import check_family as check_family
from resformer.testing.families import family_checks as family_checks
from resformer.testing.hosts import batch as batch
from resformer.testing.hosts import tiny_host as tiny_host
from resformer.testing.nets import Net as Net
from resformer.testing.nets import Reference as Reference
from resformer.testing.nets import Site as Site
from resformer.testing.subject import HostCannot as HostCannot
