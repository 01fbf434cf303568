"""One file per mixer; importing it registers its name."""

import simplex_ops.models.mixers.grassmann
import simplex_ops.models.mixers.sdpa
import simplex_ops.models.mixers.two_simplicial  # noqa: F401
