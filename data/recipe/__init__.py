"""The recipe of the bundled world: art -> scenes and captions -> training -> diffusers folders.

Run it with ``make world`` (or ``python -m recipe --help`` with ``data`` on the path).
"""

import basinlab  # noqa: F401  # mends torchvision, which transformers imports
